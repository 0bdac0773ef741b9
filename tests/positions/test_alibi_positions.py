import math

import pytest
import torch

from longreach.ops.alibi import alibi_slopes
from longreach.positions import AttentionPositions, build_method


def slopes(spec, size, length):
    given = build_method(spec, size).attend(torch.arange(length)[None], length, length)
    assert given == AttentionPositions(slopes=given.slopes)
    return given.slopes


@pytest.mark.parametrize("length", [1, 16, 64])
def test_gives_the_papers_slopes(size, length):
    assert torch.equal(slopes("alibi", size(), length), alibi_slopes(3))


@pytest.mark.parametrize("length", [1, 16, 64])
def test_a_fixed_factor_multiplies_at_every_length(size, length):
    assert torch.equal(slopes("alibi:scaling=linear-fixed=4", size(), length), alibi_slopes(3) * 0.25)


@pytest.mark.parametrize(("length", "factor"), [(1, 1), (16, 1), (17, 16 / 17), (32, 0.5), (64, 0.25)])
def test_a_dynamic_factor_comes_only_past_the_training_length(size, length, factor):
    assert torch.equal(slopes("alibi:scaling=linear", size(), length), alibi_slopes(3) * factor)
    assert build_method("alibi:scaling=linear", size()).depends_on_length
    assert not build_method("alibi", size()).depends_on_length


def test_a_dynamic_factor_follows_the_given_length_not_the_keys(size):
    method = build_method("alibi:scaling=linear", size())
    given = method.attend(torch.arange(3)[None], 3, 32).slopes
    assert torch.equal(given, alibi_slopes(3) * 0.5)


def test_learned_slopes_start_at_the_papers_and_stay_positive(size):
    method = build_method("alibi:learned=true", size())
    given = method.attend(torch.arange(3)[None], 3, 3).slopes
    torch.testing.assert_close(given, alibi_slopes(3), rtol=1e-6, atol=0)
    given.sum().backward()
    torch.testing.assert_close(method.log_slopes.grad, given.detach())  # d exp(x) / dx
    with torch.no_grad():
        method.log_slopes -= 50.0
    assert (method.attend(torch.arange(3)[None], 3, 3).slopes > 0).all()


def test_learned_and_dynamic_together(size):
    given = slopes("alibi:learned=true:scaling=linear", size(), 64)
    torch.testing.assert_close(given, alibi_slopes(3) * 0.25, rtol=1e-6, atol=0)


def test_fixed_slopes_are_no_weights(size):
    method = build_method("alibi", size())
    assert list(method.parameters()) == []
    assert method.state_dict() == {}


@pytest.mark.parametrize("factor", ["0", "-1", "0.5", "1", "nan"])
def test_factor_out_of_range(size, factor):
    with pytest.raises(ValueError, match=r": factor=.*: give a finite number"):
        build_method(f"alibi:scaling=linear-fixed={factor}", size())


def test_logn_multiplies_the_logits_and_leaves_the_slopes(size):
    method = build_method("alibi:scaling=none+logn", size())
    given = method.attend(torch.arange(3)[None], 3, 256)
    assert torch.equal(given.slopes, alibi_slopes(3))
    assert given.logit_factor == pytest.approx(2.0)  # log 256 / log 16
    assert method.depends_on_length


def geometric(num_heads, exponent):
    return [2.0 ** (-exponent * head / num_heads) for head in range(1, num_heads + 1)]


SEQUENCES = {
    "paper:4": ("alibi:exponent=4", 4, geometric(4, 4.0)),
    "paper:16": ("alibi:exponent=16", 8, geometric(8, 16.0)),
    # Of twelve heads, eight are those of eight and four every other one of sixteen.
    "paper, 12 heads": ("alibi:exponent=6", 12, geometric(8, 6.0) + geometric(16, 6.0)[0:8:2]),
    "closed, 12 heads": ("alibi:slopes=closed", 12, geometric(12, 8.0)),
    "closed, 3 heads": ("alibi:slopes=closed:exponent=5", 3, geometric(3, 5.0)),
    "closed is the paper's at powers of two": ("alibi:slopes=closed", 8, geometric(8, 8.0)),
    "equal": ("alibi:slopes=equal", 6, [2.0**-4] * 6),
    "equal:3": ("alibi:slopes=equal:exponent=3", 2, [2.0**-1.5] * 2),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("learned", ["", ":learned=true"])
def test_other_sequences_of_slopes(size, name, learned):
    spec, num_heads, expected = SEQUENCES[name]
    given = build_method(spec + learned, size(num_heads=num_heads)).attend(torch.arange(3)[None], 3, 3).slopes
    # Powers in float32, and of a logarithm of up to 11.1 that is rounded, where they are learned.
    torch.testing.assert_close(given.double(), torch.tensor(expected).double(), rtol=16 * 2.0**-23, atol=0)
    assert given.dtype == torch.float32


def test_random_slopes_are_drawn_with_the_weights_and_kept_with_them(size):
    def made(seed):
        torch.manual_seed(seed)
        return build_method("alibi:slopes=random:exponent=6", size(num_heads=1000))

    method = made(0)
    assert torch.equal(method.slopes, made(0).slopes)
    assert not torch.equal(method.slopes, made(1).slopes)
    exponents = -method.slopes.log2()
    assert 0 <= exponents.min() < exponents.max() <= 6
    # The mean of 1000 draws from 0 to 6, within five standard deviations of it.
    assert abs(exponents.mean() - 3) < 5 * 6 / math.sqrt(12 * 1000)
    again = made(2)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.slopes, method.slopes)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("exponent=0", "exponent=0"),
        ("exponent=-8", "exponent=-8"),
        ("exponent=65", "exponent=65"),
        ("exponent=nan", "exponent=nan"),
        ("slopes=steep", "slopes='steep'"),
    ],
)
def test_sequences_that_there_are_not(size, option, message):
    with pytest.raises(ValueError, match=f"^method=.*: {message}.*: give"):
        build_method(f"alibi:{option}", size())
