"""The public attention function: validate once, choose an implementation, call it."""

import math
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longreach.ops.arguments import (
    validate_bias,
    validate_choice,
    validate_flags,
    validate_same_device,
    validate_slopes,
    validate_tensors,
    validate_types,
    validated_dropout,
    validated_scale,
    validated_tolerance,
    validated_visibility,
)
from longreach.ops.cpu import native
from longreach.ops.cpu.operators import cpu_attention
from longreach.ops.cpu.passes import can_decode
from longreach.ops.crossovers import CROSSOVERS, ROW, processor_of
from longreach.ops.lse_bound import FEW_QUERIES
from longreach.ops.reach import KEY_BLOCK, default_tolerance
from longreach.ops.reference import reference_attention
from longreach.ops.sdpa import sdpa_attention, surely
from longreach.ops.transforms import autocasts, is_watched, may_learn, without_autocast
from longreach.ops.triton.operators import triton_attention

IMPLEMENTATIONS = ("reference", "sdpa", "cpu", "triton", "flex")
"""What `impl` may name besides "auto"."""


STEP_TOLERANCES = tuple(default_tolerance(dtype) for dtype in native.STEP_DTYPES)
"""The default of each, which to compute takes as long as a step's other arithmetic."""


class Choice(NamedTuple):
    """What `choose_impl` says."""

    impl: str
    """Name of the implementation."""
    reason: str
    """Why it is that one, and where that was measured."""


@overload
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
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
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
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
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
            query sees another document. Values are checked on the CPU alone, and not under torch.compile: elsewhere
            borders that do not ascend from 0 to T give wrong output.
        dropout_p: probability with which attention weights are dropped; pass 0 outside training.
        tolerance: the probability mass per row that may be dropped, at least 0: "cpu", "triton", "flex" and, where its
            mask would be large, "sdpa" skip keys that provably hold no more (docs/reach.md). None is the default of the
            dtype, below its rounding. The backward pass of "cpu" may drop as much again.
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
        ValueError: a wrong type, shape, dtype, device or value, or what the chosen implementation cannot do.
    """
    if (
        bias is window_size is key_padding_mask is cu_seqlens is tolerance is None
        and causal is True
        and return_lse is False
        and type(dropout_p) is float
        and dropout_p == 0.0
        and (out := _plain_step(q, k, v, slopes, key_norms, scale, impl)) is not None
    ):
        return out
    validate_types(q=q, k=k, v=v)
    given_keys = k
    q, k, v = autocast(q, k, v)
    validate_tensors(q, k, v)
    q, k, v = (_in_rows(x) for x in (q, k, v))
    validate_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    validate_slopes(slopes, q, least=-math.inf if impl in ("reference", "sdpa") else 0.0)  # of which both take any
    validate_bias(bias, q, k)
    scale = validated_scale(scale)
    visibility = validated_visibility(q, k, causal, window_size, key_padding_mask, cu_seqlens)
    tolerance = validated_tolerance(tolerance)
    dropout_p = validated_dropout(dropout_p)
    validate_flags(return_lse=return_lse)
    if key_norms is not None:
        _validate_key_norms(key_norms, k, impl)
    if k.dtype != given_keys.dtype:
        key_norms = None  # autocast rounds keys, also to longer ones
    if forward_ad._current_level >= 0:
        impl = _in_forward_mode(impl)
    if impl == "auto":
        impl = choose_impl(
            q.device.type,
            visibility.query_length,
            visibility.key_length,
            dtype=q.dtype,
            reaching=slopes is not None or visibility.hides_past,
            causal=visibility.causal,
            dense=bias is not None or dropout_p > 0,
            return_lse=return_lse,
            has_key_norms=key_norms is not None,
            learns=may_learn(q, k, v, *(slopes if isinstance(slopes, tuple) else (slopes,))),
            processor=processor_of(q.device, q.dtype, q.shape[3]),
            cache_width=k.shape[0] * k.shape[1] * k.shape[3],
        ).impl
    arguments: dict[str, Any] = {"slopes": slopes, "scale": scale}
    with without_autocast(q.device):
        if impl == "sdpa":
            arguments |= {"bias": bias, "dropout_p": dropout_p, "tolerance": tolerance, "return_lse": return_lse}
            out, lse = sdpa_attention(q, k, v, visibility, **arguments)
        elif impl == "reference":
            out, lse = reference_attention(q, k, v, visibility, **arguments, bias=bias, dropout_p=dropout_p)
            lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
        else:
            if bias is not None or dropout_p:
                name = "bias" if bias is not None else f"dropout_p={dropout_p}"
                raise ValueError(f'{name} with impl="{impl}", which has neither: use impl="sdpa" or "auto"')
            arguments |= {"return_lse": return_lse} if impl != "triton" else {}
            arguments |= {"key_norms": key_norms} if impl != "flex" else {}
            out, lse = _reaching(impl, q)(q, k, v, visibility, **arguments, tolerance=tolerance)
    return (out, lse) if return_lse else out  # type: ignore[return-value]  # an LSE that is wanted is there


def choose_impl(
    device: str,
    query_length: int,
    key_length: int,
    *,
    dtype: torch.dtype = torch.float32,
    reaching: bool,
    causal: bool = True,
    dense: bool = False,
    return_lse: bool = False,
    has_key_norms: bool = False,
    learns: bool = False,
    processor: str | None = None,
    cache_width: int = 4096,
) -> Choice:
    """Name the implementation that `attention(impl="auto")` runs, and say why it is that one.

    On the CPU that is "cpu" from the lengths on that were measured for such processors, where there is anything to skip
    or hide, and for the LSE; on GPUs where the Triton kernels were measured, "triton" likewise. Otherwise it is "sdpa",
    as for a dense bias or dropout, which anywhere is what PyTorch maintains for the device and makes no large mask.

    Args:
        device: the type of the device, as in "cpu".
        query_length: Tq.
        key_length: Tk.
        dtype: of q.
        reaching: whether there are slopes, a window, padding or documents.
        causal: whether a query sees only keys at or before its position.
        dense: whether there is a dense bias or dropout.
        return_lse: whether the LSE is wanted.
        has_key_norms: whether the norms of the keys are given.
        learns: whether a gradient is wanted.
        processor: what `longreach.ops.crossovers.processor_of` says of the device, dtype and head_dim. None is this CPU
            where the device is one, and elsewhere a device on which nothing was measured.
        cache_width: B Hkv D, how many numbers the keys of one position are, which counts for few queries.
    """
    if dense:
        return Choice("sdpa", "there is a dense bias or dropout, which nothing else takes")
    if processor is None and device == "cpu":
        processor = ROW
    if processor is None:
        return Choice(
            "sdpa", "PyTorch maintains it for this device, where no kernel of ours was measured on such inputs"
        )
    if not (reaching or return_lse):
        return Choice("sdpa", "there are no slopes, window, padding or documents: nothing can be skipped")
    measured = CROSSOVERS[processor]
    if return_lse and measured.impl == "cpu":
        return Choice("cpu", "the LSE is wanted, which SDPA does not return")
    decoding = surely(query_length < FEW_QUERIES)
    if decoding and not (has_key_norms or measured.unaided):
        return Choice("sdpa", "few queries and no key_norms, and to find the norms is to read half of the cache")
    if decoding and measured.impl == "cpu" and not (causal or surely(query_length == 1)):
        return Choice("sdpa", "few queries that see keys after them, which was not measured")
    if decoding and measured.impl == "cpu" and (learns or dtype == torch.float64):
        return Choice("sdpa", "few queries in float64, or whose gradient is wanted, which was not measured")
    least = measured.least(dtype, decoding=decoding, learns=learns)
    asked = (decoding and measured.decodes_as) or processor
    where = f"at such lengths on {asked} (benchmarks/results/{CROSSOVERS[asked].run})"
    if decoding:
        slower = surely(key_length < least) or surely(key_length * cache_width < measured.least_cached(dtype))
    else:
        slower = surely(query_length * key_length < least**2)
    if slower:
        return Choice("sdpa", f"it was as fast {where}")
    return Choice(measured.impl, f"it was faster {where}")


def _plain_step(q: Any, k: Any, v: Any, slopes: Any, key_norms: Any, scale: Any, impl: Any) -> Tensor | None:
    """The output of a decoding step by native code; None for all that is not surely valid, plain, and best done so.

    Where a cache is short, a step takes less time than the checks of `attention` do. They look at what is refused here,
    and they alone say what is wrong with it.
    """
    if not type(q) is type(k) is type(v) is type(slopes) is Tensor or type(key_norms) not in (Tensor, NoneType):
        return None
    # Whether anyone watches comes first: sizes of what is traced are not to be asked for.
    if is_watched() or not q.is_cpu or q.dim() != 4 or q.size(2) >= FEW_QUERIES:
        return None
    if may_learn(q, k, v, slopes) or not (isinstance(impl, str) and impl in ("auto", "cpu")):
        return None
    if not can_decode() or (step := native.plain_step(q, k, v, slopes, key_norms)) is None:
        return None
    if impl == "auto":
        measured, size = CROSSOVERS[ROW], native.STEP_DTYPES[step.dtype].itemsize
        if step.key_length < measured.decoding[size] or step.cached < measured.cached[size]:
            return None
        if key_norms is None and not measured.unaided:
            return None
    scale = step.head_dim**-0.5 if scale is None else validated_scale(scale)
    return native.run_step(step, q, None, scale, STEP_TOLERANCES[step.dtype])


def uses_key_norms(impl: str, q: Tensor, k: Tensor) -> bool:
    """Whether `attention` would make use of the `key_norms` of k, so that a cache should keep them."""
    query_length = q.shape[2]
    if query_length >= FEW_QUERIES:
        return False
    if impl == "auto":
        impl = choose_impl(
            q.device.type,
            query_length,
            k.shape[2],
            dtype=q.dtype,
            reaching=True,
            has_key_norms=True,
            processor=processor_of(q.device, q.dtype, q.shape[3]),
            cache_width=k.shape[0] * k.shape[1] * k.shape[3],
        ).impl
    return impl in ("cpu", "triton")


def _reaching(impl: str, q: Tensor) -> Callable[..., tuple[Tensor, Any]]:
    """The function of an implementation that skips what is beyond reach, imported when it is first used."""
    if impl == "triton":
        return triton_attention
    if impl == "flex":
        from longreach.ops.flex import flex_alibi_attention

        return flex_alibi_attention
    if q.device.type != "cpu":
        raise ValueError(f'q is on {q.device} with impl="cpu": move it to the CPU, or use another impl')
    return cpu_attention


def _in_forward_mode(impl: str) -> str:
    """What computes where derivatives in forward mode may be wanted: kernels have none, and would leave them out."""
    if impl == "auto":
        return "reference"
    if impl in ("cpu", "triton", "flex"):
        raise ValueError(f'impl="{impl}" in forward mode, whose derivatives it lacks: use impl="auto" or "reference"')
    return impl


def _in_rows(x: Tensor) -> Tensor:
    """x itself, or a copy where rows of neighbouring tokens are one number apart, as `unfold` lays them out.

    An `empty_like` of such a view has its tokens innermost, PyTorch's flash kernel fills that as if it had not.
    """
    if torch.compiler.is_compiling() or x.stride(-1) != 1 or x.shape[-1] == 1:
        return x
    one_apart = any(step == 1 and count > 1 for step, count in zip(x.stride()[:-1], x.shape[:-1], strict=True))
    return x.contiguous() if one_apart else x


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v, but neither slopes nor bias, as torch.autocast casts SDPA's arguments."""
    if autocasts(q.device):
        dtype = torch.get_autocast_dtype(q.device.type)
        return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))  # type: ignore[return-value]
    return q, k, v


def _validate_key_norms(key_norms: Tensor, k: Tensor, impl: str) -> None:
    validate_types(key_norms=key_norms)
    batch, num_kv_heads, key_length, _ = k.shape
    expected = (batch, num_kv_heads, -(-key_length // KEY_BLOCK))
    if key_norms.shape != expected or not key_norms.is_floating_point():
        raise ValueError(
            f"key_norms of shape {tuple(key_norms.shape)} and {key_norms.dtype}: give a floating-point tensor "
            f"(B, Hkv, ceil(Tk / {KEY_BLOCK})) = {expected}"
        )
    validate_same_device("key_norms", key_norms, k)
    if impl not in ("auto", "cpu", "triton"):
        raise ValueError(f'key_norms with impl="{impl}", which makes no use of them: use "cpu", "triton" or "auto"')
