"""Attention on the CPU as operators of torch.library, with shapes for tracing and formulas for autograd.

torch.compile takes each operator as one opaque node: `products` plans its work from values, which cannot be traced.
"""

from typing import Any

import torch
from torch import Tensor

from longreach.ops.cpu.products import cpu_attention
from longreach.ops.visibility import Visibility


def compiled_cpu_attention(
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
    """`cpu_attention` as one node of a graph: it plans its work from values, which cannot be traced.

    A node's outputs are all that its backward pass knows, so that one computes the forward pass once more.
    """
    pair = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    bounds = (scale, visibility.causal, visibility.window_size, tolerance)
    return _cpu_forward(q, k, v, *pair, visibility.key_padding_mask, visibility.cu_seqlens, key_norms, *bounds)


@torch.library.custom_op("longreach::cpu_forward", mutates_args=())
def _cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_norms: Tensor | None,
    scale: float | None,
    causal: bool,
    window_size: int | None,
    tolerance: float | None,
) -> tuple[Tensor, Tensor]:
    bounds = (scale, causal, window_size, tolerance)
    return _run_on_cpu(q, k, v, left, right, key_padding_mask, cu_seqlens, key_norms, *bounds)


def _run_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_norms: Tensor | None,
    scale: float | None,
    causal: bool,
    window_size: int | None,
    tolerance: float | None,
) -> tuple[Tensor, Tensor]:
    return cpu_attention(
        q,
        k,
        v,
        Visibility(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens),
        slopes=None if left is None or right is None else (left, right),
        scale=scale,
        tolerance=tolerance,
        key_norms=key_norms,
    )


@_cpu_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("longreach::cpu_backward", mutates_args=())
def _cpu_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_norms: Tensor | None,
    scale: float | None,
    causal: bool,
    window_size: int | None,
    tolerance: float | None,
    slopes_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    left, right = (None if x is None else x.detach().requires_grad_(slopes_gradient) for x in (left, right))
    bounds = (scale, causal, window_size, tolerance)
    with torch.enable_grad():
        outputs = _run_on_cpu(q, k, v, left, right, key_padding_mask, cu_seqlens, key_norms, *bounds)
    wanted = [q, k, v, *(x for x in (left, right) if slopes_gradient and x is not None)]
    gradients = torch.autograd.grad(outputs, wanted, (grad_out, grad_lse), allow_unused=True)
    found = [x.new_zeros(x.shape) if g is None else g.contiguous() for x, g in zip(wanted, gradients, strict=True)]
    found += [q.new_empty(0) for _ in range(5 - len(found))]
    return tuple(found)  # type: ignore[return-value]


@_cpu_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    learned = (left, right) if others[-1] else (None, None)
    dleft, dright = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in learned)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dleft, dright


def _cpu_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.bounds = inputs[8:]


def _cpu_differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    slopes_gradient = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    dq, dk, dv, dleft, dright = _cpu_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.bounds, slopes_gradient)
    slopes = (dleft, dright) if slopes_gradient else (None, None)
    return dq, dk, dv, *slopes, *(None,) * 7


_cpu_forward.register_autograd(_cpu_differentiate, setup_context=_cpu_save)
