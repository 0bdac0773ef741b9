import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach import alibi_slopes
from longreach.positions.scaling import OF_SLOPES, SCALINGS, Scaling, parse_scaling

HEAD_COUNTS = st.integers(1, 128)


@given(HEAD_COUNTS, st.integers(2, 4096))
def test_up_to_the_training_length_no_scaling_changes_a_slope(heads, train_length):
    slopes = alibi_slopes(heads)
    assert torch.equal(Scaling("none")(slopes, 10**6), slopes)
    for name in ("linear", "ntk"):
        scaling = Scaling(name, train_length)
        assert torch.equal(scaling(slopes, train_length), slopes)
        assert torch.equal(scaling(slopes, max(1, train_length // 2)), slopes)


@given(HEAD_COUNTS, st.integers(2, 4096), st.floats(1.0, 16.0))
def test_linear_is_the_ratio_of_the_paper(heads, train_length, ratio):
    length = math.ceil(train_length * ratio)
    expected = [slope * train_length / length for slope in alibi_slopes(heads).tolist()]
    torch.testing.assert_close(Scaling("linear", train_length)(alibi_slopes(heads), length), torch.tensor(expected))


@pytest.mark.parametrize("heads", [2, 8, 16, 64])
def test_ntk_of_a_power_of_two_is_its_published_closed_form(heads):
    ratio = 3.5
    expected = [2 ** (-8 * h / heads) * ratio ** (-(h - 1) / (heads - 1)) for h in range(1, heads + 1)]
    torch.testing.assert_close(Scaling("ntk", 1000)(alibi_slopes(heads), 3500), torch.tensor(expected))


@given(st.integers(2, 128), st.floats(1.01, 16.0))
def test_ntk_keeps_the_steepest_and_interpolates_the_shallowest(heads, ratio):
    slopes = alibi_slopes(heads)
    scaled = Scaling("ntk", 1000)(slopes, 1000 * ratio)
    assert scaled[slopes.argmax()] == slopes.max()
    torch.testing.assert_close(scaled[slopes.argmin()], slopes.min() / ratio)
    factors = (scaled / slopes)[slopes.argsort(descending=True)]
    assert (factors.diff() < 0).all()  # shallower slopes fall further, in whatever order the heads stand


def test_ntk_by_rank_of_slope_at_twelve_heads():
    """Twelve heads' slopes are out of order: the ninth is the second steepest."""
    slopes = alibi_slopes(12)
    factors = Scaling("ntk", 100)(slopes, 200) / slopes
    by_hand = sorted(slopes.tolist(), reverse=True)
    expected = torch.tensor([2.0 ** (-by_hand.index(slope) / 11) for slope in slopes.tolist()])
    torch.testing.assert_close(factors, expected)


def test_ntk_gives_equal_slopes_equal_factors_and_interpolates_a_single_one():
    scaled = Scaling("ntk", 10)(torch.tensor([0.5, 0.25, 0.5, 0.125]), 40)
    torch.testing.assert_close(scaled, torch.tensor([0.5, 0.125, 0.5, 0.03125]))
    torch.testing.assert_close(Scaling("ntk", 10)(torch.tensor([0.5, 0.5]), 40), torch.tensor([0.125, 0.125]))


@pytest.mark.parametrize("name", OF_SLOPES)
def test_a_length_per_sequence_is_each_length_by_itself(name):
    scaling = Scaling(name, train_length=100, factor=1.5 if name.endswith("fixed") else None)
    slopes, lengths = alibi_slopes(6), torch.tensor([50, 150, 400])
    together = scaling(slopes, lengths).expand(3, 6)
    for row, length in zip(together, lengths.tolist(), strict=True):
        torch.testing.assert_close(row, scaling(slopes, length))


def test_a_fixed_factor_holds_at_any_length():
    scaling = Scaling("linear-fixed", factor=4.0)
    assert torch.equal(scaling(alibi_slopes(8), 1), alibi_slopes(8) / 4)
    assert torch.equal(scaling(alibi_slopes(8), 10**6), alibi_slopes(8) / 4)


def test_logn():
    assert Scaling("none", 1024).logit_factor(1024**2) == 1.0
    assert Scaling("none", 1024, logn=True).logit_factor(1000) == 1.0
    assert Scaling("linear", 1024, logn=True).logit_factor(1024**2) == pytest.approx(2.0)
    by_sequence = Scaling("none", 10, logn=True).logit_factor(torch.tensor([5, 10, 100]))
    torch.testing.assert_close(by_sequence, torch.tensor([1.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "cubic"}, "name='cubic'.*none, linear, linear-fixed, ntk"),
        ({"name": "yarn"}, "train_length=None"),
        ({"name": "yarn-fixed", "factor": 2.0}, "train_length=None"),
        ({"name": "yarn-fixed", "train_length": 16}, "factor=None"),
        ({"name": "linear"}, "train_length=None"),
        ({"name": "ntk"}, "train_length=None"),
        ({"name": "none", "logn": True}, r'train_length=None with scaling="none\+logn"'),
        ({"name": "ntk-fixed"}, "factor=None"),
        ({"name": "linear", "train_length": 0}, "train_length=0"),
        ({"name": "none", "train_length": 1, "logn": True}, "train_length=1"),
        ({"name": "linear", "train_length": 2048.0}, "train_length=2048.0"),
        ({"name": "linear", "train_length": True}, "train_length=True"),
        ({"name": "linear-fixed"}, "factor=None"),
        ({"name": "linear-fixed", "factor": 1.0}, "factor=1.0"),
        ({"name": "linear-fixed", "factor": 0.5}, "factor=0.5"),
        ({"name": "linear-fixed", "factor": math.nan}, "factor=nan"),
        ({"name": "linear-fixed", "factor": math.inf}, "factor=inf"),
        ({"name": "linear", "train_length": 10, "factor": 2.0}, 'factor=2.0 with scaling="linear"'),
    ],
)
def test_what_no_scaling_can_be(arguments, told):
    with pytest.raises(ValueError, match=told):
        Scaling(**arguments)


@pytest.mark.parametrize(
    "text",
    ["none", "linear", "linear-fixed=4", "linear-fixed=2.5", "ntk", "ntk-fixed=4", "ntk+logn", "yarn", "yarn-fixed=4"],
)
def test_a_scaling_is_read_as_it_is_written(text):
    assert str(parse_scaling(text, 1024)) == text


@pytest.mark.parametrize(
    "text", ["", "cubic", "yarn=2", "linear=2", "linear-fixed", "linear-fixed=two", "ntk+log", "ntk+", "+logn"]
)
def test_what_is_no_scaling_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^scaling=.*: ") as refusal:
        parse_scaling(text, 1024)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scaling", [Scaling("yarn", 16), Scaling("yarn-fixed", 16, 4.0)])
def test_no_slopes_are_scaled_by_what_is_of_rotary_positions_alone(scaling):
    with pytest.raises(ValueError, match=r'^scaling="yarn.*: give one of none, linear, linear-fixed, ntk, ntk-fixed$'):
        scaling(alibi_slopes(4), 64)


def test_those_of_slopes_are_the_others():
    assert set(SCALINGS) - set(OF_SLOPES) == {"yarn", "yarn-fixed"}
