import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import longreach.ops.linear as module
from longreach.ops.cpu import onednn
from longreach.ops.linear import Linear, linear

ROWS, INPUTS, OUTPUTS = 70, 130, 150  # no multiples of anything, and enough work


@pytest.fixture
def asked(monkeypatch):
    """Shapes that oneDNN was asked for, as if it were fast wherever there is one."""
    shapes, product = [], onednn.product

    def noting(a, b, added=None):
        shapes.append((*a.shape, len(b)))
        assert b.is_contiguous() or b.t().is_contiguous()
        return product(a, b, added)

    monkeypatch.setattr(onednn, "IS_FAST", torch.backends.mkldnn.is_available())
    monkeypatch.setattr(onednn, "product", noting)
    monkeypatch.setattr(module, "LEAST_WORK", ROWS * INPUTS * OUTPUTS)
    monkeypatch.setattr(module, "LEAST_SIDE", ROWS)
    return shapes


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layouts(x):
    """The same numbers, otherwise laid out in memory."""
    return [x, x.t().contiguous().t(), torch.stack((x, x), dim=-1)[..., 0], x.reshape(2, -1, x.shape[-1])]


@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(asked, layout, with_bias):
    """Each sum of n products errs by at most n u times the sum of their sizes, in whatever order it is added up."""
    x, weight, bias, grad = (
        draw(ROWS, INPUTS),
        draw(OUTPUTS, INPUTS, seed=1),
        draw(OUTPUTS, seed=2),
        draw(ROWS, OUTPUTS),
    )
    given = layouts(x)[layout].requires_grad_()
    weights = (layouts(weight)[layout] if layout < 3 else weight).requires_grad_()
    inputs = [given, weights, *([bias.requires_grad_()] if with_bias else [])]
    out = linear(*inputs)
    assert out.shape == (*given.shape[:-1], OUTPUTS)
    found = [out, *torch.autograd.grad(out, inputs, grad.reshape(out.shape))]
    assert asked == [(ROWS, INPUTS, OUTPUTS), (ROWS, OUTPUTS, INPUTS), (OUTPUTS, ROWS, INPUTS)]
    x, weight, grad = x.double(), weight.detach().double(), grad.double()
    added = bias.detach().double() if with_bias else torch.zeros(OUTPUTS, dtype=torch.float64)
    products = [(x, weight.t(), added), (grad, weight, 0), (grad.t(), x, 0), (torch.ones(1, ROWS).double(), grad, 0)]
    for one, (a, b, c) in zip(found, products, strict=False):
        allowed = (a.shape[1] + 1) * torch.finfo(torch.float32).eps / 2 * (a.abs() @ b.abs() + abs(c))
        golden = a @ b + c
        assert ((one.double().reshape(golden.shape) - golden).abs() <= allowed).all()


def test_second_derivatives(asked):
    x, weight = draw(ROWS, INPUTS).requires_grad_(), draw(OUTPUTS, INPUTS, seed=1).requires_grad_()

    def second(function):
        first = torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight))

    for found, expected in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert len(asked) > 3


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def watched(x, weight):
    with Watching():
        return linear(x, weight)


def autocast(x, weight):
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight)
    assert out.dtype == torch.bfloat16
    return out.float()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "call",
    [
        watched,
        autocast,
        torch.vmap(linear, in_dims=(0, None)),
        torch.compile(linear, backend="eager", fullgraph=True),
        lambda x, weight: torch.jit.trace(linear, (x, weight), check_trace=False)(x, weight),
        lambda x, weight: torch.func.jvp(lambda y: linear(y, weight), (x,), (x,))[1],
        lambda x, weight: linear(x.double(), weight.double()).float(),
        lambda x, weight: torch.stack([linear(row, weight) for row in x]),
        lambda x, weight: linear(x[:2], weight),
    ],
)
def test_who_watches_or_asks_for_little_has_what_torch_has(asked, call):
    x, weight = draw(ROWS, INPUTS), draw(OUTPUTS, INPUTS, seed=1)
    out = call(x, weight)
    torch.testing.assert_close(out, F.linear(x, weight)[: len(out)], rtol=0.02, atol=0.5)  # bfloat16 adds 130 products
    assert asked == []


@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS), (0,)])
def test_nothing(shape):
    assert linear(torch.ones(shape), torch.ones(OUTPUTS, shape[-1])).shape == (*shape[:-1], OUTPUTS)


def test_a_layer_is_torch_s(asked):
    torch.manual_seed(0)
    layer, plain = Linear(INPUTS, OUTPUTS), nn.Linear(INPUTS, OUTPUTS)
    plain.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = draw(ROWS, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    assert asked == [(ROWS, INPUTS, OUTPUTS)]
