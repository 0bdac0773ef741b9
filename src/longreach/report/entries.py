"""Entries of results as several subjects need them: by method, and perplexity by validation length and its growth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from longreach.report.grid import MISSING, Grid, format_multiple, format_range
from longreach.report.means import mean_over_seeds, with_spread
from longreach.results import Entry, Record, Results, Scored, Skipped
from longreach.results.records import exponentiated
from longreach.results.seeds import OverSeeds, loss_difference

LEVEL = 1.01
"""Perplexities nearer to each other than this are called unchanged."""


Kind = TypeVar("Kind", bound=Entry)


def by_method(results: Results, entries: Iterable[Kind], train_length: int) -> dict[str, list[Kind]]:
    """Method -> those of its entries that are of models trained at `train_length`, for every method that has any.

    Of several seeds it is the mean.
    """
    found: dict[str, list[Kind]] = {method: [] for method in results.methods(train_length)}
    for entry in mean_over_seeds(entry for entry in entries if entry.train_length == train_length):
        found[entry.method].append(entry)
    return {method: chosen for method, chosen in found.items() if chosen}


def perplexity_lengths(results: Results) -> tuple[int, ...]:
    """The training lengths of which there is a main table to show: asked for perplexity, or trained and so far not
    asked for anything.
    """
    trained = {entry.train_length for entry in results.training}
    asked = {entry.train_length for entry in results.entries()}
    return tuple(n for n in results.train_lengths() if n in trained - asked or results.valid_lengths(n))


def perplexity_methods(results: Results, train_length: int) -> tuple[str, ...]:
    """The methods trained at `train_length` that the main table has rows for: trained or asked for perplexity."""
    entries: tuple[Record | Skipped, ...] = (*results.records, *results.skipped)
    asked = {(entry.method, entry.train_length) for entry in entries if entry.protocol == "nonoverlapping"}
    trained = {(entry.method, entry.train_length) for entry in results.training}
    return tuple(method for method in results.methods(train_length) if (method, train_length) in trained | asked)


def longest_past(results: Results, train_length: int) -> int | None:
    """The longest validation length of the grid; None when none is past the training length."""
    longest = max(results.valid_lengths(train_length), default=0)
    return longest if longest > train_length else None


def measured_seeds(results: Results, method: str, train_length: int, valid_length: int) -> list[Record]:
    """The perplexity in nonoverlapping windows at each seed."""
    wanted = (method, train_length, valid_length, "nonoverlapping")
    return [e for e in results.records if (e.method, e.train_length, e.valid_length, e.protocol) == wanted]


def measured(results: Results, method: str, train_length: int, valid_length: int) -> Record | None:
    """The perplexity in nonoverlapping windows, mean over seeds; None where there is none."""
    return next(iter(mean_over_seeds(measured_seeds(results, method, train_length, valid_length))), None)


def growth(results: Results, method: str, train_length: int, valid_length: int) -> OverSeeds | None:
    """Perplexity at `valid_length` over the model's own at `train_length`; None when it cannot be told."""
    near, far = (measured_seeds(results, method, train_length, length) for length in (train_length, valid_length))
    difference = loss_difference(far, [entry for entry in near if not math.isinf(entry.perplexity)])
    return None if difference is None else difference.exponentiated()


def loss_ratio(over: Scored, under: Scored) -> float:
    """Perplexity over perplexity, from the losses: defined where a perplexity itself would overflow."""
    return exponentiated(over.loss - under.loss)


def grid_by_length(
    title: str,
    note: str,
    results: Results,
    train_length: int,
    value: Callable[[Record], float | None],
    text: Callable[[float], str],
    spread: bool = True,
) -> Grid:
    """A table of method by validation length: the text of a value, where there is one, and its spread over seeds."""
    columns: list[tuple[str, ...]] = [("method",)]
    rows = [[method] for method in perplexity_methods(results, train_length)]
    for length in results.valid_lengths(train_length):
        contexts = []
        for row in rows:
            seeds = measured_seeds(results, row[0], train_length, length)
            contexts += [entry.mean_context for entry in seeds]
            mean = value(mean_over_seeds(seeds)[0]) if seeds else None
            values = [found for entry in seeds if (found := value(entry)) is not None]
            row.append(MISSING if mean is None else with_spread(mean, values, text) if spread else text(mean))
        columns.append((f"{length:,}", format_multiple(length, train_length), format_range(contexts, _context)))
    return Grid(f"{title}, trained at {train_length:,} tokens", note, tuple(columns), tuple(map(tuple, rows)))


def _context(mean: float) -> str:
    return f"{mean:,.4g}" if mean < 1000 else f"{mean:,.0f}"
