"""What retrieval and summaries say, in sentences."""

from __future__ import annotations

from longreach.report.findings import NAMED, Finding, listed
from longreach.report.grid import format_interval, format_multiple, format_percent
from longreach.report.selection import scores
from longreach.report.task_tables import points
from longreach.results import Results, SummaryRecord


def retrieval(results: Results, task: str, train_length: int) -> Finding | None:
    """Who finds most at the longest prompts, and whom that sets apart; None where the task was not measured."""
    found = scores(results, task, train_length)
    if not found:
        return None
    longest = max(length for by_length in found.values() for length in by_length)
    at_longest = {method: by_length[longest] for method, by_length in found.items() if longest in by_length}
    order = sorted(at_longest, key=lambda method: -at_longest[method].accuracy)
    best = at_longest[order[0]]
    where = f"in prompts of {longest:,} tokens ({format_multiple(longest, train_length)} the training length)"
    if best.correct == 0:
        sentence = f"Trained at {train_length:,}, no method finds a single answer of {task} {where}."
    else:
        alike = [method for method in order[1:] if at_longest[method].interval[1] >= best.interval[0]]
        apart = f"; {listed(alike)} cannot be told apart from it" if alike else ""
        leads = "finds" if len(order) == 1 else "finds most,"
        answers = f"{best.correct} of {best.cases} answers of {task}"
        sentence = f"Trained at {train_length:,}, {order[0]} {leads} {answers} {where}{apart}."
    details = []
    for method in order[:NAMED]:
        shortest = min(found[method])
        begins = f", {format_percent(found[method][shortest].accuracy)} at {shortest:,}" if shortest < longest else ""
        details.append(f"{method} {format_percent(at_longest[method].accuracy)} at {longest:,}{begins}")
    cases = [score.cases for by_length in found.values() for score in by_length.values()]
    return Finding(
        sentence,
        f"Accuracy: {'; '.join(details)}.",
        f"{min(cases)} cases or more at each length: the table has 95% intervals (Wilson); a single cell of the map "
        "has fewer. Methods whose intervals overlap are not told apart.",
    )


def summaries(results: Results) -> Finding | None:
    """Whose summaries overlap most with the references; None where none were written."""
    if not results.summaries:
        return None
    best, *others = sorted(results.summaries, key=lambda entry: -entry.rouge1)
    alike = [
        _reader(entry)
        for entry in others
        if entry.rouge1_high is None or best.rouge1_low is None or entry.rouge1_high >= best.rouge1_low
    ]
    interval = "" if best.rouge1_low is None else f" {format_interval(best.rouge1_low, best.rouge1_high, points)}"
    sentence = f"{_reader(best)} has {'the highest ' if others else ''}ROUGE-1 {points(best.rouge1)}{interval}"
    cut, cases = (sum(getattr(entry, name) for entry in results.summaries) for name in ("truncated", "cases"))
    return Finding(
        f"{sentence}; it cannot be told apart from {listed(alike)}." if alike else f"{sentence}.",
        f"{cut:,} of {cases:,} transcripts did not fit and were cut.",
        "Intervals: 95% bootstrap over the cases. ROUGE counts shared words, not whether a summary is true.",
    )


def _reader(entry: SummaryRecord) -> str:
    return f"{entry.method} (trained at {entry.train_length:,}, reading {entry.valid_length:,} tokens)"
