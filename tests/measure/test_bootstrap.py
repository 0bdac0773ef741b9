import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.measure.bootstrap import MIN_UNITS, intervals, units

EOS = 0


def interval(sums, counts, seed):
    """Of one column (U,)."""
    return intervals(sums[:, None], counts[:, None], seed)[0]


def documents_of(lengths):
    """Documents of as many tokens as said, the last of each being eos."""
    return np.concatenate([[7] * (length - 1) + [EOS] for length in lengths])


def test_eos_belongs_to_the_document_that_it_ends():
    lengths = [3, 1, 2] + [4] * 20  # the second is empty: eos alone
    found = units(documents_of(lengths), EOS, 8)
    # Target t is token t + 1, so that the first token of all is no target.
    expected = np.repeat(np.arange(23), lengths)[1:]
    assert found.ids.tolist() == expected.tolist()
    assert found.count == 23
    assert found.description == "23 documents"


def test_a_document_without_targets_is_no_unit():
    # The first token is the eos of a document whose other tokens came before what is scored.
    tokens = np.concatenate([[EOS], documents_of([2] * 20)])
    found = units(tokens, EOS, 8)
    assert found.description == "20 documents"
    assert found.ids.tolist() == np.repeat(np.arange(20), 2).tolist()


def test_a_document_that_is_cut_at_the_end_counts():
    found = units(np.concatenate([documents_of([5] * 19), [7, 7]]), EOS, 8)
    assert found.description == "20 documents"
    assert np.bincount(found.ids).tolist() == [4] + [5] * 18 + [2]


@given(st.lists(st.integers(1, 6), min_size=MIN_UNITS + 1, max_size=60))
def test_units_are_the_documents_of_the_predicted_tokens(lengths):
    found = units(documents_of(lengths), EOS, 4)
    expected = np.repeat(np.arange(len(lengths)), lengths)[1:]
    # Where the first document is its eos alone, it has no target and is no unit.
    assert found.ids.tolist() == (expected - expected[0]).tolist()


def test_few_documents_give_twenty_blocks():
    found = units(documents_of([20000, 12769]), EOS, 16384)
    assert found.description == "20 blocks of 1,638 tokens"
    assert np.bincount(found.ids).tolist() == [1638] * 19 + [32768 - 19 * 1638]


def test_blocks_are_whole_windows_where_there_are_enough():
    found = units(documents_of([1001]), EOS, 8)
    assert found.description == "125 blocks of 8 tokens"
    assert found.ids.tolist() == np.repeat(np.arange(125), 8).tolist()


@given(st.integers(1, 500), st.integers(1, 600))
def test_blocks_partition_the_targets(num_targets, valid_length):
    found = units(np.full(num_targets + 1, 7), EOS, valid_length)
    sizes = np.bincount(found.ids)
    assert (np.diff(found.ids) >= 0).all()
    assert len(sizes) == found.count >= min(MIN_UNITS, num_targets)
    assert (sizes[:-1] == sizes[0]).all()
    assert sizes[0] <= sizes[-1] < 2 * sizes[0]
    assert sizes[0] <= valid_length
    assert len(sizes) == 1 or sizes[0] == max(1, min(valid_length, num_targets // MIN_UNITS))


def test_one_target_is_one_block():
    assert units(np.array([7, 7]), EOS, 8).description == "1 block of 1 token"


def test_intervals_cover_the_mean_as_often_as_they_say():
    # A thousand texts, a column each: documents of very different lengths, whose tokens share an effect.
    random = np.random.default_rng(5)
    shape = (60, 1000)
    counts = random.integers(20, 200, shape)
    effect = random.gamma(2.0, 0.5, shape)  # mean 1, skewed
    sums = counts * effect + random.normal(0, 1, shape) * np.sqrt(counts)
    ends = np.array(intervals(sums, counts, seed=0))
    covered = np.mean((ends[:, 0] <= 1) & (ends[:, 1] >= 1))
    assert 0.90 < covered < 0.99
    # Resampling tokens, which the documents do not allow, covers far less: the units matter.
    token_error = np.sqrt((effect.var(axis=0) + 1) / counts.sum(axis=0))
    means = sums.sum(axis=0) / counts.sum(axis=0)
    assert np.mean(np.abs(means - 1) < 1.96 * token_error) < 0.5


def test_width_is_that_of_the_normal_theory():
    # With equal counts the ratio is a plain mean, whose standard error is known.
    sums = np.random.default_rng(1).normal(3, 2, 400)
    low, high = interval(sums, np.ones(400), seed=0)
    error = sums.std() / 20
    # 1000 draws place each end within about 0.07 standard errors; four times that is allowed.
    assert low == pytest.approx(sums.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(sums.mean() + 1.96 * error, abs=0.3 * error)


def test_units_weigh_by_their_counts():
    # Half of the documents have loss 9 but hardly any tokens: a mean of means would lie at 5.
    counts = np.tile([1e6, 1.0], 20)
    low, high = interval(counts * np.tile([1.0, 9.0], 20), counts, seed=0)
    assert 1 < low < high < 1.0001


def test_equal_units_leave_nothing_open():
    assert interval(np.full(30, 12.0), np.full(30, 4.0), seed=3) == (3.0, 3.0)


def test_fewer_than_two_units_have_no_interval():
    assert interval(np.array([4.0]), np.array([2.0]), seed=0) == (None, None)
    sums, counts = np.ones((30, 3)), np.ones((30, 3))
    counts[:, 0] = sums[:, 0] = 0  # no unit has any
    counts[1:, 1] = sums[1:, 1] = 0  # one has
    assert intervals(sums, counts, seed=0) == [(None, None), (None, None), (1.0, 1.0)]


def test_draws_without_a_rare_column_are_left_out_of_it():
    sums, counts = np.zeros((30, 1)), np.zeros((30, 1))
    sums[:2, 0], counts[:2, 0] = (2.0, 8.0), (1.0, 2.0)
    assert intervals(sums, counts, seed=0) == [(2.0, 4.0)]


def test_columns_do_not_change_one_another_and_the_seed_decides():
    random = np.random.default_rng(2)
    sums, counts = random.normal(5, 1, (50, 4)), random.integers(1, 9, (50, 4))
    together = intervals(sums, counts, seed=7)
    assert together[2] == pytest.approx(interval(sums[:, 2], counts[:, 2], seed=7), rel=1e-12)
    assert intervals(sums, counts, seed=7) == together
    assert intervals(sums, counts, seed=8) != together
