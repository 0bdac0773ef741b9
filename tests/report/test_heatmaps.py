import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from longreach.report.drawing import DARK, LIGHT, to_svg
from longreach.report.heatmaps import contrast, retrieval_figure, shade, stride_figure, text_on


def cells(axes):
    """(column, row) -> text of every cell."""
    return {tuple(math.floor(x) for x in text.get_position()): text.get_text() for text in axes.texts}


def test_retrieval_by_length_and_depth(empty, found):
    results = empty.add(
        found("alibi", 256, 1.0, 3),
        found("alibi", 128, 0.0, 10),
        found("alibi", 256, 0.0, 0),
        found("t5", 128, 0.0, 5),
        found("t5", 512, 0.5, 5, task="kv"),
    )
    first, second = retrieval_figure(results, "lines").axes
    assert cells(first) == {(0, 0): "10/10", (1, 0): "0/10", (0, 1): "-", (1, 1): "3/10"}
    assert cells(second) == {(0, 0): "5/10", (1, 0): "-", (0, 1): "-", (1, 1): "-"}
    assert [label.get_text() for label in first.get_xticklabels()] == ["128", "256"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0%", "100%"]
    colours = {patch.get_facecolor()[:3] for patch in (first.patches[0], first.patches[1])}
    assert colours == {shade(1.0, LIGHT), shade(0.0, LIGHT)}
    assert first.get_title(loc="left") == "alibi\ntrained at 128"


def test_strides_are_shaded_by_the_logarithm(empty, record, strided):
    results = empty.add(
        record("alibi", 128, 10.0),
        strided("alibi", 256, 160.0, stride=64),
        strided("alibi", 256, 40.0, stride=1),
        strided("alibi", 512, math.inf, stride=1),
    )
    (axes,) = stride_figure(results).axes
    assert cells(axes)[2, 0] == "10.00"
    assert cells(axes)[0, 2] == "∞"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "64", "none"]
    colours = {text: patch.get_facecolor()[:3] for text, patch in zip(axes.texts, axes.patches, strict=True)}
    shades = {text.get_text(): colour for text, colour in colours.items()}
    assert shades["10.00"] == shade(0.0, LIGHT)
    assert shades["40.00"] == pytest.approx(shade(0.5, LIGHT))
    assert shades["160.00"] == shades["∞"] == shade(1.0, LIGHT)


@given(st.floats(0, 1), st.sampled_from([LIGHT, DARK]))
def test_text_is_read_on_every_shade(value, theme):
    colour = shade(value, theme)
    # Of two texts, one has at least the square root of their own contrast on any colour.
    assert contrast(text_on(colour, theme), colour) >= math.sqrt(contrast(theme.ink, theme.paper)) > 3.7


def test_contrast_of_known_pairs():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # just short of the guideline's 4.5
    assert contrast("#123456", "#123456") == 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_words_neither_touch_nor_leave_the_figure(empty, found, strided, count):
    names = [f"an-organisation/with-a-long-model-name-{i}" for i in range(count)]
    results = empty.add(*(found(name, n, 0.5, 10, 10) for name in names for n in (128, 65536)))
    results = results.add(*(strided(name, n, 9e5) for name in names for n in (128, 65536)))
    for figure in (retrieval_figure(results, "lines"), stride_figure(results)):
        ElementTree.fromstring(to_svg(figure))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        assert len(figure.axes) == count
        assert figure.get_figwidth() < 12
        words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        boxes = [text.get_window_extent(canvas.renderer) for text in words]
        for index, box in enumerate(boxes):
            assert min(box.x0, box.y0) >= 0, words[index]
            assert box.x1 <= figure.bbox.x1, words[index]
            assert box.y1 <= figure.bbox.y1, words[index]
            for other, earlier in zip(boxes[:index], words, strict=False):
                assert not box.overlaps(other), (words[index], earlier)


def test_no_records_draw_nothing(empty):
    assert retrieval_figure(empty, "lines").axes == []
    assert stride_figure(empty).axes == []
