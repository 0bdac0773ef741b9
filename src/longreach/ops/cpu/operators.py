"""Attention on the CPU as operators of torch.library: one path for compiled, exported and transformed programs.

So do eager ones where a gradient may be wanted; else they call what the operator does. Operators are opaque to tracing,
for `passes` plans its work from values, and come with shapes and derivatives.
"""

from typing import Any

import torch
from torch import Tensor

from longreach.ops.cpu.passes import Kept, attend, differentiate, laid_out_as
from longreach.ops.cpu.plan import BLOCK_M
from longreach.ops.reach import default_tolerance
from longreach.ops.transforms import differentiable, is_watched, may_learn, without_autocast
from longreach.ops.visibility import Visibility


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    slopes: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tolerance: float | None = None,
    key_norms: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Output and, where wanted, LSE of `longreach.attention`, which documents and validates the arguments, by `passes`.

    Differentiable in q, k, v and the slopes. Reads only the keys that `longreach.reach` says each block of queries
    needs, so that time grows linearly with length once length passes the reach. Padding at the ends costs nothing,
    documents are computed by themselves. The LSE (B, H, Tq) is float32, or float64 if q is.
    """
    left, right = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tolerance = default_tolerance(q.dtype) if tolerance is None else tolerance
    learns = may_learn(q, k, v, left, right)
    masks = (visibility.key_padding_mask, visibility.cu_seqlens)
    bounds = (scale, visibility.causal, visibility.window_size, tolerance)
    if not (learns or is_watched() or _have_no_memory(q, k, v)):
        # To call an operator takes as long as several decoding steps.
        options: dict[str, Any] = {"scale": scale, "tolerance": tolerance, "learns": False, "return_lse": return_lse}
        return attend(q, k, v, _slopes(q, left, right), visibility, key_norms, **options)[:2]
    function = _attend if learns else _forward
    out, lse, *_ = function(q, k, v, left, right, *masks, *bounds, key_norms, learns)
    return out, lse


def _have_no_memory(*tensors: Tensor) -> bool:
    """Whether some are tensors in name, which operators alone make some of."""
    return any(type(x) is not Tensor or x._is_zerotensor() for x in tensors)


@torch.library.custom_op("longreach::cpu_forward", mutates_args=())
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
    key_norms: Tensor | None,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    visibility = Visibility(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens)
    options: dict[str, Any] = {"scale": scale, "tolerance": tolerance, "learns": learns, "return_lse": True}
    out, lse, kept = attend(q, k, v, _slopes(q, left, right), visibility, key_norms, **options)
    assert lse is not None, "it was asked for"
    out = laid_out_as(q, out)  # as is promised below
    if kept is None:
        empty, no_blocks = lse.new_empty(0), q.new_empty(0, dtype=torch.int32)
        return out, lse, empty, empty.clone(), no_blocks, no_blocks.clone(), q.new_zeros((), dtype=torch.int8)
    return out, lse, *kept


@_forward.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    learns = others[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse, peak, total = (
        q.new_empty(shape, dtype=dtype) for shape in (q.shape[:3], *(q.shape[:3] if learns else (0,),) * 2)
    )
    blocks = (*q.shape[:2], (q.shape[2] + BLOCK_M - 1) // BLOCK_M) if learns else (0,)
    low, high = (q.new_empty(blocks, dtype=torch.int32) for _ in range(2))
    return torch.empty_like(q), lse, peak, total, low, high, q.new_empty((), dtype=torch.int8)


@torch.library.custom_op("longreach::cpu_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    peak: Tensor,
    total: Tensor,
    low: Tensor,
    high: Tensor,
    means: Tensor,
    scale: float,
    causal: bool,
    window_size: int | None,
    slopes_learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    visibility = Visibility(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens)
    attended = out, lse, Kept(peak, total, low, high, means)
    inputs = q, k, v, _slopes(q, left, right)
    with without_autocast(q.device):  # in force where the backward pass is called, unlike the forward pass
        gradients = differentiate(
            grad_out, grad_lse, *inputs, visibility, attended, scale=scale, slopes_learn=slopes_learn
        )
    dq, dk, dv, *of_slopes = gradients
    dleft, dright = of_slopes if slopes_learn else (q.new_empty(0), q.new_empty(0))
    return dq, dk, dv, dleft, dright


@_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    learned = (left, right) if others[-1] else (None, None)
    dleft, dright = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in learned)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dleft, dright


def _slopes(q: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    if left is None or right is None:
        left = right = q.new_zeros(q.shape[1], dtype=torch.float32)
    return left, right


_attend = differentiable(_forward, _backward)
