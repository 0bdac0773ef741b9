"""What public functions demand of their arguments, said in one line where they are wrong."""

import math
import operator
import os
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from longreach.ops.visibility import Visibility

_SHOWN = 100
"""The most characters of a refused value that an error repeats."""

_LARGEST = 2**63
"""Numbers below fit the 64 bits of integers in tensors."""

_WIDEST_WINDOW = 2**62
"""A larger one hides no more, and added to a position it would be no integer of 64 bits."""

_FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
"""Dtypes of q, k and v."""

_NUMBERS = (float, int, Real, torch.SymInt, torch.SymFloat)
"""What is a real number; what is most often given comes first, for whether it is a Real takes ten times as long."""


def shown(value: object) -> str:
    """A refused value in one line, however large it is."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def validate_types(**arguments: object) -> None:
    """Tensors whose numbers are all there."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} of {type(x).__name__}: give a tensor")
        if x.layout is not torch.strided or x.is_nested:
            raise ValueError(f"{name} of {'nested tensors' if x.is_nested else x.layout}: give a dense tensor")


def validate_flags(**arguments: object) -> None:
    """True or False: any text is true, also "no"."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={shown(value)}: give True or False")


def validate_integer(name: str, value: Any, least: int, mend: str = "") -> int:
    """An int of at least `least`, whatever integer type it has: NumPy's are none of Python's, and True is no number."""
    number = None if isinstance(value, bool) else value
    if number is not None and not isinstance(number, int | torch.SymInt):  # what is traced must stay what it is
        try:
            number = operator.index(number)
        except (TypeError, RuntimeError):  # of tensors that hold no integer, or on a device without values
            number = None
    if number is None or not least <= number < _LARGEST:
        raise ValueError(f"{name}={shown(value)}: give {mend or f'an integer of at least {least}'}")
    return number  # type: ignore[return-value]  # a traced length serves as an int


def validate_kind(name: str, value: object, kind: Any, mend: str) -> None:
    """An instance of a class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={shown(value)}: give {mend}")


def validate_path(name: str, value: object) -> None:
    """A path, or text that may be one."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{name}={shown(value)}: give a path")


def validate_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)}: give one of {', '.join(choices)}")


def validate_device(device: Any) -> None:
    """None, or a device that is here."""
    if device is None or torch.compiler.is_compiling():
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device={shown(device)} is not to be had here ({reason}): give another") from error


def is_number(value: object) -> bool:
    """Whether a value is a real number, as NumPy's are, and neither a truth value nor a tensor."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def validate_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, H, Tq, D), k and v (B, Hkv, Tk, D), alike in dtype and device."""
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: give (B, H, T, D)")
        if x.dtype not in _FLOATS:
            raise ValueError(f"{name} of {x.dtype}: give float64, float32, bfloat16 or float16")
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {dtype} on {device}: give them alike")
    batch, num_heads, _, head_dim = q.shape
    of_k = k.shape
    k_batch, num_kv_heads, _, k_head_dim = of_k
    if k_batch != batch or k_head_dim != head_dim:
        raise ValueError(f"k of shape {tuple(of_k)}: B and D must be those of q, {tuple(q.shape)}")
    if v.shape != of_k:
        raise ValueError(f"v of shape {tuple(v.shape)}: give the shape of k, {tuple(of_k)}")
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"k has {num_kv_heads} heads, q has {num_heads}: Hkv must divide H")
    if head_dim == 0:
        raise ValueError("q has head_dim D=0: give at least 1")


def validate_slopes(slopes: Tensor | tuple[Tensor, Tensor] | None, q: Tensor, least: float = 0.0) -> None:
    """(H,) or (B, H) floating point of at least `least`, or a pair of such."""
    if slopes is None:
        return
    batch, num_heads, *_ = q.shape
    if isinstance(slopes, tuple) and len(slopes) != 2:
        raise ValueError(f"slopes is a tuple of {len(slopes)}: give one tensor, or the pair (left, right)")
    for side in slopes if isinstance(slopes, tuple) else (slopes,):
        if not isinstance(side, Tensor):
            raise ValueError(f"slopes of {type(side).__name__}: give one tensor, or the pair (left, right) of two")
        validate_types(slopes=side)
        if side.shape not in ((num_heads,), (batch, num_heads)):
            expected = f"({num_heads},) or ({batch}, {num_heads})"
            raise ValueError(f"slopes of shape {tuple(side.shape)}: give (H,) or (B, H), here {expected}")
        _validate_float("slopes", side, q)
        validate_values("slopes", side, least)


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
    validate_flags(causal=causal)
    batch, query_length, key_length = q.shape[0], q.shape[2], k.shape[2]
    if key_padding_mask is not None:
        validate_types(key_padding_mask=key_padding_mask)
        if tuple(key_padding_mask.shape) != (batch, key_length) or key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"key_padding_mask of shape {tuple(key_padding_mask.shape)} and {key_padding_mask.dtype}: "
                f"give (B, Tk) = ({batch}, {key_length}) bool, True where a key is padding"
            )
        validate_same_device("key_padding_mask", key_padding_mask, q)
    if cu_seqlens is not None:
        if query_length != key_length:
            raise ValueError(f"cu_seqlens with Tq={query_length} and Tk={key_length}: packed documents need Tq = Tk")
        validate_documents(cu_seqlens, q, key_length)
    if window_size is not None:
        window_size = validate_integer("window_size", window_size, 1, "an integer of at least 1, or None for no window")
        window_size = min(window_size, _WIDEST_WINDOW)
    return Visibility(query_length, key_length, causal, window_size, key_padding_mask, cu_seqlens)


def validate_documents(cu_seqlens: Tensor, q: Tensor, length: int | None = None) -> None:
    """Borders (N + 1,) of documents, over so many tokens where that is known; values only the CPU reads."""
    validate_types(cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens of shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}: give (N + 1,) int32 or int64"
        )
    validate_same_device("cu_seqlens", cu_seqlens, q)
    if length is not None and can_be_read(cu_seqlens):
        validate_borders(cu_seqlens.tolist(), length)


def validated_scale(scale: Any) -> float | None:
    """Positive and finite: what `reach` says of the largest scores would be said of the smallest below 0."""
    if scale is not None and not (is_number(scale) and 0 < scale < _LARGEST):
        raise ValueError(f"scale={shown(scale)}: give a positive number, or None for D**-0.5")
    return None if scale is None else _as_float(scale)


def validated_tolerance(tolerance: Any) -> float | None:
    """A probability mass that leaves something."""
    if tolerance is not None and not (is_number(tolerance) and 0.0 <= tolerance < 1.0):
        mend = "give at least 0 and below 1, or None for the default of the dtype"
        raise ValueError(f"tolerance={shown(tolerance)}: {mend}")
    return None if tolerance is None else _as_float(tolerance)


def validated_dropout(dropout_p: Any) -> float:
    """A probability that leaves something."""
    if not (is_number(dropout_p) and 0.0 <= dropout_p < 1.0):
        raise ValueError(f"dropout_p={shown(dropout_p)}: give at least 0 and below 1")
    return _as_float(dropout_p)


def _as_float(number: Any) -> float:
    """What operators take: they know no fractions. What is traced must stay what it is."""
    return number if isinstance(number, torch.SymInt | torch.SymFloat) else float(number)  # type: ignore[return-value]


def can_be_read(x: Tensor) -> bool:
    """Whether values can be looked at: elsewhere the host would wait for the device, and what is traced has none."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def validate_values(name: str, x: Tensor, least: float = -math.inf) -> None:
    """Finite and at least `least`, where values can be looked at."""
    if can_be_read(x):
        # Few, for which operations on tensors would take longer.
        values = x.tolist() if x.dim() == 1 else x.flatten().tolist()
        if not all(map(math.isfinite, values)) or min(values, default=least) < least:
            wrong = next(value for value in values if not (math.isfinite(value) and value >= least))
            mend = f"give finite numbers{'' if least < 0 else f' of at least {least:g}'}"
            raise ValueError(f"{name} holds {wrong:g}: {mend}")


def validate_borders(borders: Sequence[int], length: int) -> None:
    """Values of borders: ascending, from 0 to length."""
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
    validate_same_device(name, x, q)


def validate_same_device(name: str, x: Tensor, q: Tensor) -> None:
    """Where q is."""
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q is on {q.device}: move it there")
