import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from longreach.report.context_tables import decomposition_grid
from longreach.report.tables import (
    bits_per_byte_grid,
    cost_grid,
    main_grid,
    paper_grid,
    print_tables,
    skipped_grid,
    word_grid,
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
    sliding = replace(record("alibi", 256, 60.0), stride=1, protocol="sliding-window")
    results = empty.add(record("alibi", 128, 70.0), sliding, record("alibi", 64, 80.0, train_length=64))
    assert main_grid(results, 128).rows == (("alibi", "70.00", "-", "-", "-"),)


def test_methods_of_other_tasks_have_no_row(empty, record, found):
    results = empty.add(record("alibi", 128, 70.0), found("bloom", 128, 0.5, 3), record("t5", 256, 9.0, 256))
    assert [row[0] for row in main_grid(results, 128).rows] == ["alibi"]


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


@pytest.mark.parametrize("width", [40, 80])
def test_intervals_stay_whole_in_a_narrow_terminal(everything, width):
    text = printed(everything, width)
    rows = decomposition_grid(everything, 128).rows
    assert rows
    for row in rows:
        assert re.search(" +".join(map(re.escape, row)), text), row


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


def test_perplexity_per_word_is_there_where_words_were_counted(empty, record):
    counted = replace(record("alibi", 128, 70.0), words=3000)
    assert word_grid(empty.add(record("alibi", 128, 70.0)), 128) is None
    grid = word_grid(empty.add(counted, record("t5", 128, 60.0)), 128)
    assert grid.rows == (("alibi", f"{70 ** (4096 / 3000):.2f}"), ("t5", "-"))


def test_cost_is_as_in_the_papers_table_and_relative_to_sinusoidal_at_the_same_length(empty, record, training):
    slow = replace(training("t5"), tokens_per_second=3041.13, peak_memory=None)
    results = empty.add(training("sinusoidal"), slow, training("alibi", 64), record("t5", 128, 70.0))
    grid = cost_grid(results)
    assert [column[0] for column in grid.columns].count("/ sinusoidal's") == 3
    assert grid.rows == (
        ("alibi", "64", "9,123", "-", "-", "-", "1.50 GiB", "-"),
        ("sinusoidal", "128", "9,123", "1.000x", "-", "-", "1.50 GiB", "1.000x"),
        ("t5", "128", "3,041", "0.33x", "41,234", "-", "-", "-"),
    )
    alone = cost_grid(empty.add(training("alibi")))
    assert alone.rows == (("alibi", "128", "9,123", "-", "1.50 GiB"),)


def test_the_terminal_shows_each_kind_that_was_measured(everything, empty, found):
    text = printed(everything, 200)
    for title in (
        "Perplexity per token, trained at 128",
        "Perplexity per word, trained at 256",
        "Where the gain comes from",
        "Perplexity per token by stride",
        "Ways to use a window",
        "Accuracy of lines",
        "Accuracy of passkey",
        "Summaries of meetings",
        "Skipped",
    ):
        assert title in text
    assert [
        line for line in printed(empty.add(found("alibi", 128, 0.5, 3)), 200).splitlines() if "trained" in line
    ] == ["Accuracy of lines by prompt length, trained at 128 tokens"]
