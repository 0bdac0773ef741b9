import math
from dataclasses import replace

import pytest
from sample_records import at_seed

from longreach.report.subjects.cost import cost, cost_grid, memory_grid, ratio, training_advantage, training_grid
from longreach.report.subjects.perplexity import (
    main_grid,
)


@pytest.fixture
def trained(training):
    def make(method, train_length, speed, memory=2**30, **changes):
        return replace(training(method, train_length, speed=speed, peak_memory=memory), **changes)

    return make


@pytest.fixture
def rivals(empty, trained, record):
    """ALiBi trained at 128 and sinusoidal trained at 256, both scored at 256."""

    def make(ours, theirs, *, speeds=(1840.0, 1000.0), memories=(2**30, 2**31)):
        return empty.add(
            trained("alibi", 128, speeds[0], memories[0]),
            trained("sinusoidal", 256, speeds[1], memories[1]),
            record("alibi", 256, ours),
            record("sinusoidal", 256, theirs, 256),
        )

    return make


def test_the_papers_headline(rivals):
    finding = training_advantage(rivals(18.4, 18.67))
    assert finding.sentence == (
        "In perplexity at 256 tokens, alibi trained at 128 is at or below sinusoidal trained at 256 (18.40 and 18.67);"
        " its training is faster, at 1.8x the tokens per second, and takes 50% less memory."
    )
    assert "Both saw 409,600 training tokens, at 1,840 and 1,000 tokens/s, peak memory 1.00 GiB and 2.00 GiB." in (
        finding.details
    )
    assert "one seed" in finding.certainty


def test_shapes_are_compared_with_their_own(empty, trained, record):
    def shaped(entry, shape):
        return replace(entry, model=replace(entry.model, shape=shape))

    results = empty
    for shape, perplexity in (("2x64", 20.0), ("4x128", 10.0)):
        for method, length in (("alibi", 128), ("sinusoidal", 128), ("sinusoidal", 256)):
            entries = trained(method, length, 1000.0), record(method, 256, perplexity, length)
            results = results.add(*(shaped(entry, shape) for entry in entries))
    finding = training_advantage(results)
    assert "alibi:2x64 trained at 128 is at or below sinusoidal:2x64 trained at 256" in finding.sentence
    assert "alibi:4x128 trained at 128 is at or below sinusoidal:4x128 trained at 256" in finding.details
    assert "4x128" not in finding.sentence
    # Each beside the sinusoidal model of its own shape, which trains as fast.
    assert [row[3] for row in cost_grid(results).rows] == ["1.0x"] * 6


def test_it_says_when_it_is_not_so(rivals):
    sentence = training_advantage(rivals(19.0, 18.0, speeds=(800.0, 1000.0), memories=(3 * 2**30, 2**31))).sentence
    assert "alibi trained at 128 is worse than sinusoidal trained at 256 (19.00 and 18.00)" in sentence
    assert "slower, at 0.80x the tokens per second, and takes 50% more memory." in sentence
    assert "faster" not in sentence
    assert "less" not in sentence


@pytest.mark.parametrize(
    ("speeds", "memories", "end"),
    [
        ((1000.0, 1000.0), (2**30, 2**30), "its training is as fast, and takes as much memory."),
        ((1000.0, 1000.0), (None, 2**30), "its training is as fast."),
        ((1004.0, 1000.0), (2**30, None), "its training is as fast."),
        ((1040.0, 1000.0), (100, 96), "its training is as fast, and takes as much memory."),
        ((960.0, 1000.0), (96, 100), "its training is as fast, and takes as much memory."),
    ],
)
def test_what_is_equal_or_unknown(rivals, speeds, memories, end):
    assert training_advantage(rivals(9.0, 9.0, speeds=speeds, memories=memories)).sentence.endswith(end)


def test_perplexities_that_overflow_are_compared_by_their_losses(rivals):
    results = rivals(math.inf, math.inf)
    assert "at or below" in training_advantage(results).sentence
    ours, theirs = results.records
    worse = replace(ours, nll=1.1 * ours.nll)
    assert "is worse than sinusoidal trained at 256 (∞ and ∞)" in (
        training_advantage(replace(results, records=(worse, theirs))).sentence
    )


def test_nothing_is_said_without_both_trainings_and_both_figures(empty, rivals, trained, record):
    results = rivals(9.0, 9.0)
    assert training_advantage(empty) is None
    assert training_advantage(replace(results, training=results.training[:1])) is None
    assert training_advantage(replace(results, records=results.records[:1])) is None
    same_length = empty.add(trained("alibi", 128, 1.0), trained("sinusoidal", 128, 1.0), record("alibi", 128, 9.0))
    assert training_advantage(same_length.add(record("sinusoidal", 128, 9.0))) is None
    shifted = empty.add(trained("alibi", 128, 1.0), trained("sinusoidal-shifted", 256, 1.0), record("alibi", 256, 9.0))
    assert training_advantage(shifted.add(record("sinusoidal-shifted", 256, 9.0, 256))) is None


def test_twice_the_length_is_preferred_else_the_next_longer(empty, trained, record):
    entries = [trained("sinusoidal", n, 1000.0) for n in (96, 192, 256, 768)]
    entries += [record("sinusoidal", n, 20.0, n) for n in (96, 192, 256, 768)]
    for length in (128, 256):
        entries.append(trained("alibi", length, 1500.0, tokens=1000))
        entries += [record("alibi", n, 19.0, length) for n in (192, 256, 768)]
    finding = training_advantage(empty.add(*entries))
    assert "at 768 tokens, alibi trained at 256" in finding.sentence  # the longest first
    assert "at 256 tokens, alibi trained at 128" in finding.details
    assert "at 192 tokens" not in finding.sentence + finding.details
    assert "did not see as many training tokens (1,000 and 409,600)" in finding.details


def test_variants_are_named(empty, trained, record):
    variant = "alibi:slopes=learned"
    results = empty.add(trained(variant, 128, 9.0), trained("sinusoidal", 256, 9.0))
    results = results.add(record(variant, 256, 9.0), record("sinusoidal", 256, 9.0, 256))
    assert f"{variant} trained at 128" in training_advantage(results).sentence


def test_cost_beside_sinusoidal_at_the_same_length(empty, trained):
    results = empty.add(trained("sinusoidal", 128, 1000.0), trained("t5", 128, 500.0, 2**31), trained("t5", 256, 1.0))
    assert cost(results).sentence == (
        "Beside sinusoidal at the same training length: t5 trains at 0.50x the speed with 2.0x the memory."
    )
    two = results.add(trained("sinusoidal", 256, 2.0, None))
    assert cost(two).sentence.endswith("and t5 at 256 trains at 0.50x the speed.")
    alike = cost(empty.add(trained("sinusoidal", 128, 1000.0), trained("alibi", 128, 1006.0, 2**30 + 2**25)))
    assert alike.sentence == (
        "Beside sinusoidal at the same training length: alibi trains as fast with as much memory."
    )
    assert "within 5% they count as alike" in alike.certainty
    assert cost(empty.add(trained("alibi", 128, 1.0))) is None
    assert cost(empty.add(trained("sinusoidal", 128, 1.0))) is None


def test_a_ratio_needs_both_sides():
    assert [ratio(3.0, 2.0), ratio(None, 2.0), ratio(3.0, None), ratio(3.0, 0)] == [1.5, None, None, None]


def test_cost_is_as_in_the_papers_table_and_relative_to_sinusoidal_at_the_same_length(empty, record, training):
    slow = training("t5", speed=3041.13, peak_memory=None)
    results = empty.add(training("sinusoidal"), slow, training("alibi", 64), record("t5", 128, 70.0))
    grid = cost_grid(results)
    assert [column[0] for column in grid.columns].count("/ sinusoidal's") == 2
    assert grid.rows == (
        ("alibi", "64", "9,123", "-", "-", "1.50 GiB", "-"),
        ("sinusoidal", "128", "9,123", "1.0x", "-", "1.50 GiB", "1.0x"),
        ("t5", "128", "3,041", "0.33x", "41,234", "-", "-"),
    )
    assert "on the CPU all that the process held" in grid.note
    assert "within 5% they count as alike" in grid.note
    both = cost_grid(results.add(record("sinusoidal", 128, 70.0)))
    assert both.columns[5] == ("/ sinusoidal's", "at that length")
    assert [row[5] for row in both.rows] == ["-", "1.0x", "1.0x"]
    alone = cost_grid(empty.add(training("alibi")))
    assert alone.rows == (("alibi", "128", "9,123", "1.50 GiB"),)


def test_columns_of_what_nobody_measured_are_left_out(empty, record, training):
    results = empty.add(record("alibi", 128, 70.0), record("alibi", 256, 77.0))
    assert main_grid(results, 128).rows == (("alibi", "70.00", "77.00", "1.10x"),)
    some = results.add(replace(training("t5"), peak_memory=None))
    assert main_grid(some, 128).columns[-1] == ("training", "tokens/s")
    assert cost_grid(some).columns[-1] == ("training", "tokens/s")
    assert training_grid(some).columns[-1] == ("seconds",)
    assert main_grid(some.add(training("rotary")), 128).columns[-1] == ("training", "memory")
    unknown = [replace(entry, peak_memory=None) for entry in results.records]
    assert memory_grid(empty.add(*unknown), 128) is None
    assert memory_grid(empty.add(record("t5", 128, 70.0), *unknown[1:]), 128).rows[1][1:] == ("-", "-")


def test_costs_are_means_over_seeds_and_each_training_has_its_row(empty, trained):
    entries = [trained("sinusoidal", 128, 1000.0), trained("t5", 128, 400.0), at_seed(trained("t5", 128, 600.0), 1)]
    results = empty.add(*entries)
    # 1 / 480 is the mean of 1 / 400 and 1 / 600: times are averaged.
    assert "t5 trains at 0.48x the speed" in cost(results).sentence
    assert "means over 1-2 seeds" in cost(results).certainty
    assert [row[0:3:2] for row in cost_grid(results).rows] == [("sinusoidal", "1,000"), ("t5", "480")]
    grid = training_grid(results)
    seeds = grid.columns.index(("seed",))
    assert [(row[0], row[seeds]) for row in grid.rows] == [("sinusoidal", "0"), ("t5", "0"), ("t5", "1")]
    assert ("seed",) not in training_grid(empty.add(*entries[:2])).columns


def test_the_headline_over_seeds_does_not_speak_of_one(rivals):
    one = rivals(18.4, 18.67)
    both = one.add(*(at_seed(entry, 1) for entry in (*one.training, *one.records)))
    assert "one seed" not in training_advantage(both).certainty
    assert "means over 2 seeds" in training_advantage(both).certainty
