import math
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from longreach.report.drawing import DARK, to_png, to_svg
from longreach.report.figures import paper_figure, perplexity_figure
from longreach.report.paper_tables import METHODS, paper_curve


def curves(axes):
    """Colour -> points of every line that is a curve, not a mark."""
    lines = [line for line in axes.lines if line.get_marker() not in ("None", None) and line.get_linestyle() != "None"]
    return {line.get_color(): dict(zip(*(map(float, data) for data in line.get_data()), strict=True)) for line in lines}


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


def test_paper_figure_draws_tables_2_to_4():
    figure = paper_figure()
    assert len(figure.axes) == 3
    for axes, train_length in zip(figure.axes, (512, 1024, 3072), strict=True):
        assert list(curves(axes).values()) == [paper_curve(method, train_length) for method in METHODS]


def test_a_method_has_one_colour_everywhere(demo, empty, record):
    (axes,) = perplexity_figure(demo).axes
    assert list(curves(axes))[:4] == list(curves(paper_figure().axes[0]))
    (alone,) = perplexity_figure(empty.add(record("alibi", 128, 9.0))).axes
    assert list(curves(alone)) == [list(curves(axes))[3]]
    markers = [line.get_marker() for line in axes.lines if len(line.get_xdata()) and line.get_linestyle() != "None"]
    assert len(set(markers)) == 6  # five methods, and the training length has none


def test_written_bytes_depend_on_the_results_alone(demo, monkeypatch):
    import matplotlib

    first = to_svg(perplexity_figure(demo)), to_png(perplexity_figure(demo))
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
        assert (to_svg(perplexity_figure(demo)), to_png(perplexity_figure(demo))) == first
        assert matplotlib.rcParams["font.size"] == 20  # the user's settings are as they were
    assert b"<dc:date>" not in first[0]
    assert to_svg(perplexity_figure(demo, DARK)) != first[0]


def test_same_bytes_in_a_fresh_process_without_pyplot(tmp_path):
    code = (
        "import sys, pathlib; from longreach.report.figures import paper_figure, to_svg;"
        "pathlib.Path(sys.argv[1]).write_bytes(to_svg(paper_figure()));"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.svg")], check=True)
    assert (tmp_path / "a.svg").read_bytes() == to_svg(paper_figure())


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
        [("caf\udce9", 128, 75.0), ("_hidden", 128, 75.0), ("x\ny", 128, 75.0)],
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
