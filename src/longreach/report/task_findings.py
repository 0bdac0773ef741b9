"""What retrieval and summaries say, in sentences."""

from __future__ import annotations

from longreach.report.findings import NAMED, Finding, listed
from longreach.report.grid import format_interval, format_multiple, format_percent, format_range
from longreach.report.selection import Score, scores
from longreach.report.task_tables import points
from longreach.results import Results, SummaryRecord

_CHANCE = {"retrieval": 1 / 108}
"""Task -> how often a guess is right: 108 words are told. The answers of the other tasks cannot be guessed."""


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
        sentence + _reservation(found, order, task, train_length, longest),
        f"Accuracy: {'; '.join(details)}.",
        f"{min(cases)} cases or more at each length: the table has 95% intervals (Wilson); a single cell of the map "
        "has fewer. Methods whose intervals overlap are not told apart.",
    )


def _reservation(
    found: dict[str, dict[int, Score]], order: list[str], task: str, train_length: int, longest: int
) -> str:
    """What keeps failures at the longest prompts from being failures to extrapolate; may be empty."""
    failing = [method for method in order if _is_chance(found[method][longest], task)]
    if longest <= train_length or not failing:
        return ""
    if not any(train_length in found[method] for method in failing):
        do = "it does" if len(failing) == 1 else "they do"
        return (
            f" {listed(failing)} had no prompts of {train_length:,} tokens: whether {do} the task there is not known."
        )
    unable = [m for m in failing if train_length in found[m] and _is_chance(found[m][train_length], task)]
    if not unable:
        return ""
    do = "does" if len(unable) == 1 else "do"
    return (
        f" At {train_length:,} tokens {listed(unable)} {do} not do the task either: failing in longer prompts says "
        "nothing about extrapolation."
    )


def _is_chance(score: Score, task: str) -> bool:
    """Whether guessing may have found as much, by the interval."""
    return score.correct == 0 or score.interval[0] <= _CHANCE.get(task, 0.0)


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
    cuts = [_cut(results, length) for length in sorted({entry.valid_length for entry in results.summaries})]
    return Finding(
        f"{sentence}; it cannot be told apart from {listed(alike)}." if alike else f"{sentence}.",
        f"Transcripts that did not fit and were cut: {listed(cuts)}.",
        "Intervals: 95% bootstrap over the cases. ROUGE counts shared words, not whether a summary is true.",
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
