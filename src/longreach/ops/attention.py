"""The public attention function: validate once, choose an implementation, call it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import compiled_cpu_attention, triton_attention
from .reach import KEY_BLOCK
from .reference import reference_attention
from .sdpa import sdpa_attention

IMPLEMENTATIONS = ("reference", "sdpa", "cpu", "triton", "flex")
"""What `impl` may name besides "auto"."""

CPU_CROSSOVER = 256 * 256
"""Tq Tk from which "cpu" is preferred to "sdpa" with a dense mask on the CPU. By `benchmarks/attention.py --crossover`
on an AMD EPYC it is 0.7 to 0.8 times as fast forward at 128 tokens, 0.95 to 1.8 at 256 and 1.2 to 3.3 at 512; with a
backward pass 0.6 to 1.4, 0.8 to 1.0 and 0.9 to 1.4."""

CPU_DECODE_CROSSOVER = 16384
"""Tk from which that holds for fewer than DECODE_QUERIES queries: 1 to 3.9 times as fast there, 0.7 to 2.1 at 8192."""

DECODE_QUERIES = 16
"""Queries below which a call counts as decoding."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Tensor | tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    tolerance: float | None = None,
    key_norms: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention with ALiBi: softmax(scale q_i . k_j - m_h |i - j| + bias) v.

    ALiBi is Press, Smith, Lewis, ICLR 2022 (arXiv 2108.12409). Queries are aligned with the last keys: query
    number r stands at position i = r + Tk - Tq, which serves full sequences, chunked prefill and single decoding
    steps alike. The ALiBi bias is made from distances in at least float32, and added after the scale. A query
    that sees no key gets output 0 and LSE -inf. impl="reference" adds and sums in the dtype of q throughout.

    Args:
        q: (B, H, Tq, D) float64, float32, bfloat16 or float16.
        k: (B, Hkv, Tk, D), the dtype and device of q; Hkv divides H, and query head h reads key head h Hkv // H.
        v: (B, Hkv, Tk, D), likewise.
        slopes: (H,) or (B, H) floating point, not negative, zero for a head without ALiBi; see `alibi_slopes`.
            A pair (left, right) weighs past and future keys separately. May require a gradient.
        bias: floating point, broadcastable to (B, H, Tq, Tk), added to the scaled scores. May require a gradient.
        causal: whether a query sees only keys at or before its position.
        scale: factor of q . k; D**-0.5 when None.
        window_size: how many of the nearest keys a query sees on each side, itself included: |i - j| < window_size.
        key_padding_mask: (B, Tk) bool, True where a key is padding, as in torch.nn.MultiheadAttention.
        cu_seqlens: (N + 1,) int32 or int64, [0, ..., T]: borders of N documents packed along T. Needs Tq = Tk. No
            query sees another document.
        dropout_p: probability with which attention weights are dropped; pass 0 outside training.
        tolerance: the probability mass per row that "cpu", "triton" and "flex" may drop, at least 0: they skip keys
            that provably hold no more (docs/reach.md). None is the default of the dtype, below its rounding. The
            others drop nothing.
        key_norms: (B, Hkv, ceil(Tk / KEY_BLOCK)), upper bounds on the key norms of each block of KEY_BLOCK keys, as
            `longreach.ops.reach.key_block_norms` gives them; a KV cache keeps them so that decoding with "cpu" and
            "triton" reads only keys within reach. "auto" makes no use of them where it chooses otherwise.
        return_lse: whether to return the LSE too.
        impl: "auto", "reference", "sdpa", "cpu", "triton" or "flex". An explicit choice runs or raises. "auto" is
            what `choose_impl` says.

    Returns:
        The output (B, H, Tq, D) in the dtype of q; with return_lse a pair of it and the natural log of each row's
        sum of exponentials (B, H, Tq), in the dtype of q if that is float64, else in float32.

    Raises:
        ValueError: a wrong shape, dtype, device or value, or what the chosen implementation cannot do.
    """
    q, k, v = _autocast(q, k, v)
    _validate(q, k, v, slopes, bias, scale, window_size, key_padding_mask, cu_seqlens, dropout_p, tolerance, impl)
    if key_norms is not None:
        _validate_key_norms(key_norms, k, impl)
    if impl == "auto":
        masked = window_size is not None or key_padding_mask is not None or cu_seqlens is not None
        impl = choose_impl(
            q.device.type,
            q.shape[2],
            k.shape[2],
            reaching=slopes is not None or masked,
            dense=bias is not None or dropout_p > 0,
            return_lse=return_lse,
        )
    arguments: dict[str, Any] = {
        "slopes": slopes,
        "causal": causal,
        "scale": scale,
        "window_size": window_size,
        "key_padding_mask": key_padding_mask,
        "cu_seqlens": cu_seqlens,
    }
    with torch.autocast(q.device.type, enabled=False):
        if impl == "sdpa":
            if return_lse:
                raise ValueError('return_lse=True with impl="sdpa", which has no LSE: use another impl or "auto"')
            return sdpa_attention(q, k, v, **arguments, bias=bias, dropout_p=dropout_p)
        if impl == "reference":
            out, lse = reference_attention(q, k, v, **arguments, bias=bias, dropout_p=dropout_p)
            lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
        else:
            if bias is not None or dropout_p:
                name = "bias" if bias is not None else f"dropout_p={dropout_p}"
                raise ValueError(f'{name} with impl="{impl}", which has neither: use impl="sdpa" or "auto"')
            if impl != "flex":
                arguments["key_norms"] = key_norms
            out, lse = _reaching(impl, q)(q, k, v, **arguments, tolerance=tolerance)
    return (out, lse) if return_lse else out


def choose_impl(
    device: str,
    query_length: int,
    key_length: int,
    *,
    reaching: bool,
    dense: bool = False,
    return_lse: bool = False,
) -> str:
    """Name the implementation that `attention(impl="auto")` runs.

    On the CPU that is "cpu" from the measured crossovers on, where there is anything to skip or hide; "sdpa"
    otherwise, and "reference" where a dense bias or dropout meets a wanted LSE. On other devices it is "sdpa", or
    "reference" for the LSE: the GPU kernels have not been timed yet, so they run only by impl="triton".

    Args:
        device: the type of the device, as in "cpu".
        query_length: Tq.
        key_length: Tk.
        reaching: whether there are slopes, a window, padding or documents.
        dense: whether there is a dense bias or dropout.
        return_lse: whether the LSE is wanted.
    """
    if device != "cpu" or dense:
        return "reference" if return_lse else "sdpa"
    if return_lse:
        return "cpu"
    if query_length < DECODE_QUERIES:
        return "cpu" if reaching and key_length >= CPU_DECODE_CROSSOVER else "sdpa"
    return "cpu" if reaching and query_length * key_length >= CPU_CROSSOVER else "sdpa"


def _reaching(impl: str, q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of an implementation that skips what is beyond reach, imported when it is first used."""
    if impl == "triton":
        return triton_attention
    if impl == "flex":
        from .flex import flex_alibi_attention

        return flex_alibi_attention
    if q.device.type != "cpu":
        raise ValueError(f'q is on {q.device} with impl="cpu": move it to the CPU, or use another impl')
    if torch.compiler.is_compiling():
        return compiled_cpu_attention
    from .cpu import cpu_attention

    return cpu_attention


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v, but neither slopes nor bias, as torch.autocast casts SDPA's arguments."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))  # type: ignore[return-value]
    return q, k, v


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    scale: float | None,
    window_size: int | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
    tolerance: float | None,
    impl: str,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: give (B, H, T, D)")
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} of {x.dtype}: give float64, float32, bfloat16 or float16")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: give them alike")
    batch, num_heads, query_length, head_dim = q.shape
    num_kv_heads, key_length = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k of shape {tuple(k.shape)}: B and D must be those of q, {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v of shape {tuple(v.shape)}: give the shape of k, {tuple(k.shape)}")
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"k has {num_kv_heads} heads, q has {num_heads}: Hkv must divide H")
    if head_dim == 0:
        raise ValueError("q has head_dim D=0: give at least 1")
    if isinstance(slopes, tuple) and len(slopes) != 2:
        raise ValueError(f"slopes is a tuple of {len(slopes)}: give one tensor, or the pair (left, right)")
    for side in () if slopes is None else slopes if isinstance(slopes, tuple) else (slopes,):
        if not isinstance(side, Tensor):
            raise ValueError(f"slopes of {type(side).__name__}: give one tensor, or the pair (left, right) of two")
        if tuple(side.shape) not in ((num_heads,), (batch, num_heads)):
            expected = f"({num_heads},) or ({batch}, {num_heads})"
            raise ValueError(f"slopes of shape {tuple(side.shape)}: give (H,) or (B, H), here {expected}")
        _validate_float("slopes", side, q)
    if bias is not None:
        target = (batch, num_heads, query_length, key_length)
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if len(shape) != 4 or any(b not in (1, t) for b, t in zip(shape, target, strict=True)):
            raise ValueError(f"bias of shape {tuple(bias.shape)}: give one broadcastable to (B, H, Tq, Tk) = {target}")
        _validate_float("bias", bias, q)
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale!r}: give a positive number, or None for D**-0.5")
    if window_size is not None and (not isinstance(window_size, int) or window_size < 1):
        raise ValueError(f"window_size={window_size!r}: give an integer of at least 1, or None for no window")
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, key_length) or key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"key_padding_mask of shape {tuple(key_padding_mask.shape)} and {key_padding_mask.dtype}: "
                f"give (B, Tk) = ({batch}, {key_length}) bool, True where a key is padding"
            )
        _validate_device("key_padding_mask", key_padding_mask, q)
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens of shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}: give (N + 1,) int32 or int64"
            )
        if query_length != key_length:
            raise ValueError(f"cu_seqlens with Tq={query_length} and Tk={key_length}: packed documents need Tq = Tk")
        _validate_device("cu_seqlens", cu_seqlens, q)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p!r}: give at least 0 and below 1")
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance={tolerance!r}: give at least 0 and below 1, or None for the default of the dtype")
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: give one of {', '.join(('auto', *IMPLEMENTATIONS))}")


def _validate_key_norms(key_norms: Tensor, k: Tensor, impl: str) -> None:
    expected = (*k.shape[:2], -(-k.shape[2] // KEY_BLOCK))
    if tuple(key_norms.shape) != expected or not key_norms.is_floating_point():
        raise ValueError(
            f"key_norms of shape {tuple(key_norms.shape)} and {key_norms.dtype}: give a floating-point tensor "
            f"(B, Hkv, ceil(Tk / {KEY_BLOCK})) = {expected}"
        )
    if impl not in ("auto", "cpu", "triton"):
        raise ValueError(f'key_norms with impl="{impl}", which makes no use of them: use "cpu", "triton" or "auto"')


def _validate_float(name: str, x: Tensor, q: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} of {x.dtype}: give floating point, float32 unless there is a reason")
    _validate_device(name, x, q)


def _validate_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q is on {q.device}: move it there")
