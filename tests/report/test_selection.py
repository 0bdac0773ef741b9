import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.report.selection import (
    Score,
    Z,
    find_strided,
    growth,
    loss_ratio,
    offsets_of,
    perplexity_lengths,
    ratio,
    scores,
    stride_lengths,
    ways_of,
)


@given(st.integers(1, 500).flatmap(lambda cases: st.tuples(st.integers(0, cases), st.just(cases))))
def test_wilson_intervals_end_where_the_share_is_z_deviations_away(counts):
    score = Score(*counts)
    low, high = score.interval
    assert 0 <= low <= score.accuracy + 1e-12
    assert score.accuracy - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            deviation = math.sqrt(end * (1 - end) / score.cases)
            assert abs(score.accuracy - end) == pytest.approx(Z * deviation, rel=1e-6)


def test_wilson_interval_of_no_and_of_all_answers():
    # With p = 0 the upper end solves p = z sqrt(p (1 - p) / n): z^2 / (n + z^2).
    assert Score(0, 10).interval == pytest.approx((0, Z**2 / (10 + Z**2)), abs=1e-15)
    assert Score(10, 10).interval == pytest.approx((10 / (10 + Z**2), 1))


def test_scores_sum_over_depths_of_one_task_and_training_length(empty, found):
    results = empty.add(
        found("alibi", 256, 0.0, 1),
        found("alibi", 256, 1.0, 9, cases=30),
        found("alibi", 128, 0.0, 10),
        found("alibi", 256, 0.0, 10, train_length=256),
        found("alibi", 256, 0.0, 10, task="kv"),
    )
    assert scores(results, "lines", 128) == {"alibi": {128: Score(10, 10), 256: Score(10, 40)}}
    assert list(scores(results, "lines", 128)["alibi"]) == [128, 256]


def test_perplexity_is_of_those_trained_or_asked(empty, record, training, skipped, found, strided):
    entries = [record("a", 128, 9.0), training("a", 64), skipped("a", 64, "why", 32), found("a", 8, 0.0, 1, 10, 16)]
    entries += [training("a", 256), found("a", 256, 0.0, 1, train_length=256)]  # asked for something else
    assert perplexity_lengths(empty.add(*entries, strided("a", 4, 9.0, 4))) == (32, 64, 128)


def test_strides_are_of_methods_that_slide(empty, record, strided):
    results = empty.add(record("a", 128, 9.0), record("b", 128, 9.0), strided("b", 256, 8.0), strided("b", 512, 7.0))
    assert stride_lengths(results, "a", 128) == ()
    assert stride_lengths(results, "b", 128) == (128, 256, 512)
    assert find_strided(results, "b", 128, 256, 1).perplexity == pytest.approx(8)
    assert find_strided(results, "b", 128, 256, None) is None
    assert find_strided(results, "b", 128, 128, None).perplexity == pytest.approx(9)


def test_ways_hold_the_smallest_stride_beside_a_cache(empty, strided):
    results = empty.add(
        strided("a", 128, 9.0, stride=64),
        strided("a", 128, 8.0, stride=1),
        strided("a", 256, 8.0, stride=1),
        strided("a", 128, 8.5, protocol="cached-shifted"),
    )
    (ways,) = ways_of(results, 128).values()
    assert [(protocol, entry.stride) for protocol, entry in ways.items()] == [
        ("sliding-window", 1),
        ("cached-shifted", 1),
    ]


def test_offsets_are_in_order(empty, offset):
    results = empty.add(offset("a", 64, 9.0), offset("a", 0, 8.0), offset("b", 0, 8.0, 256))
    assert {m: [e.offset for e in entries] for m, entries in offsets_of(results, 128).items()} == {"a": [0, 64]}


def test_ratios_of_losses_survive_perplexities_that_do_not(empty, record, offset):
    assert loss_ratio(offset("a", 0, math.inf), offset("a", 0, math.inf)) == 1
    assert loss_ratio(offset("a", 0, math.inf), offset("a", 0, 1.0)) == math.inf
    assert loss_ratio(record("a", 128, 12.0), record("a", 128, 8.0)) == pytest.approx(1.5)
    assert growth(empty.add(record("a", 128, math.inf), record("a", 256, 9.0)), "a", 128, 256) is None


def test_a_ratio_needs_both_sides():
    assert [ratio(3.0, 2.0), ratio(None, 2.0), ratio(3.0, None), ratio(3.0, 0)] == [1.5, None, None, None]
