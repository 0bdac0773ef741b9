import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from longreach.report.tables import (
    bits_per_byte_grid,
    format_memory,
    format_perplexity,
    format_ratio,
    main_grid,
    paper_grid,
    print_tables,
    skipped_grid,
    to_markdown,
)


def printed(results, width):
    stream = io.StringIO()
    print_tables(results, Console(file=stream, width=width))
    return stream.getvalue()


def test_main_grid(demo):
    grid = main_grid(demo, 128)
    assert "per token" in grid.title
    assert grid.columns[1] == ("128", "1x", "63.5")
    assert grid.columns[5:7] == (("2,048", "16x", "1,024"), ("16x", "/ 1x"))
    rows = {row[0]: row[1:] for row in grid.rows}
    assert rows["rotary"] == ("77.20", "77.00", "80.30", "86.90", "94.00", "1.22x", "9,123", "1.50 GiB")
    assert rows["learned"] == ("81.20", "-", "-", "-", "-", "-", "-", "-")
    alibi = [row[0] for row in grid.rows].index("alibi")
    assert grid.best == {(alibi, column) for column in range(1, 6)}


def test_contexts_that_differ_are_given_as_a_range(empty, record):
    results = empty.add(record("a", 128, 9.0), replace(record("b", 128, 9.0), mean_context=100.0))
    assert main_grid(results, 128).columns[1][2] == "63.5-100"


def test_other_protocols_and_training_lengths_stay_out(empty, record):
    sliding = replace(record("alibi", 256, 60.0), stride=1, protocol="sliding")
    results = empty.add(record("alibi", 128, 70.0), sliding, record("alibi", 64, 80.0, train_length=64))
    assert main_grid(results, 128).rows == (("alibi", "70.00", "-", "-", "-"),)


def test_bits_per_byte(empty, record):
    bits = 4096 * math.log2(70) / 16000
    assert bits_per_byte_grid(empty.add(record("alibi", 128, 70.0)), 128).rows == (("alibi", f"{bits:.3f}"),)


def test_skipped_cells_of_one_reason_stand_together(demo):
    (row,) = skipped_grid(demo).rows
    assert row == ("learned", "its table holds 128 positions", "nonoverlapping", "128", "256, 512, 1,024, 2,048")


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_no_number_is_cut_off_in_a_narrow_terminal(demo, width):
    text = printed(demo, width)
    assert "…" not in text
    for row in main_grid(demo, 128).rows:
        line = " +".join(map(re.escape, row))
        assert re.search(line, text), row


def test_markup_in_names_is_shown_not_obeyed(empty, record):
    name = "rotary[bold]:x=[/]"
    assert name in printed(empty.add(record(name, 128, 9.0)), 200)


def test_paper_grid():
    rows = {row[0]: row[1:] for row in paper_grid().rows}
    assert rows["alibi, trained at 128"] == ("-", "23.98", "21.70", "20.67", "20.36", "20.29", "20.31", "20.28")
    own = "rotary, trained at the validation length"
    assert rows[own] == ("-", "-", "-", "20.07", "19.33", "-", "-", "18.57")
    assert len(rows) == 8 + 3


def test_no_results_print_nothing(empty):
    assert printed(empty, 80) == ""


def test_markdown(empty, record):
    results = empty.add(record("a|b*<i>", 128, 70.0), record("alibi", 128, 60.0))
    assert to_markdown(main_grid(results, 128)) == (
        "| method | 128<br>1x<br>63.5 | longest<br>/ 1x | training<br>tokens/s | training<br>memory |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| a\\|b\\*\\<i\\> | 70.00 | - | - | - |\n"
        "| alibi | **60.00** | - | - | - |\n"
    )


def test_formats():
    assert [format_perplexity(x) for x in (1.0, 999.99, 12345.6, 2.5e7, math.inf)] == [
        "1.00",
        "999.99",
        "12,346",
        "2.5e+07",
        "∞",
    ]
    assert [format_ratio(x) for x in (None, 0.98, 0.9984, 1.0, 1.004, 1.62, math.inf)] == [
        "-",
        "0.98x",
        "0.998x",
        "1.000x",
        "1.004x",
        "1.62x",
        "∞x",
    ]
    assert [format_memory(x) for x in (None, 2**20, 2**30 - 1, 3 * 2**29)] == ["-", "1 MiB", "1,024 MiB", "1.50 GiB"]
