"""The sections of a page and what of them a terminal shows."""

import io
import re

import pytest
from rich.console import Console

from longreach.report.page import print_tables, sections
from longreach.report.subjects.decomposition import decomposition_grid
from longreach.report.subjects.perplexity import main_grid


def titles(results):
    return [section.title for section in sections(results)]


def test_every_kind_has_its_section_in_order(everything):
    assert titles(everything) == [
        "Perplexity at each length",
        "Beside the paper's own curves",
        "Does loss fall with context?",
        "Longer context, or relief from the early token curse?",
        "Sliding windows",
        "The same tokens at other positions",
        "Recompute the window, or keep it in a cache?",
        "Speed and memory",
        "Retrieval: lines",
        "Retrieval: passkey",
        "Summaries of meetings",
        "What was left out",
    ]


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("context", ("alibi", 256, 1, 1, 7.0), ["Does loss fall with context?"]),
        ("decomposed", ("alibi", 256, 0.1, 0.1), ["Longer context, or relief from the early token curse?"]),
        ("strided", ("alibi", 256, 9.0), ["Sliding windows"]),
        ("offset", ("alibi", 0, 9.0), ["The same tokens at other positions"]),
        ("found", ("alibi", 256, 0.5, 3), ["Retrieval: lines"]),
        ("found", ("alibi", 256, 0.5, 3, 10, 128, "retrieval"), ["Retrieval: a word told once"]),
        ("summary", ("alibi", 256, 0.2), ["Summaries of meetings"]),
        ("training", ("alibi",), ["Perplexity at each length", "Beside the paper's own curves", "Speed and memory"]),
    ],
)
def test_a_section_is_there_only_with_its_records(empty, request, kind, arguments, expected):
    results = empty.add(request.getfixturevalue(kind)(*arguments))
    assert titles(results) == expected
    for section in sections(results):
        assert section.findings or section.tables or section.further


def test_no_empty_picture(empty, skipped, training):
    first, *_ = sections(empty.add(training("alibi"), skipped("alibi", 256, "out of memory")))
    assert first.picture is None
    assert first.tables


def test_nothing_gives_no_sections(empty):
    assert sections(empty) == []


def test_every_picture_is_captioned_and_named_once(everything):
    pictured = [section for section in sections(everything) if section.picture is not None]
    names = [section.picture.name for section in pictured]
    assert len(set(names)) == len(names) == 7
    for section in pictured:
        assert section.findings
        assert section.reading
        if section.title != "Beside the paper's own curves":
            assert section.certainties


def test_findings_are_of_every_training_length(everything):
    for section in sections(everything)[2:7]:
        assert len(section.findings) == 2


def printed(results, width):
    stream = io.StringIO()
    print_tables(results, Console(file=stream, width=width))
    return stream.getvalue()


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


def test_no_results_print_nothing(empty):
    assert printed(empty, 80) == ""


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
