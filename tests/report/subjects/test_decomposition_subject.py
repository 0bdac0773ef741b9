from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from sample_records import at_seed

from longreach.report.drawing import DARK, LIGHT
from longreach.report.heat_maps import contrast
from longreach.report.subjects.decomposition import (
    decomposition,
    decomposition_figure,
    decomposition_grid,
    decomposition_limits,
)


def bars(axes):
    """(y, left, right) of every bar."""
    return [(round(b.get_y() + b.get_height() / 2), b.get_x(), b.get_x() + b.get_width()) for b in axes.patches]


def test_use_of_context_is_claimed_only_where_the_split_is_exact(empty, decomposed):
    exact = [
        decomposed("alibi", 512, 0.04, 0.01),
        decomposed("t5", 512, 0.04, 0.003),
        decomposed("rotary", 512, 0.04, -0.3),
        decomposed("none", 512, 0.04, 0.3, half=None),
        decomposed("alibi", 256, 0.04, -9.0),
    ]
    finding = decomposition(empty.add(*exact), 128)
    assert finding.sentence == (
        "From 128 to 512 tokens (4x), context beyond 128 helps alibi; makes no difference that can be told with t5;"
        " harms rotary; cannot be judged, for want of intervals, with none."
    )
    assert "alibi +0.050 (relief +0.040, beyond +0.010)" in finding.details
    assert "exact" in finding.certainty
    bound = decomposition(empty.add(decomposed("alibi", 512, 0.04, 0.01, stride=16)), 128)
    assert "context beyond 128 may help alibi" in bound.sentence
    assert "slid by 16" in bound.certainty
    assert "beyond is an upper bound" in bound.certainty


def test_many_methods_are_counted(empty, decomposed):
    finding = decomposition(empty.add(*(decomposed(f"m{i}", 256, 0.04, 0.01) for i in range(20))), 128)
    assert "helps m0, m1, m2, m3, m4 and 15 more" in finding.sentence
    assert finding.details.endswith("and 15 more.")


def test_decomposition_by_hand(empty, decomposed):
    fine = decomposed("alibi", 256, 0.025, -0.004, half=0.002)
    coarse = replace(decomposed("alibi", 512, 0.0, 0.0, stride=32, half=None), capped_context=112.5)
    assert decomposition_grid(empty.add(coarse, fine), 128).rows == (
        ("alibi", "256", "+0.021", "+0.025 [+0.023, +0.027]", "-0.004 [-0.006, -0.002]", "1", "128"),
        ("alibi", "512", "+0.000", "+0.000 -", "+0.000 -", "32", "112.5"),
    )


def test_relief_and_beyond_both_start_at_zero_and_do_not_overlap(empty, decomposed):
    results = empty.add(
        decomposed("alibi", 256, 0.04, 0.02),
        decomposed("t5", 256, 0.04, -0.01),
        decomposed("alibi", 512, -0.01, -0.02),
        decomposed("t5", 512, -0.01, 0.03),
    )
    (axes,) = decomposition_figure(results).axes
    assert [tuple(round(x, 9) for x in bar) for bar in bars(axes)] == [
        *((1, 0.0, 0.04), (1, 0.0, 0.02)),
        *((2, 0.0, 0.04), (2, 0.0, -0.01)),
        *((4, 0.0, -0.01), (4, 0.0, -0.02)),
        *((5, 0.0, -0.01), (5, 0.0, 0.03)),
    ]
    spans = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    assert all(upper[1] <= lower[0] + 1e-9 for upper, lower in pairwise(spans))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["256 tokens (2x)", "alibi", "t5", "512 tokens (4x)", "alibi", "t5"]
    diamonds = [line for line in axes.lines if line.get_marker() == "D"]
    assert [round(line.get_xdata()[0], 9) for line in diamonds] == [0.06, 0.03, -0.03, 0.02]


def test_whiskers_are_the_intervals_where_there_are_any_each_on_its_own_bar(empty, decomposed):
    results = empty.add(decomposed("alibi", 256, 0.04, 0.02, half=0.005), decomposed("t5", 256, 0.04, 0.02, half=None))
    (axes,) = decomposition_figure(results).axes
    whiskers = [line for line in axes.lines if line.get_marker() == "|"]
    assert [[round(x, 9) for x in line.get_xdata()] for line in whiskers] == [[0.035, 0.045], [0.015, 0.025]]
    for line, bar in zip(whiskers, axes.patches[:2], strict=True):
        assert list(line.get_ydata()) == pytest.approx([bar.get_y() + bar.get_height() / 2] * 2)
    assert "95% interval" in [text.get_text() for text in axes.get_legend().get_texts()]
    (axes,) = decomposition_figure(empty.add(decomposed("t5", 256, 0.04, 0.02, half=None))).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["relief", "beyond", "gain: the sum"]


def test_a_great_loss_is_cut_and_written_with_its_name(empty, decomposed):
    results = empty.add(decomposed("alibi", 256, 0.04, 0.02), decomposed("sinusoidal", 256, -0.5, -2.5))
    (axes,) = decomposition_figure(results).axes
    low, high = axes.get_xlim()
    assert high > 0.06
    assert low == pytest.approx(-high, rel=1e-9)
    assert [text.get_text() for text in axes.texts] == ["◂ relief -0.500", "◂ beyond -2.500"]
    assert len([line for line in axes.lines if line.get_marker() == "D"]) == 1


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_what_is_written_on_bars_reads_on_them(empty, decomposed, theme):
    results = empty.add(decomposed("alibi", 256, 0.04, 0.02), decomposed("sinusoidal", 256, -0.5, -2.5))
    figure = decomposition_figure(results, theme)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    for text, bar in zip(axes.texts, axes.patches[2:], strict=True):
        assert contrast(text.get_color(), bar.get_facecolor()[:3]) >= 4.5  # WCAG 2's least contrast of text
        within, box = bar.get_window_extent(canvas.renderer), Text.get_window_extent(text, canvas.renderer)
        assert within.x0 <= box.x0
        assert box.x1 <= within.x1


def test_a_loss_beside_no_gain_is_not_cut(decomposed):
    low, high = decomposition_limits([decomposed("sinusoidal", 256, -0.1, -2.5)])
    assert low < -2.6
    assert high >= 0


values = st.floats(-3, 3)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=4))
def test_limits_hold_zero_and_every_gain(decomposed, pairs):
    entries = [decomposed("alibi", 256, *pair, base=10.0) for pair in pairs]
    low, high = decomposition_limits(entries)
    assert low < 0 < high
    for entry in entries:
        assert max(entry.relief, entry.beyond, entry.gain) < high


def test_names_of_bars_neither_touch_nor_leave_the_figure(empty, decomposed):
    entries = [decomposed(f"{'y' * 60}{i}", n, 0.04, 0.01) for i in range(9) for n in (256, 512)]
    figure = decomposition_figure(empty.add(*entries))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [Text.get_window_extent(label, canvas.renderer) for label in figure.axes[0].get_yticklabels()]
    boxes.sort(key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)


def test_a_verdict_holds_for_every_seed_and_each_has_its_dots(empty, decomposed):
    beyond = {"alibi": (0.01, 0.02), "t5": (0.01, -0.02)}
    entries = [at_seed(decomposed(m, 256, 0.04, b), s) for m, by_seed in beyond.items() for s, b in enumerate(by_seed)]
    results = empty.add(*entries)
    finding = decomposition(results, 128)
    assert "context beyond 128 helps alibi; acts differently from seed to seed with t5." in finding.sentence
    assert "means over 2 seeds" in finding.certainty
    assert [row[0:3] for row in decomposition_grid(results, 128).rows] == [
        ("alibi", "256", "+0.055"),
        ("t5", "256", "+0.035"),
    ]
    (axes,) = decomposition_figure(results).axes
    dots = [round(line.get_xdata()[0], 9) for line in axes.lines if line.get_marker() == "."]
    assert dots == [0.04, 0.04, 0.01, 0.02, 0.04, 0.04, 0.01, -0.02]
    assert "seeds" in [text.get_text() for text in axes.get_legend().get_texts()]
    FigureCanvasAgg(axes.figure).draw()
    box = axes.get_legend().get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= axes.figure.bbox.x1
