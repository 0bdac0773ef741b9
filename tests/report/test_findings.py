import math

import pytest

from longreach.report.findings import agreement_with_paper, extrapolation


def test_headline_names_who_extrapolates_and_by_how_much_the_others_worsen(demo):
    finding = extrapolation(demo, 128)
    assert finding.sentence.startswith("alibi (0.98x) extrapolates from 128 to 2,048 tokens (16x)")
    assert "t5 (1.03x), rotary (1.22x) and sinusoidal (1.62x)" in finding.details
    assert "Not judged, for want of a usable figure at one end: learned." in finding.details
    assert "lowest perplexity at 2,048 is alibi's, 73.50 per token" in finding.details


def test_nothing_extrapolates_says_so(empty, record):
    results = empty.add(record("alibi", 128, 70.0), record("alibi", 256, 70.1))
    finding = extrapolation(results, 128)
    assert finding.sentence.startswith("No method extrapolates from 128 to 256 tokens (2x)")
    assert "alibi (1.001x)" in finding.details
    assert "lowest" not in finding.details  # of one


def test_extrapolating_is_not_called_best(empty, record):
    # A model that learned nothing is level too: the sentence on the lowest perplexity says who is better.
    results = empty.add(*(record("none", n, 4000.0) for n in (128, 256)), record("alibi", 128, 70.0))
    results = results.add(record("alibi", 256, 71.0))
    finding = extrapolation(results, 128)
    assert finding.sentence.startswith("none (1.000x) extrapolates")
    assert "The lowest perplexity at 256 is alibi's" in finding.details


def test_without_both_ends_nothing_is_claimed(empty, record):
    assert extrapolation(empty.add(record("t5", 128, 70.0)), 128).sentence.startswith("Nothing was tested past")
    assert extrapolation(empty.add(record("t5", 64, 70.0)), 128).sentence.startswith("Nothing was tested past")
    missing = extrapolation(empty.add(record("t5", 256, 70.0)), 128)
    assert "cannot be judged" in missing.sentence
    infinite = extrapolation(empty.add(record("t5", 128, math.inf), record("t5", 256, math.inf)), 128)
    assert "cannot be judged" in infinite.sentence


def test_growth_to_infinity_is_growth(empty, record):
    finding = extrapolation(empty.add(record("t5", 128, 70.0), record("t5", 256, math.inf)), 128)
    assert finding.sentence.startswith("No method extrapolates")
    assert "t5 (∞x)" in finding.details


def test_many_methods_are_counted(empty, record):
    entries = [record(f"m{i}", n, 70.0 + i * (n == 256)) for i in range(1, 20) for n in (128, 256)]
    assert extrapolation(empty.add(*entries), 128).details.startswith(
        "Perplexity grows with m1 (1.01x), m2 (1.03x), m3 (1.04x), m4 (1.06x), m5 (1.07x) and 14 more."
    )


def test_shape_agrees_with_the_paper(demo):
    finding = agreement_with_paper(demo, 128)
    assert finding.sentence.startswith(
        "The shape agrees with the paper's at 16x the training length (Table 2, L = 512)"
    )
    # 16 x 512 = 8192 lies between 7512 (293.02) and 8512 (305.65); at 512 the paper has 20.05.
    share = math.log(8192 / 7512) / math.log(8512 / 7512)
    paper = 293.02 * (305.65 / 293.02) ** share / 20.05
    assert f"sinusoidal 1.62x here, {paper:.2f}x in the paper" in finding.details


def test_shape_that_agrees_in_part_or_not_at_all(empty, record):
    def results(**growth):
        entries = [record(m, n, 50.0 * (g if n > 128 else 1)) for m, g in growth.items() for n in (128, 2048)]
        return agreement_with_paper(empty.add(*entries), 128).sentence

    assert "agrees only in part" in results(alibi=0.9, rotary=2.0, sinusoidal=1.5)
    assert "3 of 3 methods move in the same direction, 2 of 3 pairs" in results(alibi=0.9, rotary=2.0, sinusoidal=1.5)
    assert "does not agree" in results(alibi=1.5, rotary=0.9)
    assert "Fewer than two methods" in results(alibi=0.9)
    assert "Fewer than two methods" in results(learned=0.9, none=2.0)


@pytest.mark.parametrize(("train_length", "table"), [(128, 2), (512, 2), (700, 2), (800, 3), (2048, 4), (9000, 4)])
def test_nearest_table_in_proportion(empty, record, train_length, table):
    entries = [record(m, n * train_length, 50.0, train_length) for m in ("alibi", "rotary") for n in (1, 2)]
    assert f"(Table {table}," in agreement_with_paper(empty.add(*entries), train_length).sentence


def test_lengths_beyond_the_papers_are_not_extrapolated_from_it(empty, record):
    entries = [record(m, n, 50.0, 3072) for m in ("alibi", "rotary") for n in (3072, 6144, 3072 * 64)]
    assert "at 2x the training length" in agreement_with_paper(empty.add(*entries), 3072).sentence
