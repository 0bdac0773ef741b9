from dataclasses import replace

import pytest

from longreach.report.context_tables import decomposition_grid, offset_grid, stride_grid, ways_grid


@pytest.mark.parametrize("make", [decomposition_grid, offset_grid, stride_grid, ways_grid])
def test_nothing_measured_gives_no_table(demo, everything, make):
    assert make(demo, 128) is None
    assert make(everything, 64) is None
    for train_length in (128, 256):
        grid = make(everything, train_length)
        assert {len(row) for row in grid.rows} == {len(grid.columns)}


def test_decomposition_by_hand(empty, decomposed):
    fine = decomposed("alibi", 256, 0.025, -0.004, half=0.002)
    coarse = replace(decomposed("alibi", 512, 0.0, 0.0, stride=32, half=None), capped_context=112.5)
    assert decomposition_grid(empty.add(coarse, fine), 128).rows == (
        ("alibi", "256", "+0.021", "+0.025 [+0.023, +0.027]", "-0.004 [-0.006, -0.002]", "1", "128"),
        ("alibi", "512", "+0.000", "+0.000 -", "+0.000 -", "32", "112.5"),
    )


def test_strides_with_nonoverlapping_windows_last(empty, record, strided):
    entries = [strided("alibi", n, p, stride=s) for n, p, s in ((128, 17.98, 1), (256, 18.3, 1), (256, 18.2, 64))]
    grid = stride_grid(empty.add(record("alibi", 128, 19.73), record("t5", 128, 19.0), *entries), 128)
    assert grid.columns == (("method",), ("validation", "length"), ("stride", "1"), ("stride", "64"), ("no overlap",))
    assert grid.rows == (("alibi", "128", "17.98", "-", "19.73"), ("alibi", "256", "18.30", "18.20", "-"))


def test_offsets_by_hand(empty, offset):
    grid = offset_grid(empty.add(offset("a", 0, 9.0), offset("a", 2048, 12000.0), offset("b", 0, 8.0)), 128)
    assert grid.columns == (("method",), ("0",), ("2,048",))
    assert grid.rows == (("a", "9.00", "12,000"), ("b", "8.00", "-"))
    assert "window of 128 tokens" in grid.note


def test_ways_by_hand(empty, strided):
    results = empty.add(
        strided("sinusoidal", 128, 20.0, stride=4, speed=300.0),
        strided("sinusoidal", 128, 400.0, protocol="cached-shifted", speed=9000.0),
        strided("alibi", 4096, 18.0, protocol="cached-unbounded", speed=4000.0),
    )
    assert ways_grid(results, 128).rows == (
        ("sinusoidal", "recomputed", "128", "4", "20.00", "1.000x", "300"),
        ("sinusoidal", "shifted", "128", "1", "400.00", "20.00x", "9,000"),
        ("alibi", "unbounded", "4,096", "1", "18.00", "-", "4,000"),
    )
