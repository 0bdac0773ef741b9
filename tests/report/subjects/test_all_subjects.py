"""What holds for every subject that has such a part."""

from xml.etree import ElementTree

import pytest

from longreach.report.drawing import DARK, LIGHT, to_svg
from longreach.report.subjects.caches import ways, ways_grid
from longreach.report.subjects.context import context_figure, loss_by_context
from longreach.report.subjects.decomposition import decomposition, decomposition_figure, decomposition_grid
from longreach.report.subjects.offsets import offset_figure, offset_grid, offsets
from longreach.report.subjects.strides import stride_grid, strides


@pytest.mark.parametrize("make", [loss_by_context, decomposition, strides, offsets, ways])
def test_nothing_measured_concludes_nothing(demo, make):
    assert make(demo, 128) is None


@pytest.mark.parametrize("make", [decomposition_grid, offset_grid, stride_grid, ways_grid])
def test_nothing_measured_gives_no_table(demo, everything, make):
    assert make(demo, 128) is None
    assert make(everything, 64) is None
    for train_length in (128, 256):
        grid = make(everything, train_length)
        assert {len(row) for row in grid.rows} == {len(grid.columns)}


@pytest.mark.parametrize("draw", [context_figure, decomposition_figure, offset_figure])
def test_a_panel_for_each_training_length(everything, empty, draw):
    light, dark = draw(everything, LIGHT), draw(everything, DARK)
    titles = [axes.get_title(loc="left") for axes in light.axes]
    assert [title[:14] for title in titles] == ["Trained at 128", "Trained at 256"]
    assert to_svg(light) != to_svg(dark)
    ElementTree.fromstring(to_svg(dark))
    assert draw(empty).axes == []


def test_without_intervals_none_are_spoken_of(empty, context, decomposed):
    bins = [context("alibi", 512, 65, 128, 4.5, half=None), context("alibi", 512, 257, 512, 4.0, half=None)]
    results = empty.add(*bins, decomposed("alibi", 512, 0.1, 0.1, half=None))
    for make in (loss_by_context, decomposition):
        finding = make(results, 128)
        assert "cannot be judged" in finding.sentence
        assert finding.certainty.startswith(
            "There are no intervals, for there was too little to resample (35 documents)"
        )
