"""The tables of retrieval and summarization."""

from __future__ import annotations

from longreach.report.grid import MISSING, Grid, format_interval, format_multiple, format_percent, format_range
from longreach.report.selection import Score, scores
from longreach.results import Results, SummaryRecord


def accuracy_grid(results: Results, task: str, train_length: int) -> Grid | None:
    """Accuracy by method and prompt length, with intervals; None where the task was not measured."""
    found = scores(results, task, train_length)
    if not found:
        return None
    lengths = sorted({length for by_length in found.values() for length in by_length})
    columns: list[tuple[str, ...]] = [("method",)]
    for length in lengths:
        cases = (by_length[length].cases for by_length in found.values() if length in by_length)
        counted = f"{format_range(cases, '{:,}'.format)} cases"
        columns.append((f"{length:,}", format_multiple(length, train_length), counted))
    rows = tuple(
        (method, *(_accuracy(by_length.get(length)) for length in lengths)) for method, by_length in found.items()
    )
    return Grid(
        title=f"Accuracy of {task} by prompt length, trained at {train_length:,} tokens",
        note="Exact matches over all depths, with 95% intervals (Wilson). Columns: prompt length in tokens.",
        columns=tuple(columns),
        rows=rows,
    )


def summary_grid(results: Results) -> Grid | None:
    """ROUGE of summaries by method, training and validation length; None where none were written."""
    if not results.summaries:
        return None
    rows = tuple(
        (
            entry.method,
            f"{entry.train_length:,}",
            f"{entry.valid_length:,}",
            *(cell for rouge in rouges(entry) for cell in (points(rouge[0]), format_interval(*rouge[1:], text=points))),
            f"{entry.cases:,}",
            f"{entry.truncated:,}",
        )
        for entry in results.summaries
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


def _accuracy(score: Score | None) -> str:
    if score is None:
        return MISSING
    return f"{format_percent(score.accuracy)} {format_interval(*score.interval, text=format_percent)}"
