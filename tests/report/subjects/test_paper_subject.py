import math

import pytest
from drawn_curves import curves

from longreach.report.subjects.paper import (
    EXTRAPOLATION_TABLES,
    METHODS,
    agreement_with_paper,
    paper_cells,
    paper_curve,
    paper_figure,
    paper_grid,
)

# Count and sum of each column, added up from a separate copy of the paper's tables. OOM cells are not in them.
CHECKSUMS = {
    2: {"sinusoidal": (35, 4930.08), "rotary": (35, 1227.11), "t5": (32, 847.12), "alibi": (35, 659.95)},
    3: {"sinusoidal": (35, 4790.85), "rotary": (35, 1479.38), "t5": (31, 642.32), "alibi": (35, 638.11)},
    4: {"sinusoidal": (33, 2169.33), "rotary": (33, 695.47), "t5": (30, 541.09), "alibi": (33, 575.47)},
    5: {"sinusoidal": (8, 169.27), "rotary": (3, 57.97), "t5": (3, 56.46), "alibi": (36, 723.61)},
}


def test_counts_and_sums_of_every_column():
    for table, columns in CHECKSUMS.items():
        for method, (count, total) in columns.items():
            cells = [value for cell, value in paper_cells().items() if cell[:2] == (table, method)]
            values = [value for value in cells if value is not None]
            assert (len(values), round(sum(values), 2)) == (count, total), (table, method)


def test_out_of_memory_cells():
    missing = [cell[1:] for cell, value in paper_cells().items() if value is None]
    assert missing == [
        *(("t5", 512, length) for length in (13512, 14512, 15512)),
        *(("t5", 1024, length) for length in (13024, 14024, 15024, 16024)),
        *(("t5", 3072, length) for length in (14072, 15072, 16072)),
    ]


def test_single_values():
    value = paper_cells()
    assert value[2, "sinusoidal", 512, 1012] == 43.54
    assert value[2, "alibi", 512, 15512] == 18.31
    assert value[3, "rotary", 1024, 16024] == 106.99
    assert value[4, "t5", 3072, 13072] == 19.10
    assert value[5, "alibi", 64, 3072] == 21.53
    assert value[5, "sinusoidal", 1536, 1536] == 19.05


def test_table_5_repeats_the_first_rows_of_tables_2_to_4():
    for train_length in EXTRAPOLATION_TABLES:
        for method in METHODS:
            same = paper_cells()[5, method, train_length, train_length]
            assert same == paper_curve(method, train_length)[train_length]


def test_curves_ascend_from_the_training_length():
    for train_length in EXTRAPOLATION_TABLES:
        for method in METHODS:
            lengths = list(paper_curve(method, train_length))
            assert lengths[0] == train_length
            assert lengths == sorted(set(lengths))


def test_paper_grid():
    rows = {row[0]: row[1:] for row in paper_grid().rows}
    assert rows["alibi, trained at 128"] == ("-", "23.98", "21.70", "20.67", "20.36", "20.29", "20.31", "20.28")
    own = "rotary, trained at the validation length"
    assert rows[own] == ("-", "-", "-", "20.07", "19.33", "-", "-", "18.57")
    assert len(rows) == 8 + 3


def test_paper_figure_draws_tables_2_to_4():
    figure = paper_figure()
    assert len(figure.axes) == 3
    for axes, train_length in zip(figure.axes, (512, 1024, 3072), strict=True):
        assert list(curves(axes).values()) == [paper_curve(method, train_length) for method in METHODS]


def test_shape_agrees_with_the_paper(demo):
    finding = agreement_with_paper(demo, 128)
    assert finding.sentence.startswith(
        "The shape agrees with the paper's at 16x the training length (Table 2, L = 512)"
    )
    # 16 x 512 = 8192 lies between 7512 (293.02) and 8512 (305.65); at 512 the paper has 20.05.
    share = math.log(8192 / 7512) / math.log(8512 / 7512)
    paper = 293.02 * (305.65 / 293.02) ** share / 20.05
    assert f"sinusoidal 1.62x here, {paper:.2f}x in the paper" in finding.details


def test_shape_that_agrees_in_part_or_not_at_all(empty, record):
    def results(**growth):
        entries = [record(m, n, 50.0 * (g if n > 128 else 1)) for m, g in growth.items() for n in (128, 2048)]
        return agreement_with_paper(empty.add(*entries), 128).sentence

    assert "agrees only in part" in results(alibi=0.9, rotary=2.0, sinusoidal=1.5)
    assert "3 of 3 methods move in the same direction, 2 of 3 pairs" in results(alibi=0.9, rotary=2.0, sinusoidal=1.5)
    assert "does not agree" in results(alibi=1.5, rotary=0.9)
    assert "Fewer than two methods" in results(alibi=0.9)
    assert "Fewer than two methods" in results(learned=0.9, none=2.0)


@pytest.mark.parametrize(("train_length", "table"), [(128, 2), (512, 2), (700, 2), (800, 3), (2048, 4), (9000, 4)])
def test_nearest_table_in_proportion(empty, record, train_length, table):
    entries = [record(m, n * train_length, 50.0, train_length) for m in ("alibi", "rotary") for n in (1, 2)]
    assert f"(Table {table}," in agreement_with_paper(empty.add(*entries), train_length).sentence


def test_lengths_beyond_the_papers_are_not_extrapolated_from_it(empty, record):
    entries = [record(m, n, 50.0, 3072) for m in ("alibi", "rotary") for n in (3072, 6144, 3072 * 64)]
    assert "at 2x the training length" in agreement_with_paper(empty.add(*entries), 3072).sentence
