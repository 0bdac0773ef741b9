import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach import alibi_slopes
from longreach.pretrained.interpolation import (
    SCALINGS,
    Scaling,
    linear,
    logn_factor,
    ntk,
    read_alibi_scaling,
    write_alibi_scaling,
)

HEAD_COUNTS = st.integers(1, 128)


@given(HEAD_COUNTS, st.integers(2, 4096))
def test_up_to_the_training_length_no_scaling_changes_a_slope(heads, train_length):
    slopes = alibi_slopes(heads)
    assert torch.equal(Scaling("none")(slopes, 10**6), slopes)
    for function in (linear, ntk):
        assert torch.equal(function(slopes, train_length, train_length), slopes)
        assert torch.equal(function(slopes, train_length, max(1, train_length // 2)), slopes)


@given(HEAD_COUNTS, st.integers(2, 4096), st.floats(1.0, 16.0))
def test_linear_is_the_ratio_of_the_paper(heads, train_length, ratio):
    length = math.ceil(train_length * ratio)
    expected = [slope * train_length / length for slope in alibi_slopes(heads).tolist()]
    torch.testing.assert_close(linear(alibi_slopes(heads), train_length, length), torch.tensor(expected))


@pytest.mark.parametrize("heads", [2, 8, 16, 64])
def test_ntk_of_a_power_of_two_is_its_published_closed_form(heads):
    ratio = 3.5
    expected = [2 ** (-8 * h / heads) * ratio ** (-(h - 1) / (heads - 1)) for h in range(1, heads + 1)]
    torch.testing.assert_close(ntk(alibi_slopes(heads), 1000, 3500), torch.tensor(expected))


@given(st.integers(2, 128), st.floats(1.01, 16.0))
def test_ntk_keeps_the_steepest_and_interpolates_the_shallowest(heads, ratio):
    slopes = alibi_slopes(heads)
    scaled = ntk(slopes, 1000, 1000 * ratio)
    assert scaled[slopes.argmax()] == slopes.max()
    torch.testing.assert_close(scaled[slopes.argmin()], slopes.min() / ratio)
    factors = (scaled / slopes)[slopes.argsort(descending=True)]
    assert (factors.diff() < 0).all()  # shallower slopes fall further, in whatever order the heads stand


def test_ntk_by_rank_of_slope_at_twelve_heads():
    """Twelve heads' slopes are out of order: the ninth is the second steepest."""
    slopes = alibi_slopes(12)
    factors = ntk(slopes, 100, 200) / slopes
    by_hand = sorted(slopes.tolist(), reverse=True)
    expected = torch.tensor([2.0 ** (-by_hand.index(slope) / 11) for slope in slopes.tolist()])
    torch.testing.assert_close(factors, expected)


def test_ntk_gives_equal_slopes_equal_factors_and_interpolates_a_single_one():
    scaled = ntk(torch.tensor([0.5, 0.25, 0.5, 0.125]), 10, 40)
    torch.testing.assert_close(scaled, torch.tensor([0.5, 0.125, 0.5, 0.03125]))
    torch.testing.assert_close(ntk(torch.tensor([0.5, 0.5]), 10, 40), torch.tensor([0.125, 0.125]))


@pytest.mark.parametrize("name", SCALINGS)
def test_a_length_per_sequence_is_each_length_by_itself(name):
    scaling = Scaling(name, train_length=100, factor=1.5 if name == "linear-fixed" else None)
    slopes, lengths = alibi_slopes(6), torch.tensor([50, 150, 400])
    together = scaling(slopes, lengths).expand(3, 6)
    for row, length in zip(together, lengths.tolist(), strict=True):
        torch.testing.assert_close(row, scaling(slopes, length))


def test_a_fixed_factor_holds_at_any_length():
    scaling = Scaling("linear-fixed", factor=4.0)
    assert torch.equal(scaling(alibi_slopes(8), 1), alibi_slopes(8) / 4)
    assert torch.equal(scaling(alibi_slopes(8), 10**6), alibi_slopes(8) / 4)


def test_logn():
    assert logn_factor(1024, 1000) == 1.0
    assert logn_factor(1024, 1024**2) == pytest.approx(2.0)
    torch.testing.assert_close(logn_factor(10, torch.tensor([5, 10, 100])), torch.tensor([1.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "yarn"}, "scaling='yarn'.*none, linear, linear-fixed, ntk"),
        ({"name": "linear"}, "train_length=None"),
        ({"name": "ntk"}, "train_length=None"),
        ({"name": "linear", "train_length": 1}, "train_length=1"),
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
    ("alibi_scaling", "scaling"),
    [
        (None, Scaling("none")),
        ({"type": "linear", "factor": 2.0}, Scaling("linear-fixed", factor=2.0)),
        ({"type": "linear", "train_seq_len": 8192}, Scaling("linear", train_length=8192)),
    ],
)
def test_alibi_scaling_there_and_back(alibi_scaling, scaling):
    assert read_alibi_scaling(alibi_scaling) == scaling
    assert write_alibi_scaling(scaling) == alibi_scaling


@pytest.mark.parametrize(
    ("alibi_scaling", "told"),
    [
        ({}, "type=None"),
        ("linear", "alibi_scaling='linear'"),
        ({"type": "dynamic", "factor": 2.0}, "type='dynamic'"),
        ({"factor": 2.0, "train_seq_len": 2048}, "type=None"),
        ({"type": "linear"}, "exactly one"),
        ({"type": "linear", "factor": 2.0, "train_seq_len": 2048}, "exactly one"),
        ({"type": "linear", "factor": 2.0, "base": 10}, "field 'base'"),
        ({"type": "linear", "factor": 2}, "factor=2"),  # the schema says float
        ({"type": "linear", "factor": 1.0}, "factor=1.0"),
        ({"type": "linear", "factor": math.nan}, "factor=nan"),
        ({"type": "linear", "factor": "2.0"}, "factor='2.0'"),
        ({"type": "linear", "train_seq_len": 1}, "train_seq_len=1"),
        ({"type": "linear", "train_seq_len": 2048.0}, "train_seq_len=2048.0"),
        ({"type": "linear", "train_seq_len": True}, "train_seq_len=True"),
    ],
)
def test_alibi_scaling_refused_by_name(alibi_scaling, told):
    with pytest.raises(ValueError, match=told):
        read_alibi_scaling(alibi_scaling)


def test_alibi_scaling_has_no_place_for_ntk():
    with pytest.raises(ValueError, match='scaling="ntk"'):
        write_alibi_scaling(Scaling("ntk", train_length=2048))
