from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from longreach.report.context_figures import context_figure, decomposition_figure, decomposition_limits, offset_figure
from longreach.report.drawing import DARK, LIGHT, to_svg


def bars(axes):
    """(y, left, right) of every bar."""
    return [(round(b.get_y() + b.get_height() / 2), b.get_x(), b.get_x() + b.get_width()) for b in axes.patches]


@pytest.mark.parametrize("draw", [context_figure, decomposition_figure, offset_figure])
def test_a_panel_for_each_training_length(everything, empty, draw):
    light, dark = draw(everything, LIGHT), draw(everything, DARK)
    titles = [axes.get_title(loc="left") for axes in light.axes]
    assert [title[:14] for title in titles] == ["Trained at 128", "Trained at 256"]
    assert to_svg(light) != to_svg(dark)
    ElementTree.fromstring(to_svg(dark))
    assert draw(empty).axes == []


def test_loss_is_drawn_at_the_middle_of_its_bin_with_its_band(empty, context):
    results = empty.add(
        context("alibi", 256, 1, 1, 7.0, half=0.5),
        context("alibi", 256, 64, 256, 4.0, half=0.1),
        context("alibi", 128, 1, 1, 7.2, half=0.5),
        context("alibi", 128, 2, 128, 5.0, half=0.5),
        context("learned", 128, 1, 1, 8.0, half=None),
    )
    (axes,) = context_figure(results).axes
    drawn = [list(map(list, line.get_data())) for line in axes.lines]
    assert [[1.0, 128.0], [7.0, 4.0]] in drawn
    assert [[1.0, 16.0], [7.2, 5.0]] in drawn
    assert len(axes.collections) == 1  # neither faint curves nor figures without an interval have a band
    assert [text.get_text() for text in axes.texts] == ["alibi", "learned (windows of 128)"]
    assert axes.get_yscale() == "linear"


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


def luminance(colour):
    """WCAG 2's relative luminance."""
    shares = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), shares))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_what_is_written_on_bars_reads_on_them(empty, decomposed, theme):
    results = empty.add(decomposed("alibi", 256, 0.04, 0.02), decomposed("sinusoidal", 256, -0.5, -2.5))
    figure = decomposition_figure(results, theme)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    for text, bar in zip(axes.texts, axes.patches[2:], strict=True):
        one, other = sorted((luminance(text.get_color()), luminance(bar.get_facecolor())))
        assert (other + 0.05) / (one + 0.05) >= 4.5  # WCAG 2's least contrast of text
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


def test_offsets_are_drawn_as_measured(empty, offset):
    (axes,) = offset_figure(empty.add(offset("alibi", 0, 9.0), offset("alibi", 64, 10.0))).axes
    (curve,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert list(curve.get_xdata()) == [0, 64]
    assert list(curve.get_ydata()) == pytest.approx([9, 10])
