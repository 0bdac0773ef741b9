import math

import pytest
import torch

from longreach.positions import build_method, fire


def oracle(method, i, j):
    """b(i, j) for all heads, by the equation, with plain numbers."""
    weights = {name: weight.tolist() for name, weight in method.state_dict().items()}
    c, threshold = abs(weights["c"]), method.threshold * abs(weights["threshold_factor"])
    share = math.log(1 + c * (i - j)) / math.log(1 + c * max(i, threshold))
    inner, outer = (zip(weights[f"{f}.weight"], weights[f"{f}.bias"], strict=True) for f in ("inner", "outer"))
    hidden = [max(0.0, w * share + b) for (w,), b in inner]
    return [sum(w * x for w, x in zip(row, hidden, strict=True)) + b for row, b in outer]


@pytest.fixture
def method(size):
    torch.manual_seed(0)
    return build_method("fire:width=5:threshold=10", size()).double()


@pytest.mark.parametrize(("c", "factor"), [(0.1, 1.0), (-2.0, -0.5)])
def test_bias_is_the_equation(method, c, factor):
    with torch.no_grad():
        method.c.fill_(c)
        method.threshold_factor.fill_(factor)
    for first, count in ((0, 20), (60, 3)):  # below the threshold and past it
        bias = method.attend(torch.arange(first, first + count)[None], first + count, first + count).bias
        assert bias.shape == (3, count, first + count)
        for row in range(count):
            for j in range(first + row + 1):
                expected = torch.tensor(oracle(method, first + row, j), dtype=torch.float64)
                torch.testing.assert_close(bias[:, row, j], expected, rtol=1e-12, atol=1e-12)


def test_sequences_that_stand_elsewhere_have_their_own(method):
    positions = torch.tensor([[30, 31], [5, 6]])
    bias = method.attend(positions, 7, 7).bias
    assert bias.shape == (2, 3, 2, 7)
    expected = torch.tensor(oracle(method, 6, 6 - 4), dtype=torch.float64)
    torch.testing.assert_close(bias[1, :, 1, 2], expected, rtol=1e-12, atol=1e-12)
    assert method.attend(torch.arange(7).expand(2, -1), 7, 7).bias.shape == (3, 7, 7)  # a batch of one row


def test_pieces_are_the_whole_gradients_too(method, monkeypatch):
    def made():
        method.zero_grad()
        bias = method.attend(torch.arange(40)[None], 40, 40).bias
        bias.square().sum().backward()
        return [bias.detach(), *(parameter.grad.clone() for parameter in method.parameters())]

    whole = made()
    monkeypatch.setattr(fire, "CHUNK", 5 * 40 * 7)
    calls = []
    original = fire.checkpoint
    monkeypatch.setattr(fire, "checkpoint", lambda *rest, **named: calls.append(1) or original(*rest, **named))
    pieces = made()
    assert len(calls) == math.ceil(40 / 7)
    assert all((value != 0).any() for value in whole)
    for piece, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(piece, expected, rtol=1e-12, atol=1e-10)


def test_starts_with_the_papers_numbers(size):
    method = build_method("fire", size(train_length=2048, longest_length=2048))
    assert method.c.item() == pytest.approx(0.1)
    assert method.threshold * method.threshold_factor.item() == 512
    assert method.inner.weight.shape == (32, 1)
    assert method.outer.weight.shape == (3, 32)


@pytest.mark.parametrize("option", ["width=0", "threshold=0", "threshold=-1"])
def test_options_out_of_range(size, option):
    with pytest.raises(ValueError, match=f": {option}.*: give"):
        build_method(f"fire:{option}", size())
