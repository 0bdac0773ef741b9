import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from drawn_curves import curves
from sample_records import at_seed

from longreach.report.drawing import to_svg
from longreach.report.subjects.perplexity import (
    bits_per_byte_grid,
    extrapolation,
    in_one_line,
    main_grid,
    perplexity_figure,
    word_grid,
)


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


def test_main_grid(demo):
    grid = main_grid(demo, 128)
    assert "per token" in grid.title
    assert grid.columns[1] == ("128", "1x", "63.5")
    assert grid.columns[5:7] == (("2,048", "16x", "1,024"), ("16x", "/ 1x"))
    rows = {row[0]: row[1:] for row in grid.rows}
    assert rows["rotary"] == ("77.20", "77.00", "80.30", "86.90", "94.00", "1.22x", "9,123", "1.50 GiB")
    assert rows["learned"] == ("81.20", "-", "-", "-", "-", "-", "-", "-")
    alibi = [row[0] for row in grid.rows].index("alibi")
    assert grid.best == {(alibi, column) for column in range(1, 6)}


def test_contexts_that_differ_are_given_as_a_range(empty, record):
    results = empty.add(record("a", 128, 9.0), replace(record("b", 128, 9.0), mean_context=100.0))
    assert main_grid(results, 128).columns[1][2] == "63.5-100"


def test_other_protocols_and_training_lengths_stay_out(empty, record):
    sliding = replace(record("alibi", 256, 60.0), stride=1, protocol="sliding-window")
    results = empty.add(record("alibi", 128, 70.0), sliding, record("alibi", 64, 80.0, train_length=64))
    assert main_grid(results, 128).rows == (("alibi", "70.00"),)


def test_methods_of_other_tasks_have_no_row(empty, record, found):
    results = empty.add(record("alibi", 128, 70.0), found("bloom", 128, 0.5, 3), record("t5", 256, 9.0, 256))
    assert [row[0] for row in main_grid(results, 128).rows] == ["alibi"]


def test_bits_per_byte(empty, record):
    bits = 4096 * math.log2(70) / 16000
    assert bits_per_byte_grid(empty.add(record("alibi", 128, 70.0)), 128).rows == (("alibi", f"{bits:.3f}"),)


def test_perplexity_per_word_is_there_where_words_were_counted(empty, record):
    counted = replace(record("alibi", 128, 70.0), words=3000)
    assert word_grid(empty.add(record("alibi", 128, 70.0)), 128) is None
    grid = word_grid(empty.add(counted, record("t5", 128, 60.0)), 128)
    assert grid.rows == (("alibi", f"{70 ** (4096 / 3000):.2f}"), ("t5", "-"))


def test_main_figure_draws_every_record_on_log_axes_and_marks_the_training_length(demo):
    (axes,) = perplexity_figure(demo).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = list(curves(axes).values())
    assert len(drawn) == 5
    assert {128.0: 77.2, 2048.0: 94.0}.items() <= {k: round(v, 9) for k, v in drawn[1].items()}.items()
    assert [128, 128] in [list(line.get_xdata()) for line in axes.lines]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["128", "256", "512", "1,024", "2,048"]
    assert "$" not in "".join(text.get_text() for text in axes.get_yticklabels())
    low, high = axes.get_ylim()
    assert all(low < value < high for curve in drawn for value in curve.values())


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [("alibi", 128, 75.0)],
        [("alibi", 256, 75.0)],
        [("alibi", 128, math.inf)],
        [("alibi", 128, 75.0), ("alibi", 256, math.inf), ("rotary", 256, 1e300)],
        [("alibi", n, 1.0) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 10**6)],
        [(f"rotary:scaling=ntk,base={i},note=$x_{{<b>" + "y" * 90, n, 20.0 + i) for i in range(20) for n in (128, 256)],
        [("caf\u00e9", 128, 75.0), ("_hidden", 128, 75.0), ("x\ny", 128, 75.0)],
    ],
)
def test_odd_results_are_drawn(empty, record, cells):
    figure = perplexity_figure(empty.add(*(record(*cell) for cell in cells)))
    ElementTree.fromstring(to_svg(figure))
    width, height = figure.get_size_inches()
    assert width < 12
    assert height < 12


def test_infinite_perplexity_is_marked_at_the_upper_edge(empty, record):
    results = empty.add(record("t5", 128, 70.0), record("t5", 256, math.inf))
    (axes,) = perplexity_figure(results).axes
    assert ([256], [axes.get_ylim()[1]]) in [tuple(map(list, line.get_data())) for line in axes.lines]


def test_a_model_in_one_line_has_what_its_row_has(empty, record, strided):
    records = [record("alibi", length, value) for length, value in ((128, 74.98), (2048, 73.5))]
    results = empty.add(*records, record("t5", 128, 80.0), strided("alibi", 256, 60.0))
    model = records[0].model
    row = main_grid(results, 128).rows[0]
    assert row[1:4] == ("74.98", "73.50", "0.98x")
    assert in_one_line(results, model) == f"{model}: perplexity 74.98 at 128, 73.50 at 2,048; 16x / 1x 0.98x"
    assert in_one_line(results, records[0].model) != in_one_line(results, results.records[2].model)
    assert in_one_line(empty.add(records[1]), model) == f"{model}: perplexity 73.50 at 2,048"
    assert in_one_line(empty.add(records[0]), model) == f"{model}: perplexity 74.98 at 128"
    assert in_one_line(empty, model) is None


def test_seeds_are_averaged_counted_and_spread(empty, record):
    curves = {0: (80.0, 60.0), 1: (90.0, 72.0)}
    entries = [at_seed(record("alibi", n, p), s) for s, c in curves.items() for n, p in zip((128, 256), c, strict=True)]
    results = empty.add(*entries, record("t5", 128, 70.0), record("t5", 256, 77.0))
    grid = main_grid(results, 128)
    assert ("seeds",) in grid.columns
    assert grid.rows == (("alibi", "84.9 ± 7.1", "65.7 ± 8.5", "2", "0.77x"), ("t5", "70.00", "77.00", "1", "1.10x"))
    assert "standard deviation over seeds" in grid.note
    finding = extrapolation(results, 128)
    assert finding.sentence.startswith("alibi (0.77x) extrapolates")
    # Losses fall by log(80 / 60) and log(90 / 72), and t is 12.706 for one degree of freedom.
    falls = math.log(60 / 80), math.log(72 / 90)
    half = 12.7062 * abs(falls[0] - falls[1]) / 2
    low, high = (math.exp(sum(falls) / 2 + sign * half) for sign in (-1, 1))
    assert f"over 2 seeds; 95% t intervals: alibi [{low:.2f}x, {high:.2f}x]." in finding.details
    assert "holds 1x leaves open" in finding.certainty


def test_a_seed_that_lacks_a_length_is_left_out_there(empty, record, skipped):
    entries = [record("alibi", 128, 80.0), record("alibi", 256, 60.0), at_seed(record("alibi", 128, 5.0), 1)]
    results = empty.add(*entries, at_seed(skipped("alibi", 256, "out of memory"), 1))
    assert main_grid(results, 128).rows[0][2:] == ("60.00", "1-2", "0.75x")


def test_single_seeds_are_thin_lines(demo, seeded):
    (axes,) = perplexity_figure(seeded(demo)).axes
    thin = [line for line in axes.lines if line.get_linewidth() < 1 and len(line.get_xdata()) == 5]
    assert len(thin) == 4 * 3
    low, high = axes.get_ylim()
    assert all(low < y < high for line in thin for y in line.get_ydata())
