import subprocess
import sys

import pytest
from drawn_curves import curves

from longreach.positions import METHODS
from longreach.report.drawing import DARK, LIGHT, looks, short, to_png, to_svg
from longreach.report.subjects.paper import (
    paper_figure,
)
from longreach.report.subjects.perplexity import perplexity_figure


def test_a_method_has_one_colour_everywhere(demo, empty, record):
    (axes,) = perplexity_figure(demo).axes
    assert list(curves(axes))[:4] == list(curves(paper_figure().axes[0]))
    (alone,) = perplexity_figure(empty.add(record("alibi", 128, 9.0))).axes
    assert list(curves(alone)) == [list(curves(axes))[3]]
    markers = [line.get_marker() for line in axes.lines if len(line.get_xdata()) and line.get_linestyle() != "None"]
    assert len(set(markers)) == 6  # five methods, and the training length has none


def test_every_method_of_ours_looks_like_no_other():
    for theme in (LIGHT, DARK):
        chosen = looks(list(METHODS), theme)
        assert len({colour for colour, _, _ in chosen.values()}) == len(METHODS)
        assert len({marker for _, marker, _ in chosen.values()}) == len(METHODS)
        assert {line for _, _, line in chosen.values()} == {"-"}


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("models/$x$ Köln", "models/$x$ Köln"),
        ("models/模型", "models/��"),
        ("m\x1b[31mred\n\x00", "m�[31mred��"),
        ("\u202eevil", "�evil"),
        ("\udc80x", "�x"),
    ],
)
def test_a_name_is_drawn_as_far_as_it_can_be(name, drawn):
    assert short(name) == drawn
    assert short(40 * name) == f"{(40 * drawn)[:16]}…{(40 * drawn)[-16:]}"


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
        "import sys, pathlib; from longreach.report.drawing import to_svg;"
        "from longreach.report.subjects.paper import paper_figure;"
        "pathlib.Path(sys.argv[1]).write_bytes(to_svg(paper_figure()));"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.svg")], check=True)
    assert (tmp_path / "a.svg").read_bytes() == to_svg(paper_figure())
