"""Attention inside of PyTorch's own transforms, on both sides of the lengths at which "auto" chooses otherwise."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import longreach.ops.sdpa as sdpa
from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # vmap of SDPA's own kernel
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # which torch.func.jvp uses itself
]

LENGTHS = (511, 512, 513, 2048)
SLOPES = alibi_slopes(2)


def tensors(length: int, *mapped: int) -> list[Tensor]:
    """q, k and v, with axes to map over in front."""
    torch.manual_seed(0)
    return [torch.randn(*mapped, 1, 2, length, 8) for _ in range(3)]


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor = SLOPES) -> Tensor:
    return attention(q, k, v, slopes=slopes)


def loss(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor = SLOPES) -> Tensor:
    return alibi(q, k, v, slopes).square().sum()


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_grad_and_vjp(length: int) -> None:
    inputs = [*tensors(length), SLOPES]
    expected = gradients(loss, inputs)
    close(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs), expected)
    out, pull_back = torch.func.vjp(alibi, *inputs)
    close(pull_back(2 * out), expected)


@pytest.mark.parametrize("length", LENGTHS)
def test_vmap_and_gradients_of_each_sample(length: int) -> None:
    q, k, v = tensors(length, 2)
    one_by_one = [[q[n], k[n], v[0]] for n in range(2)]
    mapped = torch.func.vmap(alibi, in_dims=(0, 1, None))(q, k.transpose(0, 1), v[0])
    close(mapped, torch.stack([alibi(*inputs) for inputs in one_by_one]))
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, None))(q, k, v[0])
    expected = [gradients(loss, inputs) for inputs in one_by_one]
    close(found, tuple(map(torch.stack, zip(*expected, strict=True))))
    of_mapped = torch.func.grad(lambda v: torch.func.vmap(loss, in_dims=(0, 0, None))(q, k, v).sum())(v[0])
    close(of_mapped, expected[0][2] + expected[1][2])


@pytest.mark.parametrize("length", [511, 513])
def test_masks_may_be_mapped_too(length: int) -> None:
    q, k, v = tensors(length)
    masks = torch.rand(3, 1, length) < torch.tensor([0.0, 0.3, 0.6])[:, None, None]

    def masked(mask: Tensor) -> Tensor:
        return attention(q, k, v, slopes=SLOPES, key_padding_mask=mask)

    close(torch.func.vmap(masked)(masks), torch.stack([masked(mask) for mask in masks]))


@pytest.mark.parametrize("length", LENGTHS)
def test_forward_mode(length: int) -> None:
    inputs, directions = tensors(length), [x.flip(2) for x in tensors(length)]
    value, change = torch.func.jvp(loss, tuple(inputs), tuple(directions))
    close(value, loss(*inputs))
    expected = sum((g * d).sum() for g, d in zip(gradients(loss, inputs), directions, strict=True))
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-2)  # sums of a length of products


@pytest.mark.parametrize("impl", ["cpu", "triton", "flex"])
def test_what_has_no_forward_mode_says_so(impl: str) -> None:
    """And does not leave tangents out."""
    q, k, v = tensors(600)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=f'^impl="{impl}" in forward mode, whose derivatives'):
        attention(forward_ad.make_dual(q, q), k, v, slopes=SLOPES, impl=impl)
    with pytest.raises(ValueError, match=f'^impl="{impl}" in forward mode'):
        torch.func.hessian(lambda q: attention(q, k, v, slopes=SLOPES, impl=impl).sum())(q)


def test_mapped_over_nothing() -> None:
    with pytest.raises(ValueError, match=r"^torch\.vmap over 0 slices of q, k or v: give at least one$"):
        torch.func.vmap(lambda q, k, v: attention(q, k, v, slopes=SLOPES, impl="cpu"))(*tensors(600, 0))


def second(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the square of the first derivatives."""

    def squares(*inputs: Tensor) -> Tensor:
        found = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
        return torch.stack([x.square().sum() for x in found]).sum()

    return gradients(squares, inputs)


@pytest.mark.parametrize("with_slopes", [True, False])
def test_second_derivatives(with_slopes: bool) -> None:
    inputs = [x.double() for x in (*tensors(40), *([SLOPES] if with_slopes else []))]

    def by(impl: str) -> Callable[..., Tensor]:
        def function(q: Tensor, k: Tensor, v: Tensor, *slopes: Tensor) -> Tensor:
            options: dict[str, Any] = {"slopes": slopes[0] if slopes else None, "causal": False, "window_size": 30}
            out, lse = attention(q, k, v, **options, return_lse=True, impl=impl)
            return out.square().sum() + lse.sin().sum()

        return function

    expected = second(by("reference"), inputs)
    close(second(by("cpu"), inputs), expected)
    nested = torch.func.grad(lambda q: torch.func.grad(by("cpu"))(q, *inputs[1:]).square().sum())(inputs[0])
    close(nested, gradients(lambda q: gradients_of_q(by("reference"), q, inputs), inputs[:1])[0])


def gradients_of_q(function: Callable[..., Tensor], q: Tensor, inputs: list[Tensor]) -> Tensor:
    return torch.autograd.grad(function(q, *inputs[1:]), q, create_graph=True)[0].square().sum()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_by_jit(length: int) -> None:
    inputs = tensors(length)
    traced = torch.jit.trace(alibi, tuple(inputs))
    close(traced(*(x + 1 for x in inputs)), alibi(*(x + 1 for x in inputs)))


@pytest.mark.parametrize("length", LENGTHS)
def test_fake_and_meta_tensors(length: int) -> None:
    shape = (1, 2, length, 8)
    with FakeTensorMode():
        inputs = [torch.empty(shape, requires_grad=True) for _ in range(3)]
        out, *found = (alibi(*inputs, torch.ones(2)), *gradients(lambda *x: loss(*x, torch.ones(2)), inputs))
        assert [x.shape for x in (out, *found)] == [shape] * 4
    inputs = [torch.empty(shape, device="meta") for _ in range(3)]
    assert [x.shape for x in gradients(lambda *x: loss(*x, SLOPES.to("meta")), inputs)] == [shape] * 3


class Layer(torch.nn.Module):
    """Attention with a bias, without one, and with a window alone."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        bias = q[:, :, :, :1]
        return alibi(q, k, v), attention(q, k, v), attention(q, k, v, window_size=9), attention(q, k, v, bias=bias)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("length", [40, 600])
def test_exported_for_any_length(length: int, strict: bool) -> None:
    dynamic = [{2: torch.export.Dim("length", min=2, max=2**20)}] * 3
    exported = torch.export.export(Layer(), tuple(tensors(length)), dynamic_shapes=dynamic, strict=strict).module()
    for other in (7, *LENGTHS):
        close(exported(*tensors(other)), Layer()(*tensors(other)))


@pytest.fixture
def other_defaults() -> Iterator[None]:
    """Tensors are made elsewhere and in another dtype unless said otherwise."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("length", [1, *LENGTHS])
def test_default_device_and_dtype_change_nothing(length: int, request: pytest.FixtureRequest) -> None:
    q, k, v = tensors(2048)
    inputs = [q[:, :, -length:], k, v]
    impl = "auto" if length > 1 else "cpu"

    def function(*x: Tensor) -> Tensor:
        return attention(*x, slopes=SLOPES, impl=impl).square().sum()

    expected = attention(*inputs, slopes=SLOPES, impl=impl), *gradients(function, inputs)
    request.getfixturevalue("other_defaults")
    actual = attention(*inputs, slopes=SLOPES, impl=impl), *gradients(function, inputs)
    assert all(map(torch.equal, actual, expected))


def test_tiles_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense bias whose mask would be too large."""
    bias = torch.linspace(-1, 0, 60)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias).square().sum()

    q, k, v = tensors(60, 2)
    expected = torch.stack([gradients(function, [q[n], k[n], v[n]])[0] for n in range(2)])
    monkeypatch.setattr(sdpa, "MASK_LIMIT", 2**10)
    close(torch.func.vmap(torch.func.grad(function))(q, k, v), expected)
    with pytest.raises(NotImplementedError, match=r'^second derivatives .*use impl="reference"'):
        second(function, [q[0], k[0], v[0]])
