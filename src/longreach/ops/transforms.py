"""Operators of torch.library inside of autograd, torch.func and torch.compile: rules that those of attention share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.amp import is_autocast_available
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from longreach.ops.reference import reference_attention
from longreach.ops.visibility import Visibility

_UNCHANGED = nullcontext()


def by_slices(operator: Any) -> None:
    """Let an operator whose outputs are all tensors be mapped by vmap, as one call for each of the mapped slices."""

    def mapped(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError("torch.vmap over 0 slices of q, k or v: give at least one")
        calls = [
            operator(*(x if axis is None else x.select(axis, n) for x, axis in zip(arguments, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
        return stacked, (0,) * len(stacked)

    operator.register_vmap(mapped)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Computation in the dtypes given. To turn off what is off takes longer than a decoding step's other checks."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else _UNCHANGED


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is at work on such devices."""
    if not _is_any_autocast_enabled():
        return False
    return is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)  # "meta", for one, has none


def is_watched() -> bool:
    """Whether a compiler, a tracer, a counter, autocast, torch.func or forward mode looks at every operator."""
    return (
        is_dynamo_compiling()
        or _is_tracing()
        or _len_torch_dispatch_stack() > 0
        or _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)
        or _is_any_autocast_enabled()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def may_learn(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be wanted of any: wrappers of torch.func hide it; torch.compile sees through them."""
    if not is_grad_enabled():
        return False
    transformed = not is_compiling() and _are_functorch_transforms_active()
    return transformed or any(x is not None and x.requires_grad for x in tensors)


def differentiable(operator: Any, backward_operator: Any, lse_unit: float = 1.0) -> Callable[..., tuple[Tensor, ...]]:
    """Give an operator its gradients by another one, second derivatives by the dense definition, and both to vmap.

    Nothing that is saved would help second derivatives, so that they take the memory of dense attention.

    Args:
        operator: takes (q, k, v, left, right, key_padding_mask, cu_seqlens, scale, causal, window_size, ...) as in
            `longreach.attention`, the slopes apart, and returns (out, lse, ...), the rest of which has no gradient.
        backward_operator: takes gradients of out and LSE, the first seven of those arguments, all that `operator`
            returned, scale, causal, window_size, and whether slopes learn; returns gradients of q, k, v, left, right.
        lse_unit: what an LSE of 1 is in nats.

    Returns:
        The function to call in place of `operator` where a gradient may be wanted.
    """

    class Attention(torch.autograd.Function):
        """The forward operator and its gradients."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[2:])
            ctx.save_for_backward(*inputs[:7], *output)
            ctx.bounds, ctx.count = inputs[7:10], len(inputs)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            slopes_learn = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
            q, k, v, left, right, *others = ctx.saved_tensors
            fixed = (*others, *ctx.bounds, slopes_learn)
            found = Gradients.apply(grad_out, grad_lse, q, k, v, left, right, fixed)
            return *found[: 5 if slopes_learn else 3], *(None,) * (ctx.count - (5 if slopes_learn else 3))

    class Gradients(torch.autograd.Function):
        """The backward operator, and second derivatives."""

        generate_vmap_rule = True

        @staticmethod
        def forward(  # torch.compile counts its arguments
            grad_out: Tensor,
            grad_lse: Tensor,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            left: Tensor | None,
            right: Tensor | None,
            fixed: tuple[Any, ...],
        ) -> tuple[Tensor, ...]:
            return backward_operator(grad_out, grad_lse, q, k, v, left, right, *fixed)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            *factors, fixed = inputs
            ctx.save_for_backward(*factors, *fixed[:2])
            *ctx.bounds, ctx.slopes_learn = fixed[-4:]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            *factors, key_padding_mask, cu_seqlens = ctx.saved_tensors  # grad_out, grad_lse, q, k, v, left, right
            scale, causal, window_size = ctx.bounds

            def gradients(grad_out: Tensor, grad_lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
                def dense(q: Tensor, k: Tensor, v: Tensor, *pair: Any) -> tuple[Tensor, Tensor]:
                    visibility = Visibility(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens)
                    out, lse = reference_attention(q, k, v, visibility, slopes=pair or None, scale=scale)
                    return out, lse.to(grad_lse.dtype) / lse_unit

                return torch.func.vjp(dense, *inputs)[1]((grad_out, grad_lse))[: len(wanted)]

            given = [n for n, x in enumerate(factors) if x is not None]
            wanted = grads[: 5 if ctx.slopes_learn else 3]
            found: list[Tensor | None] = [None] * 8
            second = torch.func.vjp(gradients, *(factors[n] for n in given))[1]
            for n, gradient in zip(given, second(wanted), strict=True):
                found[n] = gradient
            return tuple(found)

    by_slices(operator)
    by_slices(backward_operator)
    operator.register_autograd(Attention.backward, setup_context=Attention.setup_context)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        # torch.compile takes the operator for what it is, and torch.func needs a Function with a setup_context.
        return (operator if is_compiling() else Attention.apply)(*arguments)

    return call
