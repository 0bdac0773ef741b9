"""What `longreach.attention` and `longreach.reach` demand of their arguments, said in one line where they are wrong."""

import math
import operator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longreach.ops.visibility import Visibility


def validate_types(**arguments: object) -> None:
    """Tensors."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} of {type(x).__name__}: give a tensor")


def validate_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, H, Tq, D), k and v (B, Hkv, Tk, D), alike in dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: give (B, H, T, D)")
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} of {x.dtype}: give float64, float32, bfloat16 or float16")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: give them alike")
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k of shape {tuple(k.shape)}: B and D must be those of q, {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v of shape {tuple(v.shape)}: give the shape of k, {tuple(k.shape)}")
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"k has {num_kv_heads} heads, q has {num_heads}: Hkv must divide H")
    if head_dim == 0:
        raise ValueError("q has head_dim D=0: give at least 1")


def validate_slopes(slopes: Tensor | tuple[Tensor, Tensor] | None, q: Tensor) -> None:
    """(H,) or (B, H) floating point, or a pair of such."""
    batch, num_heads = q.shape[:2]
    if isinstance(slopes, tuple) and len(slopes) != 2:
        raise ValueError(f"slopes is a tuple of {len(slopes)}: give one tensor, or the pair (left, right)")
    for side in () if slopes is None else slopes if isinstance(slopes, tuple) else (slopes,):
        if not isinstance(side, Tensor):
            raise ValueError(f"slopes of {type(side).__name__}: give one tensor, or the pair (left, right) of two")
        if tuple(side.shape) not in ((num_heads,), (batch, num_heads)):
            expected = f"({num_heads},) or ({batch}, {num_heads})"
            raise ValueError(f"slopes of shape {tuple(side.shape)}: give (H,) or (B, H), here {expected}")
        _validate_float("slopes", side, q)


def validate_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Floating point, broadcastable to (B, H, Tq, Tk)."""
    if bias is None:
        return
    validate_types(bias=bias)
    target = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(shape) != 4 or any(b not in (1, t) for b, t in zip(shape, target, strict=True)):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: give one broadcastable to (B, H, Tq, Tk) = {target}")
    _validate_float("bias", bias, q)


def validated_visibility(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window_size: Any,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Visibility:
    """A window of at least 1, a bool mask (B, Tk), borders of documents (N + 1,), whose values only the CPU reads."""
    batch, query_length, key_length = q.shape[0], q.shape[2], k.shape[2]
    if key_padding_mask is not None:
        validate_types(key_padding_mask=key_padding_mask)
        if tuple(key_padding_mask.shape) != (batch, key_length) or key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"key_padding_mask of shape {tuple(key_padding_mask.shape)} and {key_padding_mask.dtype}: "
                f"give (B, Tk) = ({batch}, {key_length}) bool, True where a key is padding"
            )
        _validate_device("key_padding_mask", key_padding_mask, q)
    if cu_seqlens is not None:
        validate_types(cu_seqlens=cu_seqlens)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens of shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}: give (N + 1,) int32 or int64"
            )
        if query_length != key_length:
            raise ValueError(f"cu_seqlens with Tq={query_length} and Tk={key_length}: packed documents need Tq = Tk")
        _validate_device("cu_seqlens", cu_seqlens, q)
        # Elsewhere the host would wait for the device. What is traced has no values yet, nor has a fake tensor.
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu_seqlens) is Tensor:
            _validate_borders(cu_seqlens.tolist(), key_length)
    return Visibility(query_length, key_length, causal, _window_as_int(window_size), key_padding_mask, cu_seqlens)


def validate_scale(scale: float | None) -> None:
    """Positive and finite: what `reach` says of the largest scores would be said of the smallest below 0."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale!r}: give a positive number, or None for D**-0.5")


def validate_tolerance(tolerance: float | None) -> None:
    """A probability mass that leaves something."""
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance={tolerance!r}: give at least 0 and below 1, or None for the default of the dtype")


def _window_as_int(window_size: Any) -> int | None:
    """The window as an int, whatever integer type it has: NumPy's are none of Python's, and True is no number."""
    window = None if isinstance(window_size, bool) else window_size
    if window is not None and not isinstance(window, int):  # which a length under tracing is, and must stay
        try:
            window = operator.index(window)
        except TypeError:
            window = None
    if window_size is not None and (window is None or window < 1):
        raise ValueError(f"window_size={window_size!r}: give an integer of at least 1, or None for no window")
    return window


def _validate_borders(borders: list[int], length: int) -> None:
    if borders[0] != 0:
        raise ValueError(f"cu_seqlens begins with {borders[0]}: give [0, ..., T], the border before the first token")
    if borders[-1] != length:
        raise ValueError(f"cu_seqlens ends with {borders[-1]}: give [0, ..., T], here T={length}")
    for before, after in pairwise(borders):
        if after < before:
            raise ValueError(f"cu_seqlens falls from {before} to {after}: give borders that ascend, [0, ..., T]")


def _validate_float(name: str, x: Tensor, q: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} of {x.dtype}: give floating point, float32 unless there is a reason")
    _validate_device(name, x, q)


def _validate_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q is on {q.device}: move it there")
