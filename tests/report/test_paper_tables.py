from longreach.report.paper_tables import EXTRAPOLATION_TABLES, METHODS, paper_cells, paper_curve

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
            cells = [cell for cell in paper_cells() if (cell.table, cell.method) == (table, method)]
            values = [cell.perplexity for cell in cells if cell.perplexity is not None]
            assert (len(values), round(sum(values), 2)) == (count, total), (table, method)


def test_out_of_memory_cells():
    missing = [(cell.method, cell.train_length, cell.valid_length) for cell in paper_cells() if cell.perplexity is None]
    assert missing == [
        *(("t5", 512, length) for length in (13512, 14512, 15512)),
        *(("t5", 1024, length) for length in (13024, 14024, 15024, 16024)),
        *(("t5", 3072, length) for length in (14072, 15072, 16072)),
    ]


def test_single_values():
    value = {(c.table, c.method, c.train_length, c.valid_length): c.perplexity for c in paper_cells()}
    assert value[2, "sinusoidal", 512, 1012] == 43.54
    assert value[2, "alibi", 512, 15512] == 18.31
    assert value[3, "rotary", 1024, 16024] == 106.99
    assert value[4, "t5", 3072, 13072] == 19.10
    assert value[5, "alibi", 64, 3072] == 21.53
    assert value[5, "sinusoidal", 1536, 1536] == 19.05
    assert {cell.table: cell.page for cell in paper_cells()} == {2: 16, 3: 17, 4: 18, 5: 19}


def test_table_5_repeats_the_first_rows_of_tables_2_to_4():
    for train_length in EXTRAPOLATION_TABLES:
        for method in METHODS:
            wanted = (5, method, train_length, train_length)
            (same,) = [c for c in paper_cells() if (c.table, c.method, c.train_length, c.valid_length) == wanted]
            assert same.perplexity == paper_curve(method, train_length)[train_length]


def test_curves_ascend_from_the_training_length():
    for train_length in EXTRAPOLATION_TABLES:
        for method in METHODS:
            lengths = list(paper_curve(method, train_length))
            assert lengths[0] == train_length
            assert lengths == sorted(set(lengths))
