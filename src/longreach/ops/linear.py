"""x W^T + b as `torch.nn.functional.linear` has it, with its gradients, on the CPU by whoever multiplies faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach.ops.cpu import onednn
from longreach.ops.transforms import is_watched

LEAST_WORK = 2**24
"""Multiplications from which on oneDNN is asked: below, what Python does about it takes as long as is gained."""

LEAST_SIDE = 128
"""Inputs and outputs from which on: at 64 MKL is as fast."""


class Linear(nn.Linear):
    """A linear layer as torch has it, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., N), of x (..., K), W (N, K) and b (N,), alike in dtype and device.

    By oneDNN where that is faster, and nobody watches who knows its operators less.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not onednn.IS_FAST or is_watched() or not all(map(_is_plain, tensors)):
        return F.linear(x, weight, bias)
    if x.dim() < 2 or min(weight.shape) < LEAST_SIDE or x.numel() * len(weight) < LEAST_WORK:
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2).contiguous()
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        out: Tensor = _Linear.apply(rows, weight, bias)
    else:
        out = onednn.product(rows, weight, bias)
    return out.unflatten(0, x.shape[:-1])


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is what it seems: no fake one, none of many ranks, in float32 on the CPU."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32


class _Linear(torch.autograd.Function):
    """Products of two dimensions; second derivatives are those of the products in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        of_x = linear(grad, weight.t()) if wants_x else None
        of_weight = linear(grad.t(), x.t()) if wants_weight else None
        return of_x, of_weight, grad.sum(dim=0) if wants_bias else None
