import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import longreach
from longreach.ops.alibi import alibi_bias, alibi_distance, alibi_slopes


def slopes_by_ranks(num_heads):
    """The paper's rule said another way: fill the octaves of exponents 8 k / p, then the midpoints before them."""
    power = 1 << (num_heads.bit_length() - 1)
    whole = [-8 * (rank + 1) / power for rank in range(power)]
    between = [-8 * (rank + 0.5) / power for rank in range(num_heads - power)]
    return [math.pow(2, exponent) for exponent in whole + between]


@pytest.mark.parametrize("num_heads", range(1, 129))
def test_slopes_follow_the_papers_rule(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,)
    assert slopes.dtype == torch.float32
    expected = torch.tensor(slopes_by_ranks(num_heads), dtype=torch.float32)
    torch.testing.assert_close(slopes, expected, rtol=2**-23, atol=0)  # one unit in the last place


def test_slopes_golden_values():
    assert alibi_slopes(1).tolist() == [2**-8]
    assert alibi_slopes(2).tolist() == [2**-4, 2**-8]
    assert alibi_slopes(3).tolist() == [2**-4, 2**-8, 2**-2]
    assert alibi_slopes(8).tolist() == [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]
    twelve = alibi_slopes(12)
    assert twelve[:8].tolist() == alibi_slopes(8).tolist()
    assert twelve[8:].tolist() == np.exp2(np.array([-0.5, -1.5, -2.5, -3.5])).astype(np.float32).tolist()


def test_slopes_of_bloom():
    # BLOOM has 112 heads: those of 64, base 2^-(2^-3), then odd powers of 2^-(2^-4), as in its published code.
    expected = [(2 ** (-(2**-3))) ** power for power in range(1, 65)]
    expected += [(2 ** (-(2**-4))) ** power for power in range(1, 2 * 48, 2)]
    torch.testing.assert_close(alibi_slopes(112), torch.tensor(expected), rtol=2**-22, atol=0)


def test_interleaved_rule_is_not_the_closed_form():
    closed = torch.tensor([2 ** (-8 * (head + 1) / 12) for head in range(12)])
    difference = (alibi_slopes(12) - closed).abs().max()
    assert 0.68 < difference < 0.70  # what the docstring says


@given(st.integers(1, 4096))
def test_slopes_are_distinct_positive_and_below_one(num_heads):
    slopes = alibi_slopes(num_heads)
    assert len(set(slopes.tolist())) == num_heads
    assert ((slopes >= 2**-8) & (slopes < 1)).all()


@pytest.mark.parametrize("num_heads", [0, -1, 8.0, True, "8", None])
def test_slopes_of_no_heads(num_heads):
    with pytest.raises(ValueError, match=r"^num_heads=.*: give a positive integer$"):
        alibi_slopes(num_heads)


def test_slopes_on_a_device():
    assert alibi_slopes(8, device="meta").device.type == "meta"


@given(st.integers(0, 9), st.integers(0, 9))
def test_distance_aligns_queries_with_the_last_keys(query_length, key_length):
    distance = alibi_distance(query_length, key_length)
    assert distance.shape == (query_length, key_length)
    assert distance.dtype == torch.int64
    for row in range(query_length):
        for key in range(key_length):
            assert distance[row, key] == row + key_length - query_length - key


def test_distance_is_square_by_default():
    assert torch.equal(alibi_distance(5), alibi_distance(5, 5))


@pytest.mark.parametrize(("lengths", "name"), [((-1,), "query_length"), ((2, -3), "key_length")])
def test_negative_lengths(lengths, name):
    with pytest.raises(ValueError, match=rf"^{name}=-\d: give an integer of at least 0$"):
        alibi_bias(torch.ones(2), *lengths)


@pytest.mark.parametrize("lengths", [(10**6,), (10**9,), (10**18,), (1, 10**12), (10**12, 1)])
def test_tables_that_no_memory_holds(lengths):
    with pytest.raises(ValueError, match=r"^query_length=\d+ and key_length=\d+ make a table larger than any memory: "):
        alibi_bias(torch.ones(2), *lengths)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_bias_is_minus_slope_times_absolute_distance(shape):
    slopes = torch.rand(shape, dtype=torch.float64)
    bias = alibi_bias(slopes, 4, 6)
    assert bias.shape == (*shape, 4, 6)
    assert bias.dtype == torch.float64
    for index in np.ndindex(shape):
        for row in range(4):
            for key in range(6):
                assert bias[*index, row, key] == -slopes[index] * abs(row + 2 - key)


def test_bias_of_the_past_is_the_papers_up_to_a_constant_of_each_row():
    # The paper's code adds m * j to every row and leans on softmax's shift invariance.
    bias = alibi_bias(alibi_slopes(8), 16)
    papers = alibi_slopes(8)[:, None, None] * torch.arange(16)
    past = alibi_distance(16) >= 0
    shift = (papers - bias).masked_select(past.expand(8, 16, 16)).view(8, -1)
    rows = past.nonzero()[:, 0]
    assert torch.equal(shift, alibi_slopes(8)[:, None] * rows)


@pytest.mark.parametrize("num_heads", [8, 12, 112])
def test_neighbours_stay_distinct_at_64k(num_heads):
    bias = alibi_bias(alibi_slopes(num_heads), 1, 65536)
    assert (bias.diff(dim=-1) > 0).all()


def test_bias_carries_gradients_to_slopes():
    slopes = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: alibi_bias(m, 3, 4), slopes)


@pytest.mark.parametrize("slopes", [torch.ones(()), torch.ones(1, 2, 3), torch.ones(3, dtype=torch.int64)])
def test_bias_of_wrong_slopes(slopes):
    with pytest.raises(ValueError, match=r"^slopes of shape .*: give a floating-point tensor \(H,\) or \(B, H\)$"):
        alibi_bias(slopes, 4)


def test_public_names_are_these_functions():
    assert longreach.alibi_slopes is alibi_slopes
    assert longreach.alibi_bias is alibi_bias


def test_lengths_without_a_bound_are_exported():
    """No memory holds the bias of most of them, of which a graph that serves all must not speak."""

    class Bias(torch.nn.Module):
        def forward(self, x):
            return alibi_bias(alibi_slopes(4), x.shape[0]) + x.sum()

    length = torch.export.Dim("length", min=2, max=2**40)
    exported = torch.export.export(Bias(), (torch.zeros(7),), dynamic_shapes=({0: length},)).module()
    torch.testing.assert_close(exported(torch.zeros(9)), alibi_bias(alibi_slopes(4), 9))
