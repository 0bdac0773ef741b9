"""Attention on the CPU as operators of torch.library: what tracing and autograd know of them."""

import pytest
import torch
from flat import cpu_attention
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from longreach import attention
from longreach.ops.cpu import operators, passes
from longreach.ops.visibility import Visibility

OPERATORS = torch.ops.longreach


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("with_slopes", [True, False])
def test_operators_of_the_cpu_keep_the_rules_of_torch_library(with_slopes: bool, learns: bool, learned: bool) -> None:
    """With q, k and v in memory as the projections of a model leave them, (B, T, H, D)."""
    torch.manual_seed(0)
    inputs: list[Tensor | None] = [torch.rand(2, 30, heads, 16).transpose(1, 2) for heads in (4, 2, 2)]
    slopes = torch.rand(4)
    inputs += [slopes, slopes.expand(2, 4)] if with_slopes else [None, None]
    for x in inputs[: 5 if learned else 3]:
        if learns and x is not None:
            x.requires_grad_()
    masks, bounds = (torch.arange(60).view(2, 30) % 7 == 0, None), (0.25, True, 9)
    arguments = (*inputs, *masks, *bounds, 2.0**-24, None, learns)
    results = torch.library.opcheck(OPERATORS.cpu_forward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    if learns:
        kept = [x.detach() for x in OPERATORS.cpu_forward(*arguments)]
        saved = [None if x is None else x.detach() for x in inputs]
        arguments = (
            *map(torch.ones_like, kept[:2]),
            *saved,
            *masks,
            *kept,
            *bounds,
            learned and with_slopes,
        )
        results = torch.library.opcheck(OPERATORS.cpu_backward.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("impl", ["native", "other"])
def test_outputs_lie_as_fake_tensors_promise(queries, impl, monkeypatch):
    """Of few queries, too, and where no gradient is wanted."""
    monkeypatch.setattr(passes, "HAS_NATIVE", impl == "native")
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", impl == "native")
    q, k, v = (torch.randn(2, length, 4, 16).transpose(1, 2) for length in (queries, 40, 40))
    arguments = (q, k, v, torch.rand(4), torch.rand(4), None, None, 0.25, True, None, 2.0**-24, None, False)
    assert set(torch.library.opcheck(OPERATORS.cpu_forward.default, arguments).values()) == {"SUCCESS"}
    with FakeTensorMode() as mode:
        promised = OPERATORS.cpu_forward(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    for actual, fake in zip(OPERATORS.cpu_forward(*arguments), promised, strict=True):
        assert (actual.shape, actual.dtype) == (fake.shape, fake.dtype)
        for size, stride, expected in zip(actual.shape, actual.stride(), fake.stride(), strict=True):
            assert stride == expected or size == 1


@pytest.mark.parametrize("queries", [5, 300])
@pytest.mark.parametrize("pre_dispatch", [True, False])
def test_a_trace_of_real_tensors_holds_the_operator(queries, pre_dispatch):
    q, k, v = torch.randn(1, 4, queries, 16), *torch.randn(2, 1, 4, 300, 16)
    slopes = torch.full((4,), 0.5)
    traced = make_fx(lambda q: attention(q, k, v, slopes=slopes, impl="cpu"), pre_dispatch=pre_dispatch)(q)
    assert OPERATORS.cpu_forward.default in [node.target for node in traced.graph.nodes]
    torch.testing.assert_close(traced(-q), attention(-q, k, v, slopes=slopes, impl="cpu"))


@pytest.mark.parametrize("means", passes.Means)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_no_operator_is_called_and_no_lse_made(means, dtype, monkeypatch):
    monkeypatch.setattr(passes, "_means", lambda *_: means)
    called = []
    monkeypatch.setattr(operators, "_forward", lambda *_: called.append(True))
    q, k, v = torch.randn(3, 1, 4, 300, 16).to(dtype)
    slopes = torch.full((4,), 0.5)
    seen = Visibility(300, 300)
    out, lse = operators.cpu_attention(q, k, v, seen, slopes=slopes)
    alone, none = operators.cpu_attention(q, k, v, seen, slopes=slopes, return_lse=False)
    assert torch.equal(out, alone)
    assert lse.shape == (1, 4, 300)
    assert (none is None) == (means != passes.Means.KERNEL)  # which makes it whether or not
    assert not called


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("learned", [True, False])
@functorch_config.patch(enable_autograd_cache=False)  # caches do not know of strides: they may hold other ones
@inductor_config.patch(fx_graph_cache=False)
def test_inductor_trains_through_the_cpu(learned: bool) -> None:
    """Unlike other backends it relies on the strides that fake tensors promise."""

    def layer(x: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(2, (12, 16)).transpose(1, 2).split(4, dim=1)
        out, lse = cpu_attention(q, k, v, slopes=slopes)
        return out.transpose(1, 2).flatten(2).square().mean() + lse.mean()

    torch.manual_seed(0)
    torch._dynamo.reset()
    leaves = [torch.rand(shape, requires_grad=True) for shape in ((2, 30, 64), (64, 192))]
    slopes = torch.rand(4, requires_grad=learned)
    wanted = [*leaves, slopes] if learned else leaves
    eager, compiled = (
        torch.autograd.grad(function(*leaves, slopes), wanted)
        for function in (layer, torch.compile(layer, fullgraph=True))
    )
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)  # products of 60 rows are fused differently
