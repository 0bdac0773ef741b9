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
    evaluation_memory_grid,
    main_grid,
    paper_grid,
    print_tables,
    skipped_grid,
    training_grid,
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
    assert main_grid(results, 128).rows == (("alibi", "70.00"),)


def test_methods_of_other_tasks_have_no_row(empty, record, found):
    results = empty.add(record("alibi", 128, 70.0), found("bloom", 128, 0.5, 3), record("t5", 256, 9.0, 256))
    assert [row[0] for row in main_grid(results, 128).rows] == ["alibi"]


def test_bits_per_byte(empty, record):
    bits = 4096 * math.log2(70) / 16000
    assert bits_per_byte_grid(empty.add(record("alibi", 128, 70.0)), 128).rows == (("alibi", f"{bits:.3f}"),)


def test_skipped_cells_of_one_reason_stand_together(demo):
    (row,) = skipped_grid(demo).rows
    assert row == ("its table holds 128 positions", "learned", "128", "nonoverlapping at 256, 512, 1,024, 2,048")


def test_what_was_skipped_for_one_reason_is_one_row_as_long_as_it_is_the_same(empty, skipped):
    def offsets(method, train_length=128):
        entry = skipped(method, 64, "too short", train_length)
        return replace(entry, task="offsets", stride=None, protocol=None)

    entries = []
    for method, train_length in (("a", 128), ("b", 128), ("a", 256), ("b", 256), ("c", 128)):
        entries += [skipped(method, n, "too short", train_length) for n in (512, 64)]
        entries.append(replace(entries[-1], stride=1, protocol="cached"))
    entries += [offsets("a"), offsets("b"), offsets("a", 256), offsets("b", 256), skipped("c", 128, "out of memory")]
    assert skipped_grid(empty.add(*entries)).rows == (
        ("too short", "a, b", "128, 256", "nonoverlapping at 64, 512; cached, offsets at 64"),
        ("too short", "c", "128", "nonoverlapping at 64, 512; cached at 64"),
        ("out of memory", "c", "128", "nonoverlapping at 128"),
    )


def test_columns_of_what_nobody_measured_are_left_out(empty, record, training):
    results = empty.add(record("alibi", 128, 70.0), record("alibi", 256, 77.0))
    assert main_grid(results, 128).rows == (("alibi", "70.00", "77.00", "1.10x"),)
    some = results.add(replace(training("t5"), peak_memory=None))
    assert main_grid(some, 128).columns[-1] == ("training", "tokens/s")
    assert cost_grid(some).columns[-1] == ("training", "tokens/s")
    assert training_grid(some).columns[-1] == ("seconds",)
    assert main_grid(some.add(training("rotary")), 128).columns[-1] == ("training", "memory")
    unknown = [replace(entry, peak_memory=None) for entry in results.records]
    assert evaluation_memory_grid(empty.add(*unknown), 128) is None
    assert evaluation_memory_grid(empty.add(record("t5", 128, 70.0), *unknown[1:]), 128).rows[1][1:] == ("-", "-")


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
    slow = training("t5", speed=3041.13, peak_memory=None)
    results = empty.add(training("sinusoidal"), slow, training("alibi", 64), record("t5", 128, 70.0))
    grid = cost_grid(results)
    assert [column[0] for column in grid.columns].count("/ sinusoidal's") == 2
    assert grid.rows == (
        ("alibi", "64", "9,123", "-", "-", "1.50 GiB", "-"),
        ("sinusoidal", "128", "9,123", "1.0x", "-", "1.50 GiB", "1.0x"),
        ("t5", "128", "3,041", "0.33x", "41,234", "-", "-"),
    )
    assert "on the CPU all that the process held" in grid.note
    assert "within 5% they count as alike" in grid.note
    both = cost_grid(results.add(record("sinusoidal", 128, 70.0)))
    assert both.columns[5] == ("/ sinusoidal's", "at that length")
    assert [row[5] for row in both.rows] == ["-", "1.0x", "1.0x"]
    alone = cost_grid(empty.add(training("alibi")))
    assert alone.rows == (("alibi", "128", "9,123", "1.50 GiB"),)


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
