"""The Triton kernels as operators of torch.library: what tracing and autograd know of them."""

from functools import partial
from typing import Any

import pytest
import torch
from flat import reference_attention, triton_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from triton_interpreter import DEVICE

from longreach.ops.triton.plans import DECODE_ROWS, REACH_M

OPERATORS = torch.ops.longreach


def tensors(query_length: int, key_length: int, *, heads: tuple[int, int] = (2, 1), batch: int = 1) -> list[Tensor]:
    """q, k, v and slopes, all with gradients."""
    torch.manual_seed(0)
    shapes = [(batch, heads[0], query_length, 16), *[(batch, heads[1], key_length, 16)] * 2, (heads[0],)]
    return [torch.rand(shape, device=DEVICE).requires_grad_() for shape in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    return triton_attention(q, k, v, slopes=slopes)


def operator_arguments(**options: Any) -> dict[str, tuple[Any, ...]]:
    """Arguments for each operator, such as one attention call would give them."""
    q, k, v, slopes = tensors(20, 30)
    left = right = slopes.detach()[None]
    padding = (torch.arange(30, device=DEVICE) < 4)[None]
    bounds = (0.25, True, options.get("window_size"))
    out, lse, *ranges = OPERATORS.triton_forward(q, k, v, left, right, padding, None, *bounds, 1e-6)
    grads = torch.ones_like(out), torch.ones_like(lse)
    x = [t.detach() for t in (q, k, v)]
    saved = (left, right, padding, None, out.detach(), lse.detach(), *ranges)
    return {
        "triton_forward": (q, k, v, left.clone().requires_grad_(), right, padding, None, *bounds, 1e-6),
        "triton_decode": (*x, left, right, padding, None, *bounds, 1e-6),
        "triton_backward": (*grads, *x, *saved, *bounds, True),
    }


@pytest.mark.parametrize("name", ["triton_forward", "triton_decode", "triton_backward"])
def test_operators_keep_the_rules_of_torch_library(name: str) -> None:
    """Schema, aliasing, fake tensors, autograd registration and tracing with dynamic shapes, by torch's own checks."""
    operator = getattr(OPERATORS, name).default
    results = torch.library.opcheck(operator, operator_arguments(window_size=9)[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["BHTD", "BTHD", "BHDT"])
@pytest.mark.parametrize("grad", [True, False])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(layout: str, grad: bool) -> None:
    order = {"BHTD": (0, 1, 2, 3), "BTHD": (0, 2, 1, 3), "BHDT": (0, 1, 3, 2)}[layout]
    sizes = [(2, 4, 15, 24)[axis] for axis in order]
    inverse = [order.index(axis) for axis in range(4)]

    def outputs() -> list[Tensor]:
        q, k, v = (torch.zeros(sizes, dtype=torch.float16, device=DEVICE).permute(inverse) for _ in range(3))
        q.requires_grad_(grad)
        out, lse = triton_attention(q, k, v, slopes=torch.ones(4, device=DEVICE))
        return [out, lse, *(torch.autograd.grad(out.sum(), (q,)) if grad else ())]

    real = outputs()
    with FakeTensorMode():
        fake = outputs()
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_graph_break_for_dynamic_lengths(backend: str) -> None:
    """One graph serves all lengths beyond one block of queries, forward and backward."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for query_length, key_length in ((130, 150), (131, 191), (2 * REACH_M + 3, 300)):
        inputs = tensors(query_length, key_length)
        results, expected = compiled(*inputs), attend(*inputs)
        gradients = [torch.autograd.grad(out.sum() + lse.sum(), inputs) for out, lse in (results, expected)]
        for ours, plain in zip((*results, *gradients[0]), (*expected, *gradients[1]), strict=True):
            assert torch.equal(ours, plain)
    assert len(graphs) == 1


def test_compiled_decoding() -> None:
    """One graph serves a growing cache."""
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g.forward)
    for key_length in (40, 41, 90):
        inputs = [x.detach() for x in tensors(1, key_length, heads=(4, 2))]
        for ours, plain in zip(compiled(*inputs), attend(*inputs), strict=True):
            assert torch.equal(ours, plain)
    assert len(graphs) == 1
    assert "triton_decode" in graphs[0].code


def test_decoding_only_where_few_queries_need_no_gradient() -> None:
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "longreach":
                calls.append(function.name().removeprefix("longreach::"))
            return function(*args, **(kwargs or {}))

    def called(query_length: int, heads: tuple[int, int], **options: Any) -> list[str]:
        q, k, v, slopes = tensors(query_length, query_length, heads=heads)
        calls.clear()
        with Record():
            triton_attention(q, k, v, slopes=slopes, **options)
        return calls.copy()

    forward, decode = ["triton_forward"], ["triton_decode"]
    assert called(4, (4, 2)) == forward
    with torch.no_grad():
        assert called(4, (4, 2)) == decode
        assert called(DECODE_ROWS // 2, (4, 2)) == decode
        assert called(DECODE_ROWS // 2 + 1, (4, 2)) == forward
        assert called(4, (4, 2), cu_seqlens=torch.tensor([0, 1, 4], device=DEVICE)) == forward


def test_activation_checkpointing() -> None:
    inputs = tensors(40, 60)
    expected = torch.autograd.grad(attend(*inputs)[0].sum(), inputs)
    out, _ = checkpoint(attend, *inputs, use_reentrant=False)
    for ours, plain in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        assert torch.equal(ours, plain)


def test_gradient_of_one_output_alone() -> None:
    inputs = tensors(20, 30)
    for index in range(2):
        gradients = [
            torch.autograd.grad(function(*inputs[:3], slopes=inputs[3])[index].sum(), inputs, allow_unused=True)
            for function in (triton_attention, reference_attention)
        ]
        for ours, plain in zip(*gradients, strict=True):
            plain = torch.zeros_like(ours) if plain is None else plain
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_slopes_without_a_gradient_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from longreach.ops.triton import launch as kernels

    asked = []
    backward = kernels.backward

    def record(*args: Any, slopes_gradient: bool, **kwargs: Any) -> Any:
        asked.append(slopes_gradient)
        return backward(*args, slopes_gradient=slopes_gradient, **kwargs)

    monkeypatch.setattr(kernels, "backward", record)
    *qkv, slopes = tensors(20, 20)
    attend(*qkv, slopes)[0].sum().backward()
    attend(*qkv, slopes.detach())[0].sum().backward()
    assert asked == [True, False]
    assert slopes.grad is not None


def sum_of_squares(function: Any, *inputs: Tensor) -> Tensor:
    out, lse = function(*inputs[:3], slopes=inputs[3])
    return out.square().sum() + lse.square().sum()


def test_gradients_of_torch_func() -> None:
    """Alone, through the function that pulls back, and of each of two samples."""
    inputs = [x.detach() for x in tensors(20, 30)]
    expected = torch.func.grad(partial(sum_of_squares, reference_attention), argnums=(0, 1, 2, 3))(*inputs)
    ours = partial(sum_of_squares, triton_attention)
    of_samples = torch.func.vmap(torch.func.grad(ours, argnums=(0, 1, 2, 3)), in_dims=(0, None, None, 0))
    queries, slopes = torch.stack((inputs[0], -inputs[0])), torch.stack((inputs[3], inputs[3] / 2))
    for found in (
        torch.func.grad(ours, argnums=(0, 1, 2, 3))(*inputs),
        torch.func.vjp(ours, *inputs)[1](torch.ones((), device=DEVICE)),
        [x[0] for x in of_samples(queries, *inputs[1:3], slopes)],
    ):
        torch.testing.assert_close(tuple(found), expected, rtol=1e-4, atol=1e-4)


def test_mapped_decoding() -> None:
    inputs = [x.detach() for x in tensors(1, 30)]
    queries = torch.stack((inputs[0], -inputs[0]))
    mapped = torch.func.vmap(attend, in_dims=(0, None, None, None))(queries, *inputs[1:])
    for ours, plain in zip(mapped, zip(*(attend(q, *inputs[1:]) for q in queries), strict=True), strict=True):
        assert torch.equal(ours, torch.stack(plain))


def test_second_derivatives() -> None:
    """Of a sum of squares of the first ones, which are functions of the gradient of the LSE too."""
    found = []
    for function in (triton_attention, reference_attention):
        inputs = tensors(20, 30)
        first = torch.autograd.grad(sum_of_squares(function, *inputs), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
