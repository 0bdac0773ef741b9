import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from longreach.report.drawing import DARK, LIGHT, to_svg
from longreach.report.heat_maps import contrast, shade, text_on
from longreach.report.subjects.retrieval import retrieval_figure


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
def test_words_neither_touch_nor_leave_the_figure(empty, found, count):
    names = [f"an-organisation/with-a-long-model-name-{i}" for i in range(count)]
    results = empty.add(*(found(name, n, 0.5, 10, 10) for name in names for n in (128, 65536)))
    figure = retrieval_figure("lines", results)
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
    assert retrieval_figure("lines", empty).axes == []
