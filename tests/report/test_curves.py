from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from longreach.report.curves import Curve, Panel, Scales, _spread, draw_panels
from longreach.report.drawing import LIGHT
from longreach.report.subjects.perplexity import perplexity_figure

SCALES = Scales("x", "y", x="symlog", y="linear")


def drawn(*curves, scales=SCALES, panels=1):
    figure = draw_panels([Panel("title", 128, curves)] * panels, scales, LIGHT)
    FigureCanvasAgg(figure).draw()
    return figure


def test_names_neither_touch_nor_leave_the_figure(empty, record):
    entries = [record(f"method-number-{i}", n, 70.0 + 0.01 * i) for i in range(20) for n in (128, 2048)]
    figure = perplexity_figure(empty.add(*entries))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # The boxes of the text alone: an annotation's own extent has its line to the curve in it.
    boxes = [Text.get_window_extent(text, canvas.renderer) for text in figure.axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 20
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_tick_labels_do_not_touch(empty, record):
    lengths = (512, 513, 522, 1000, 1012, 1024, 16000, 16384)
    figure = perplexity_figure(empty.add(*(record("alibi", n, 20.0, 512) for n in lengths)))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    assert "512" in [label.get_text() for label in labels]
    boxes = [label.get_window_extent(canvas.renderer) for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_a_band_is_filled_and_within_the_scale():
    band = {1.0: (2.0, 9.0), 64.0: (2.5, 4.0)}
    (axes,) = drawn(Curve("alibi", {1.0: 3.0, 64.0: 3.0}, band)).axes
    (filled,) = axes.collections
    box = filled.get_datalim(axes.transData)
    assert (box.y0, box.y1) == (2.0, 9.0)
    low, high = axes.get_ylim()
    assert low < 2.0
    assert high > 9.0


def test_a_faint_curve_has_neither_name_nor_marker():
    (axes,) = drawn(Curve("alibi", {1.0: 3.0, 64.0: 3.0}, faint=True), Curve("t5", {1.0: 2.0}, remark=" (x)")).axes
    assert [text.get_text() for text in axes.texts] == ["t5 (x)"]
    assert [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 2][1] in (None, "None")


def test_a_point_at_zero_has_a_place():
    (axes,) = drawn(Curve("alibi", {0.0: 3.0, 32.0: 3.0, 2048.0: 4.0})).axes
    zero, first = (axes.transData.transform((x, 3.0))[0] for x in (0.0, 32.0))
    assert first - zero > 20  # pixels
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "32", "128", "2,048"]


@pytest.mark.parametrize("panel_width", [1.5, 3.3, 6.2])
def test_ticks_at_doublings_are_evenly_apart(panel_width):
    curve = Curve("alibi", {2.0**k * 1.4: 1.0 for k in range(14)})
    figure = draw_panels([Panel("title", 128, (curve,))], Scales("x", "y", ticks="doublings"), LIGHT, panel_width)
    ticks = list(figure.axes[0].get_xticks())
    assert 128 in ticks
    assert len(ticks) > 2
    assert len({after / before for before, after in pairwise(ticks)}) == 1


def test_many_panels_are_laid_in_rows_that_share_a_scale():
    figure = drawn(Curve("alibi", {1.0: 3.0}), panels=5)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert len({round(box.y0) for box in boxes}) == 2
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@given(st.lists(st.floats(-0.5, 1.5), max_size=12))
def test_spread_keeps_order_distance_and_bounds(wanted):
    wanted.sort()
    pitch = 0.08
    placed = _spread(wanted, pitch)
    assert len(placed) == len(wanted)
    assert all(b - a >= pitch - 1e-12 for a, b in pairwise(placed))
    assert all(-1e-12 <= y <= 1 + 1e-12 for y in placed)
    apart = all(b - a >= pitch for a, b in pairwise(wanted))
    if apart and wanted and wanted[0] >= 0 and wanted[-1] <= 1:
        assert placed == pytest.approx(wanted)
