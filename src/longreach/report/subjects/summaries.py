"""Summaries of meetings."""

from __future__ import annotations

from collections.abc import Iterator

from longreach.report.grid import Grid, format_interval, format_range
from longreach.report.means import mean_over_seeds
from longreach.report.section import Finding, Section, listed
from longreach.results import Results, SummaryRecord


def sections(results: Results) -> Iterator[Section]:
    """ROUGE of summaries."""
    if results.summaries:
        yield Section("Summaries of meetings", (summaries(results),), tables=(summary_grid(results),))


def summaries(results: Results) -> Finding:
    """Whose summaries overlap most with the references."""
    best, *others = sorted(mean_over_seeds(results.summaries), key=lambda entry: -entry.rouge1)
    alike = [
        _reader(entry)
        for entry in others
        if entry.rouge1_high is None or best.rouge1_low is None or entry.rouge1_high >= best.rouge1_low
    ]
    interval = "" if best.rouge1_low is None else f" {format_interval(best.rouge1_low, best.rouge1_high, points)}"
    sentence = f"{_reader(best)} has {'the highest ' if others else ''}ROUGE-1 {points(best.rouge1)}{interval}"
    cuts = [_cut(results, length) for length in sorted({entry.valid_length for entry in results.summaries})]
    return Finding(
        f"{sentence}; it cannot be told apart from {listed(alike)}." if alike else f"{sentence}.",
        f"Transcripts that did not fit and were cut: {listed(cuts)}.",
        "Intervals: 95% bootstrap over the cases. ROUGE counts shared words (characters, in scripts without spaces), "
        "not whether a summary is true.",
    )


def _cut(results: Results, length: int) -> str:
    """How many transcripts were cut at a length: a range where tokenizers differ in how much they fit into it."""
    entries = [entry for entry in results.summaries if entry.valid_length == length]
    cut, cases = (
        format_range((getattr(entry, name) for entry in entries), "{:,}".format) for name in ("truncated", "cases")
    )
    return f"{cut} of {cases} at {length:,} tokens"


def _reader(entry: SummaryRecord) -> str:
    return f"{entry.method} (trained at {entry.train_length:,}, reading {entry.valid_length:,} tokens)"


def summary_grid(results: Results) -> Grid:
    """ROUGE of summaries by method, training and validation length."""
    rows = tuple(
        (
            entry.method,
            f"{entry.train_length:,}",
            f"{entry.valid_length:,}",
            *(cell for rouge in rouges(entry) for cell in (points(rouge[0]), format_interval(*rouge[1:], text=points))),
            f"{entry.cases:,}",
            f"{entry.truncated:,}",
        )
        for entry in mean_over_seeds(results.summaries)
    )
    return Grid(
        title="Summaries of meetings (QMSum), ROUGE F-measure x 100",
        note="Cut: transcripts that did not fit the length. Intervals: 95% bootstrap over the cases.",
        columns=(
            ("method",),
            ("trained at",),
            ("length",),
            *((name, line) for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L") for line in ("", "95% interval")),
            ("cases",),
            ("cut",),
        ),
        rows=rows,
    )


def rouges(entry: SummaryRecord) -> tuple[tuple[float, float | None, float | None], ...]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, each with the ends of its interval."""
    return (
        (entry.rouge1, entry.rouge1_low, entry.rouge1_high),
        (entry.rouge2, entry.rouge2_low, entry.rouge2_high),
        (entry.rougeL, entry.rougeL_low, entry.rougeL_high),
    )


def points(share: float) -> str:
    """`16.6`: a share of one, times 100."""
    return f"{100 * share:.1f}"
