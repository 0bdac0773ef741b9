import math
import statistics
from dataclasses import replace

import pytest
from sample_records import at_seed

from longreach.report.grid import format_perplexity
from longreach.report.means import (
    are_repeated,
    counted,
    mean_over_seeds,
    on_chance,
    one_by_one,
    ratio_to,
    unanimous,
    with_spread,
)


def test_the_mean_is_of_losses_and_of_what_was_measured_beside_them(record):
    one, two = record("alibi", 128, 8.0), at_seed(record("alibi", 128, 18.0), 1)
    two = replace(two, seconds=3 * one.seconds, peak_memory=one.peak_memory + 2)
    (mean,) = mean_over_seeds([one, two])
    assert mean.perplexity == pytest.approx(12)
    assert (mean.tokens, mean.stride, mean.peak_memory) == (one.tokens, one.stride, one.peak_memory + 1)
    assert mean.tokens_per_second == pytest.approx(one.tokens_per_second / 2)
    (longer,) = mean_over_seeds([one, replace(two, tokens=3 * two.tokens, nll=3 * two.nll)])
    assert longer.perplexity == pytest.approx(12)
    (unknown,) = mean_over_seeds([one, replace(two, peak_memory=None)])
    assert unknown.peak_memory is None


def test_what_differs_in_more_than_the_seed_stays_apart_and_what_is_alone_stays_itself(record, context, training):
    entries = [record("alibi", 128, 8.0), record("alibi", 256, 8.0), record("t5", 128, 8.0)]
    entries += [record("alibi", 128, 8.0, 64), context("alibi", 128, 1, 1, 4.0), context("alibi", 128, 2, 2, 4.0)]
    assert mean_over_seeds(entries) == entries
    assert mean_over_seeds([training("alibi"), training("alibi", 256)]) == [training("alibi"), training("alibi", 256)]


def test_intervals_and_splits_are_averaged_and_answers_added_up(context, decomposed, found, training):
    (bin,) = mean_over_seeds([context("a", 256, 1, 64, 4.0), at_seed(context("a", 256, 1, 64, 5.0), 1)])
    assert (bin.loss, bin.low, bin.high) == pytest.approx((4.5, 4.47, 4.53))
    (split,) = mean_over_seeds([decomposed("a", 256, 0.1, 0.2), at_seed(decomposed("a", 256, 0.2, 0.6), 1)])
    assert (split.relief, split.beyond, split.beyond_low) == pytest.approx((0.15, 0.4, 0.396))
    (answers,) = mean_over_seeds([found("a", 256, 0.5, 3), at_seed(found("a", 256, 0.5, 8), 1)])
    assert (answers.correct, answers.cases) == (11, 20)
    (trained,) = mean_over_seeds([training("a", speed=1000.0), at_seed(training("a", speed=3000.0), 1)])
    assert trained.tokens_per_second == pytest.approx(1500)


def test_spread_is_the_deviation_to_two_digits():
    def text(value):
        return f"{value:,.2f}"

    assert with_spread(73.5, [72.0, 75.0], text) == f"73.5 ± {statistics.stdev([72, 75]):.1f}"
    assert with_spread(73.5, [73.49, 73.51], text) == "73.50 ± 0.01"
    assert with_spread(1039.0, [1010.0, 1068.0], "{:,.0f}".format) == "1,039 ± 41"
    assert with_spread(73.5, [73.5], text) == with_spread(73.5, [73.5, 73.5], text) == "73.50"
    assert with_spread(math.inf, [math.inf, 3.0], text) == "inf"


def test_spread_of_what_is_written_with_an_exponent_has_one():
    values = [11_990_000.0, 12_690_000.0]
    assert with_spread(12_340_000.0, values, format_perplexity) == "1.2e+07 ± 4.9e+05"
    assert with_spread(999_000.0, [998_000.0, 1_000_000.0], format_perplexity) == "999,000 ± 1,414"
    assert with_spread(1e300, [1e300, 3e300], format_perplexity) == "1.0e+300 ± 1.4e+300"


def test_seeds_are_counted_by_model(record):
    alone, repeated = (
        [record("t5", 128, 9.0)],
        [at_seed(record("alibi", n, 9.0), s) for n in (128, 256) for s in (0, 1)],
    )
    assert [counted(entries) for entries in (alone, repeated, alone + repeated)] == ["1", "2", "1-2"]
    assert [are_repeated(entries) for entries in ([], alone, repeated)] == [False, False, True]
    assert "one seed" in on_chance(alone)
    assert on_chance(alone + repeated) == "Each figure is the mean over 1-2 seeds."
    assert {method: len(seeds) for method, seeds in one_by_one(alone + repeated).items()} == {"alibi": 2}


def test_perplexities_are_compared_on_shared_seeds_and_the_same_tokens(record):
    ours = [at_seed(record("alibi", 128, p), seed) for seed, p in ((0, 10.0), (1, 12.0), (2, 99.0))]
    theirs = [at_seed(record("t5", 128, p), seed) for seed, p in ((1, 6.0), (0, 5.0))]
    ratio = ratio_to(ours, theirs)
    assert (ratio.mean, ratio.low, ratio.high, ratio.n) == pytest.approx((2, 2, 2, 2))
    assert ratio_to(ours[:1], theirs) is None
    assert ratio_to([], theirs) is None
    other_tokens = [replace(entry, tokens=17) for entry in theirs]
    assert ratio_to(ours, other_tokens) is None


def test_a_verdict_is_one_of_every_seed():
    assert unanimous(["helps", "helps"], "differs") == "helps"
    assert unanimous(["helps", "harms"], "differs") == "differs"
