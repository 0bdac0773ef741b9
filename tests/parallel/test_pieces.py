import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.ops.alibi import alibi_slopes
from longreach.parallel import balanced_pieces

PLAIN = torch.zeros(4)


def keys_read(lengths, reach):
    """Pairs of a query and a key in each piece of one head."""
    start, found = 0, []
    for length in lengths:
        found.append(sum(min(position + 1, reach) for position in range(start, start + length)))
        start += length
    return found


def test_plain_heads_give_later_ranks_fewer_tokens():
    lengths = balanced_pieces(65536, 4, PLAIN)
    assert sum(lengths) == 65536
    # Work until n is n^2 / 2, so that borders stand at T sqrt(r / 4), to the next multiple of 64.
    assert lengths == (32768, 13568, 10432, 8768)
    work = keys_read(lengths, 65536)
    assert max(work) < 1.01 * sum(work) / 4
    even = keys_read([16384] * 4, 65536)
    assert max(even) / (sum(even) / 4) == pytest.approx(1.75, abs=0.001)


def test_no_piece_is_larger_than_the_most():
    lengths = balanced_pieces(65536, 4, PLAIN, most=1.25)
    # Two ranks have 1.25 / 4 of the tokens each, 5/8 in all. The others share the work from there on, n^2 / 2 at n: the
    # border is at T sqrt((25/64 + 1) / 2), and the last ones have 1.22 times the mean work.
    assert lengths == (20480, 20480, 13696, 10880)
    work = keys_read(lengths, 65536)
    assert max(work) / (sum(work) / 4) == pytest.approx(1.22, abs=0.01)
    assert balanced_pieces(65536, 4, PLAIN, most=1) == (16384,) * 4
    assert balanced_pieces(65536, 4, PLAIN, most=2.5) == balanced_pieces(65536, 4, PLAIN)


def test_past_the_reach_pieces_are_alike():
    steep = balanced_pieces(65536, 4, torch.tensor([0.5, 0.25]))
    assert max(steep) - min(steep) <= 128  # a border to the next multiple of 64 on either side
    assert balanced_pieces(65536, 4, PLAIN, window_size=100) == steep
    shallow = balanced_pieces(65536, 4, alibi_slopes(8))
    assert shallow[0] > shallow[1] == pytest.approx(shallow[3], abs=128)
    assert balanced_pieces(65536, 4, PLAIN, per_token=1e9) == (16384,) * 4


@given(
    st.integers(0, 2000),
    st.integers(1, 9),
    st.lists(st.sampled_from([0.0, 0.01, 1.0]), min_size=1, max_size=3),
    st.none() | st.floats(1, 3),
)
def test_every_rank_has_a_piece_where_there_is_a_token_for_each(length, size, slopes, most):
    lengths = balanced_pieces(length, size, torch.tensor(slopes), most=most)
    assert len(lengths) == size
    assert sum(lengths) == length
    assert sum(piece > 0 for piece in lengths) == min(size, length)
    block = 64 if length >= 64 * size else 1
    assert most is None or max(lengths) <= max(1, block * math.ceil(most * length / size / block))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 0, PLAIN), "size=0: give an integer of at least 1"),
        ((-1, 2, PLAIN), "length=-1: give an integer of at least 0"),
        ((8, 2, [0.5]), "slopes of list: give a tensor"),
        ((8, 2, torch.tensor([math.nan])), "slopes holds nan: give finite numbers of at least 0"),
        ((8, 2, -PLAIN - 1), "slopes holds -1: give finite numbers of at least 0"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        balanced_pieces(*arguments)


@pytest.mark.parametrize("window_size", [0, -1, "3", 2.5, True])
def test_a_window_of_nothing_is_refused(window_size):
    with pytest.raises(ValueError, match=r"^window_size=.*: give an integer of at least 1$"):
        balanced_pieces(8, 2, PLAIN, window_size=window_size)


def test_a_cost_below_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^per_token=-1: give at least 0$"):
        balanced_pieces(8, 2, PLAIN, per_token=-1)


@pytest.mark.parametrize("most", [0.99, math.nan, "1"])
def test_less_than_an_even_share_is_refused(most):
    with pytest.raises(ValueError, match=r"^most=.*: give at least 1, or None for no limit$"):
        balanced_pieces(8, 2, PLAIN, most=most)
