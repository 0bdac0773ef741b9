import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_oracle import VOCAB, NgramOracle, random_text

from longreach.measure.bootstrap import Units, intervals
from longreach.measure.context import context_bins, decompose, loss_by_context
from longreach.measure.score import Scores, score
from longreach.results import Model


def scored(oracle, tokens, valid_length, stride=None):
    return score(
        oracle,
        tokens,
        valid_length=valid_length,
        stride=stride or valid_length,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        tokens_per_batch=256,
    )


def blocks(num_targets, length=7):
    return Units(np.arange(num_targets) // length, "blocks")


def split(oracle, tokens, train_length, valid_length, stride):
    return decompose(
        scored(oracle, tokens, train_length),
        scored(oracle, tokens, train_length, stride),
        scored(oracle, tokens, valid_length),
        blocks(len(tokens) - 1),
        model=Model("alibi", train_length, seed=0),
        valid_length=valid_length,
        stride=stride,
    )


def contexts(num_targets, length):
    """Context of each target in nonoverlapping windows."""
    return np.arange(num_targets) % length + 1


# Bins of context


def test_bins_golden():
    assert context_bins(1).tolist() == [1, 2]
    assert context_bins(8).tolist() == [1, 2, 3, 4, 5, 7, 9]
    assert context_bins(100).tolist() == [1, 2, 3, 4, 5, 7, 10, 13, 19, 26, 36, 51, 72, 101]


@given(st.integers(1, 10**6))
def test_bins_partition_the_contexts(length):
    edges = context_bins(length)
    assert edges[0] == 1
    assert edges[-1] == length + 1
    assert (np.diff(edges) > 0).all()
    # None spans more than half an octave, but for the rounding of its two ends.
    assert (edges[1:] - 1 <= math.sqrt(2) * (edges[:-1] - 0.5) + 0.5).all()


@given(st.integers(1, 3000), st.integers(1, 5))
def test_longer_lengths_keep_the_bins_of_shorter_ones(length, doublings):
    assert set(context_bins(length)[1:]) <= set(context_bins(length << doublings))


# Loss by context


@given(st.integers(1, 60), st.integers(1, 90), st.integers(0, 99))
def test_loss_by_context_accounts_for_every_token(valid_length, num_targets, seed):
    random = np.random.default_rng(seed)
    scores = Scores(random.uniform(0, 9, num_targets), contexts(num_targets, valid_length))
    records = loss_by_context(scores, blocks(num_targets), model=Model("alibi", 4, seed=0), valid_length=valid_length)
    for record in records:
        within = [t for t in range(num_targets) if record.first_context <= t % valid_length + 1 <= record.last_context]
        assert record.tokens == len(within)
        assert record.nll == pytest.approx(sum(scores.nll[t] for t in within), rel=1e-12)
        sums, counts = np.zeros(math.ceil(num_targets / 7)), np.zeros(math.ceil(num_targets / 7))
        for t in within:
            sums[t // 7] += scores.nll[t]
            counts[t // 7] += 1
        if np.count_nonzero(counts) < 2:
            assert (record.low, record.high) == (None, None)
        else:
            assert (record.low, record.high) == pytest.approx(
                intervals(sums[:, None], counts[:, None], seed=0)[0], rel=1e-12
            )
    reached = min(valid_length, num_targets)
    assert records[0].first_context == 1
    for before, after in itertools.pairwise(records):
        assert after.first_context == before.last_context + 1
    assert records[-1].first_context <= reached <= records[-1].last_context
    assert sum(record.tokens for record in records) == num_targets


def test_loss_by_context_shows_where_a_model_stops_to_look():
    oracle, tokens = NgramOracle(k=4), random_text(8000)
    records = loss_by_context(
        scored(oracle, tokens, 32), blocks(8000), model=Model("alibi", 8, seed=0), valid_length=32
    )
    assert [record.first_context for record in records] == [1, 2, 3, 4, 5, 7, 9, 12, 17, 24]
    for record in records:
        chosen = [t for t in range(8000) if record.first_context <= t % 32 + 1 <= record.last_context]
        assert record.loss == pytest.approx(
            sum(oracle.loss(tokens, t, t % 32 + 1) for t in chosen) / len(chosen), rel=1e-12
        )
        assert record.low <= record.loss <= record.high
        assert (record.resampled, record.task, record.method) == ("blocks", "positions", "alibi")
    losses = [record.loss for record in records]
    assert losses[0] > losses[1] > losses[2] > losses[3] > losses[4]


# The decomposition, on models whose answer is known


@st.composite
def cases(draw):
    """(train_length, valid_length, stride, num_targets), the text at least as long as one long window."""
    train_length = draw(st.integers(1, 24))
    valid_length = draw(st.integers(train_length + 1, 72))
    stride = draw(st.integers(1, train_length))
    return train_length, valid_length, stride, draw(st.integers(valid_length, 160))


@settings(max_examples=150)
@given(cases(), st.integers(1, 80), st.integers(0, 99))
def test_the_ngram_oracle_at_stride_1(case, k, seed):
    train_length, valid_length, _, num_targets = case
    oracle, tokens = NgramOracle(k, seed=seed), random_text(num_targets, seed)
    found = split(oracle, tokens, train_length, valid_length, stride=1)

    base, long = contexts(num_targets, train_length), contexts(num_targets, valid_length)
    base_loss, long_loss = oracle.mean_loss(tokens, base), oracle.mean_loss(tokens, long)
    capped_loss = oracle.mean_loss(tokens, np.minimum(train_length, long))
    assert found.gain == pytest.approx(base_loss - long_loss, abs=1e-12)
    assert found.relief == pytest.approx(base_loss - capped_loss, abs=1e-12)
    assert found.beyond == pytest.approx(capped_loss - long_loss, abs=1e-12)
    assert found.gain == pytest.approx(found.relief + found.beyond, abs=1e-12)
    assert found.capped_context == train_length
    assert found.tokens == num_targets
    if k <= train_length:
        assert found.capped_nll == found.long_nll
        assert found.beyond == 0
        assert {found.beyond_low, found.beyond_high} <= {0, None}  # None where the text is one block
        assert found.relief == found.gain


@settings(max_examples=150)
@given(cases(), st.integers(1, 80), st.integers(0, 99))
def test_a_stride_above_1_counts_what_it_withholds_as_beyond(case, k, seed):
    train_length, valid_length, stride, num_targets = case
    oracle, tokens = NgramOracle(k, seed=seed), random_text(num_targets, seed)
    found = split(oracle, tokens, train_length, valid_length, stride)
    exact = split(oracle, tokens, train_length, valid_length, stride=1)

    assert (found.gain, found.base_nll, found.long_nll) == (exact.gain, exact.base_nll, exact.long_nll)
    assert found.gain == pytest.approx(found.relief + found.beyond, abs=1e-12)
    # All that the oracle sees helps it.
    assert found.beyond >= exact.beyond
    assert train_length - stride < found.capped_context <= train_length
    if k <= train_length - stride + 1:
        assert found.beyond == exact.beyond == 0

    # By hand: a token lacks context where it may see L or more and neither kind of window gave it L.
    withheld, capped = 0.0, []
    for target in range(train_length, num_targets):
        if target % valid_length + 1 > train_length:
            seen = train_length - stride + 1 + (target - train_length) % stride
            capped.append(train_length if target % train_length + 1 == train_length else seen)
            withheld += oracle.loss(tokens, target, capped[-1]) - oracle.loss(tokens, target, train_length)
    assert found.capped_context == pytest.approx(sum(capped) / len(capped), rel=1e-12)
    assert found.beyond - exact.beyond == pytest.approx(withheld / num_targets, abs=1e-12)


@given(cases(), st.integers(1, 80), st.integers(0, 99))
def test_a_model_that_breaks_past_its_length_has_negative_beyond(case, k, seed):
    train_length, valid_length, _, num_targets = case
    tokens = random_text(num_targets, seed)
    broken = split(NgramOracle(k, breaks_past=train_length, seed=seed), tokens, train_length, valid_length, stride=1)
    sound = split(NgramOracle(k, seed=seed), tokens, train_length, valid_length, stride=1)
    assert broken.relief == sound.relief
    harm = np.clip(contexts(num_targets, valid_length) - train_length, 0, 512).mean() / 64
    assert broken.beyond == pytest.approx(sound.beyond - harm, abs=1e-12)
    if k <= train_length:
        assert broken.beyond < 0
        assert broken.gain == pytest.approx(broken.relief - harm, abs=1e-12)


def test_intervals_are_paired_by_token():
    # Documents differ by far more than any length gains, and the gains are the same in each: no width is left.
    oracle, tokens = NgramOracle(k=8), np.tile(random_text(15), 21)[:321]
    found = decompose(
        *(
            Scores(scores.nll + np.repeat(np.arange(10) * 5.0, 32), scores.context)
            for scores in (scored(oracle, tokens, 4), scored(oracle, tokens, 4, 1), scored(oracle, tokens, 16))
        ),
        blocks(320, 32),
        model=Model("alibi", 4, seed=0),
        valid_length=16,
        stride=1,
    )
    assert found.relief > 0
    assert found.beyond > 0
    assert (found.relief_low, found.relief_high) == pytest.approx((found.relief, found.relief), abs=1e-12)
    assert (found.beyond_low, found.beyond_high) == pytest.approx((found.beyond, found.beyond), abs=1e-12)


def test_intervals_enclose_what_they_are_of():
    found = split(NgramOracle(k=20), random_text(1500), train_length=8, valid_length=64, stride=1)
    assert 0 < found.relief_low < found.relief < found.relief_high
    assert 0 < found.beyond_low < found.beyond < found.beyond_high
    assert found.resampled == "blocks"
    assert found.task == "decomposition"


def test_one_unit_has_no_intervals():
    oracle, tokens = NgramOracle(k=3), random_text(40)
    found = decompose(
        scored(oracle, tokens, 4),
        scored(oracle, tokens, 4, 1),
        scored(oracle, tokens, 16),
        Units(np.zeros(40, dtype=np.int64), "1 document"),
        model=Model("alibi", 4, seed=0),
        valid_length=16,
        stride=1,
    )
    assert [found.relief_low, found.relief_high, found.beyond_low, found.beyond_high] == [None] * 4
