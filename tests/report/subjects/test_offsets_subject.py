import math

import pytest
from sample_records import at_seed

from longreach.report.subjects.offsets import offset_figure, offset_grid, offsets, offsets_of


def test_offsets_are_in_order(empty, offset):
    results = empty.add(offset("a", 64, 9.0), offset("a", 0, 8.0), offset("b", 0, 8.0, 256))
    assert {m: [e.offset for e in entries] for m, entries in offsets_of(results, 128).items()} == {"a": [0, 64]}


def test_positions_change_some_and_leave_others(empty, offset):
    shifted = [offset("shifted", n, p) for n, p in ((0, 30.0), (64, 20.0), (128, 25.0))]
    entries = [*shifted, offset("alibi", 0, 18.0), offset("alibi", 128, 18.1), offset("t5", 0, 9.0)]
    finding = offsets(empty.add(*entries), 128)
    assert finding.sentence == (
        "Trained at 128: raising all positions, by up to 128, leaves the perplexity of alibi as it is;"
        " changes that of shifted (1.50x)."
    )
    assert finding.details == "Lowest and highest perplexity: shifted from 20.00 at 64 to 30.00 at 0."
    lone = offsets(empty.add(offset("t5", 0, 9.0)), 128)
    assert "no method was tested at more than one position" in lone.sentence


def test_offsets_by_hand(empty, offset):
    grid = offset_grid(empty.add(offset("a", 0, 9.0), offset("a", 2048, 12000.0), offset("b", 0, 8.0)), 128)
    assert grid.columns == (("method",), ("0",), ("2,048",))
    assert grid.rows == (("a", "9.00", "12,000"), ("b", "8.00", "-"))
    assert "window of 128 tokens" in grid.note


def test_offsets_are_drawn_as_measured(empty, offset):
    (axes,) = offset_figure(empty.add(offset("alibi", 0, 9.0), offset("alibi", 64, 10.0))).axes
    (curve,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert list(curve.get_xdata()) == [0, 64]
    assert list(curve.get_ydata()) == pytest.approx([9, 10])


def test_single_seeds_are_thin_lines_at_their_positions(empty, offset):
    entries = [at_seed(offset("a", n, p + s), s) for n, p in ((0, 9.0), (64, 10.0)) for s in (0, 1)]
    (axes,) = offset_figure(empty.add(*entries)).axes
    thin = [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() < 1]
    assert thin == [pytest.approx([9, 10]), pytest.approx([10, 11])]
    assert offset_grid(empty.add(*entries), 128).rows == (("a", f"{math.sqrt(90):.2f}", f"{math.sqrt(110):.2f}"),)
