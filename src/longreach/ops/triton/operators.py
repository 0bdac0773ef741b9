"""The Triton kernels as operators of torch.library, with shapes for tracing and formulas for autograd.

torch.compile takes each operator as one opaque node, so that it neither breaks the graph nor looks inside at sizes
that only the kernels care about. Nothing here imports triton until an operator runs on real tensors.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from longreach.ops.reach import default_tolerance, key_ranges
from longreach.ops.transforms import by_slices, differentiable, may_learn
from longreach.ops.triton.plans import (
    COMMON_HEAD_DIM,
    DECODE_ROWS,
    MAX_HEAD_DIM,
    REACH_M,
    REACH_N,
    empty_output,
)
from longreach.ops.visibility import Visibility

MEASURED_CAPABILITIES = ((9, 0),)
"""Compute capabilities of the GPUs that benchmarks/results holds times of."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def triton_was_measured(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels run here and were timed on such GPUs, by benchmarks/results: so far on Hopper alone."""
    if device.type != "cuda" or torch.version.cuda is None or not _HAS_TRITON:
        return False
    if dtype == torch.float64 or head_dim > COMMON_HEAD_DIM:
        return False
    properties = torch.cuda.get_device_properties(device.index)  # which torch.compile takes as a constant
    return (properties.major, properties.minor) in MEASURED_CAPABILITIES


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    slopes: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tolerance: float | None = None,
    key_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of `longreach.attention`, which documents and validates the arguments, by Triton kernels.

    Only keys within reach are read, the rest holds at most `tolerance` of each row's probability mass. Few queries
    without a gradient are decoded: their keys are split among programs. Forward and backward are deterministic. What k
    and v hold where a key is padding is never read. The LSE is natural, (B, H, Tq) float32; both carry gradients.

    Raises:
        ValueError: a dtype, head_dim or device that the kernels do not take, or Triton is not installed.
    """
    batch, num_heads, query_length, head_dim = q.shape
    if not _HAS_TRITON:
        raise ValueError('impl="triton" needs Triton: pip install triton, or choose another impl')
    if q.dtype == torch.float64:
        raise ValueError('q of float64 with impl="triton": give float32, bfloat16 or float16, or another impl')
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f'q has head_dim D={head_dim} with impl="triton": give at most {MAX_HEAD_DIM}, or another impl'
        )
    left = right = None
    if slopes is not None:
        pair = slopes if isinstance(slopes, tuple) else (slopes,)
        left, right = (2 * [side.to(torch.float32).expand(batch, num_heads).contiguous() for side in pair])[:2]
    scale = head_dim**-0.5 if scale is None else scale
    tolerance = default_tolerance(q.dtype) if tolerance is None else tolerance
    bounds = (scale, visibility.causal, visibility.window_size, tolerance)
    key_padding_mask, cu_seqlens = visibility.key_padding_mask, visibility.cu_seqlens
    few = num_heads // k.shape[1] * query_length <= DECODE_ROWS
    learns = may_learn(q, k, v, left, right)
    if few and not learns and cu_seqlens is None:
        return _decode(q, k, v, left, right, key_padding_mask, key_norms, *bounds)
    function = _attend if learns else _forward
    out, log2_lse, *_ = function(q, k, v, left, right, key_padding_mask, cu_seqlens, *bounds)
    return out, log2_lse * math.log(2.0)


def _key_ranges(
    q: Tensor,
    k: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_norms: Tensor | None,
    scale: float,
    causal: bool,
    window_size: int | None,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """`key_ranges` by kernels, or where keys may be padding by tensor operations."""
    from longreach.ops.triton import launch, ranges

    blocks = {"block_m": REACH_M, "block_n": REACH_N}
    if key_padding_mask is None:
        return ranges.key_ranges(
            q,
            k,
            left,
            right,
            cu_seqlens,
            key_norms,
            scale=scale,
            causal=causal,
            window_size=window_size,
            tolerance=tolerance,
            **blocks,
            tiles=launch.plan(q).bound,
        )
    return key_ranges(
        q,
        k,
        None if left is None or right is None else (left, right),
        Visibility(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens),
        scale=scale,
        tolerance=tolerance,
        **blocks,
        key_norms=key_norms,
    )


@torch.library.custom_op("longreach::triton_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window_size: int | None,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from longreach.ops.triton import launch

    masks = (left, right, key_padding_mask, cu_seqlens)
    starts, ends = _key_ranges(q, k, *masks, None, scale, causal, window_size, tolerance)
    order = launch.work_order(starts, ends)
    out, log2_lse = launch.forward(
        q, k, v, *masks, starts, ends, order, scale=scale, causal=causal, window_size=window_size
    )
    return out, log2_lse, starts, ends, order


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, query_length = q.shape[:3]
    shape = (batch, num_heads, (query_length + REACH_M - 1) // REACH_M)
    starts, ends = (q.new_empty(shape, dtype=torch.int32) for _ in range(2))
    order = q.new_empty(batch * num_heads, dtype=torch.int32)
    return empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32), starts, ends, order


@torch.library.custom_op("longreach::triton_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    key_norms: Tensor | None,
    scale: float,
    causal: bool,
    window_size: int | None,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    from longreach.ops.triton import launch

    slopes = (left, right)
    ranges = _key_ranges(q, k, *slopes, key_padding_mask, None, key_norms, scale, causal, window_size, tolerance)
    return launch.decode(
        q, k, v, *slopes, key_padding_mask, *ranges, scale=scale, causal=causal, window_size=window_size
    )


@_decode.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("longreach::triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_log2_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    log2_lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    order: Tensor,
    scale: float,
    causal: bool,
    window_size: int | None,
    slopes_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from longreach.ops.triton import launch

    saved = (q, k, v, left, right, key_padding_mask, cu_seqlens, starts, ends, order, out, log2_lse)
    return launch.backward(
        grad_out,
        grad_log2_lse,
        *saved,
        scale=scale,
        causal=causal,
        window_size=window_size,
        slopes_gradient=slopes_gradient,
    )


@_backward.register_fake
def _(
    grad_out: Tensor, grad_log2_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slopes_gradient = others[-1]
    shape = q.shape[:2] if slopes_gradient else (0,)
    dleft, dright = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return empty_output(q), empty_output(k), empty_output(v), dleft, dright


by_slices(_decode)
_attend = differentiable(_forward, _backward, lse_unit=math.log(2.0))
