import pytest

from longreach.report.findings import Finding
from longreach.report.sections import Section, sections


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
        assert section.findings or section.tables


def test_no_empty_picture(empty, skipped, training):
    first, *_ = sections(empty.add(training("alibi"), skipped("alibi", 256, "out of memory")))
    assert first.picture is None
    assert first.tables


def test_nothing_gives_no_sections(empty):
    assert sections(empty) == []


def test_every_picture_is_captioned_and_named_once(everything):
    pictured = [section for section in sections(everything) if section.picture is not None]
    names = [section.picture.name for section in pictured]
    assert len(set(names)) == len(names) == 8
    for section in pictured:
        assert section.findings
        assert section.reading
        if section.title != "Beside the paper's own curves":
            assert section.certainties


def test_findings_are_of_every_training_length(everything):
    for section in sections(everything)[2:7]:
        assert len(section.findings) == 2


def test_certainties_are_said_once():
    findings = (Finding("a", certainty="x"), Finding("b"), Finding("c", certainty="y"), Finding("d", certainty="x"))
    assert Section("title", findings).certainties == ("x", "y")
