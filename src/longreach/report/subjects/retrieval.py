"""Answers found in long prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from longreach.report.drawing import LIGHT, Theme
from longreach.report.entries import by_method
from longreach.report.grid import MISSING, Grid, format_interval, format_multiple, format_percent, format_range
from longreach.report.heat_maps import HeatMap, draw_heat_maps
from longreach.report.means import are_repeated, counted
from longreach.report.section import NAMED, Finding, Picture, Section, at_each, listed
from longreach.results import Results, RetrievalRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = TypeVar("Key", bound=Hashable)
_CHANCE = {"retrieval": 1 / 108}
"""Task -> how often a guess is right: 108 words are told. The answers of the other tasks cannot be guessed."""
Z = 1.959963984540054
"""Standard deviations that hold 95% of a normal distribution around its mean."""


def sections(results: Results) -> Iterator[Section]:
    """A section for each task, in order of appearance."""
    for task in dict.fromkeys(entry.task for entry in results.retrieval):
        yield Section(
            title="Retrieval: a word told once" if task == "retrieval" else f"Retrieval: {task}",
            findings=at_each(partial(retrieval, task), results),
            picture=Picture(
                f"retrieval-{quote(task, safe='', errors='surrogatepass')}",
                partial(retrieval_figure, task, results),
                f"Answers of {task} found, by prompt length and depth, one map per model. The table below sums over "
                "depth.",
            ),
            reading=(
                "Cells: exact matches of cases. Depth: where the answer stood, 0% at the prompt's start, 100% at its "
                "end."
            ),
            tables=at_each(partial(accuracy_grid, task), results),
        )


@dataclass(frozen=True)
class Score:
    """Answers found, over all depths."""

    correct: int
    cases: int

    @property
    def accuracy(self) -> float:
        """correct / cases."""
        return self.correct / self.cases

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy (Wilson, 1927), which holds for few cases and near 0 and 1 too."""
        shrink = 1 + Z**2 / self.cases
        center = (self.accuracy + Z**2 / (2 * self.cases)) / shrink
        spread = self.accuracy * (1 - self.accuracy) / self.cases + (Z / (2 * self.cases)) ** 2
        half = Z * math.sqrt(spread) / shrink
        return max(0.0, center - half), min(1.0, center + half)


def scores(task: str, results: Results, train_length: int) -> dict[str, dict[int, Score]]:
    """Method -> validation length -> the answers at all depths together, lengths ascending."""
    methods = _of_task(task, results, train_length)
    return {method: dict(sorted(_summed(methods[method], lambda e: e.valid_length).items())) for method in methods}


def _of_task(task: str, results: Results, train_length: int) -> dict[str, list[RetrievalRecord]]:
    return by_method(results, (entry for entry in results.retrieval if entry.task == task), train_length)


def _summed(entries: list[RetrievalRecord], key: Callable[[RetrievalRecord], Key]) -> dict[Key, Score]:
    """The answers of all entries of one key together."""
    found: dict[Key, Score] = {}
    for entry in entries:
        before = found.get(key(entry), Score(0, 0))
        found[key(entry)] = Score(before.correct + entry.correct, before.cases + entry.cases)
    return found


def retrieval(task: str, results: Results, train_length: int) -> Finding | None:
    """Who finds most at the longest prompts, and whom that sets apart; None where the task was not measured."""
    found = scores(task, results, train_length)
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
        f"has fewer. Methods whose intervals overlap are not told apart.{_pooled(task, results, train_length)}",
    )


def _pooled(task: str, results: Results, train_length: int) -> str:
    chosen = [entry for entry in results.retrieval if (entry.task, entry.train_length) == (task, train_length)]
    if not are_repeated(chosen):
        return ""
    return f" Answers of {counted(chosen)} seeds are counted together, and the intervals take them for independent."


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


def retrieval_figure(task: str, results: Results, theme: Theme = LIGHT) -> Figure:
    """Answers found by prompt length and depth, one panel for each model."""
    maps = []
    for train_length in results.train_lengths():
        methods = _of_task(task, results, train_length)
        entries = [entry for chosen in methods.values() for entry in chosen]
        rows = tuple(dict.fromkeys(map(format_percent, sorted(entry.depth for entry in entries))))
        columns = tuple(map("{:,}".format, sorted({entry.valid_length for entry in entries})))
        for method, chosen in methods.items():
            found = _summed(chosen, lambda entry: (format_percent(entry.depth), f"{entry.valid_length:,}"))
            cells = {place: (score.accuracy, f"{score.correct}/{score.cases}") for place, score in found.items()}
            maps.append(HeatMap(method, train_length, rows, columns, cells))
    return draw_heat_maps(maps, theme)


def accuracy_grid(task: str, results: Results, train_length: int) -> Grid | None:
    """Accuracy by method and prompt length, with intervals; None where the task was not measured."""
    found = scores(task, results, train_length)
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


def _accuracy(score: Score | None) -> str:
    if score is None:
        return MISSING
    return f"{format_percent(score.accuracy)} {format_interval(*score.interval, text=format_percent)}"
