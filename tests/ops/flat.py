"""Implementations under the flat signature of `longreach.attention`, so that tests call them all alike."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

import longreach.ops.cpu.native as native
from longreach.ops.cpu.operators import cpu_attention as cpu
from longreach.ops.flex import flex_alibi_attention as flex
from longreach.ops.near_reach import near_ranges as near
from longreach.ops.reach import key_ranges as ranges
from longreach.ops.reference import reference_attention as reference
from longreach.ops.sdpa import sdpa_attention as sdpa
from longreach.ops.triton.operators import triton_attention as triton
from longreach.ops.visibility import Visibility

MASKS = ("causal", "window_size", "key_padding_mask", "cu_seqlens")


def visibility_of(q: Tensor, k: Tensor, options: dict[str, Any]) -> Visibility:
    """Who sees whom by the masks among the options."""
    return Visibility(q.shape[2], k.shape[2], **{name: options[name] for name in MASKS if name in options})


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of tensors and a visibility as one of tensors and masks."""

    @wraps(function)
    def call(q: Tensor, k: Tensor, *tensors: Any, **options: Any) -> Any:
        others = {name: option for name, option in options.items() if name not in MASKS}
        return function(q, k, *tensors, visibility_of(q, k, options), **others)

    return call


reference_attention = flat(reference)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The output alone."""
    return flat(sdpa)(q, k, v, **options)[0]


cpu_attention = flat(cpu)
triton_attention = flat(triton)
flex_alibi_attention = flat(flex)


def key_ranges(q: Tensor, k: Tensor, slopes: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """`longreach.ops.reach.key_ranges` likewise."""
    return flat(ranges)(q, k, slopes, **options)


def near_ranges(q: Tensor, k: Tensor, slopes: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """`longreach.ops.near_reach.near_ranges` likewise."""
    return flat(near)(q, k, slopes, **options)


def native_near_ranges(q: Tensor, k: Tensor, slopes: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`longreach.ops.cpu.native.near_ranges` likewise."""
    pair = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    return flat(native.near_ranges)(q, k, pair, **options)
