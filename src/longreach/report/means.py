"""Models that differ in their seeds alone, shown as one: means, spreads, single seeds, and what is said of them.

Each figure of a page is the mean over the seeds that there are: of losses, so that a perplexity is exp of a mean loss;
of the ends of bootstrap intervals, which speak for other texts; of speeds and the like. Answers are added up.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from longreach.report.grid import format_range
from longreach.results import Entry, Model, Record, RetrievalRecord, Scored, TrainingRecord
from longreach.results.seeds import OverSeeds, loss_difference

Kind = TypeVar("Kind", bound=Entry | TrainingRecord)
"""An entry of results."""


def mean_over_seeds(entries: Iterable[Kind]) -> list[Kind]:
    """One entry for all that are of one cell but for the seed, in order of appearance; where there is one, itself."""
    groups: dict[Hashable, list[Kind]] = {}
    for entry in entries:
        key = () if isinstance(entry, TrainingRecord) else entry.key
        rest = (part for part in key if not isinstance(part, Model))
        groups.setdefault((entry.method, entry.train_length, *rest), []).append(entry)
    return [group[0] if len(group) == 1 else _mean(group) for group in groups.values()]


def _mean(group: list[Kind]) -> Kind:
    one = group[0]
    changes: dict[str, Any] = {"model": replace(one.model, seed=None)}
    for name in (field.name for field in fields(one)):
        values = [getattr(entry, name) for entry in group]
        if None in values:
            changes[name] = None
        elif isinstance(one, RetrievalRecord) and name in ("correct", "cases"):
            changes[name] = sum(values)
        elif isinstance(values[0], float):
            changes[name] = statistics.fmean(values)
        elif isinstance(values[0], int):
            changes[name] = round(statistics.fmean(values))
    losses = [entry.loss for entry in group if isinstance(entry, Scored)]
    if losses:
        changes["nll"] = statistics.fmean(losses) * changes["tokens"]
    return replace(one, **changes)


def one_by_one(entries: Iterable[Kind]) -> dict[str, list[list[Kind]]]:
    """Method -> its entries seed by seed, where there are several; of entries of one training length."""
    found: dict[str, dict[int | None, list[Kind]]] = {}
    for entry in entries:
        found.setdefault(entry.method, {}).setdefault(entry.seed, []).append(entry)
    return {method: list(seeds.values()) for method, seeds in found.items() if len(seeds) > 1}


def with_spread(mean: float, values: list[float], text: Callable[[float], str]) -> str:
    """`73.5 ± 1.4`: a mean and the standard deviation of the values at single seeds, to two digits of it and not more
    decimals than `text` gives; `1.2e+07 ± 4.9e+05` where that has an exponent. Of one seed it is the text alone.
    """
    deviation = 0.0 if math.inf in values or len(values) == 1 else statistics.stdev(values)
    if not deviation:
        return text(mean)
    if "e" in text(mean):
        return f"{text(mean)} ± {deviation:.1e}"
    decimals = len(text(mean).partition(".")[2])
    digits = max(0, min(decimals, 1 - math.floor(math.log10(deviation))))
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"


def ratio_to(ours: list[Record], theirs: list[Record]) -> OverSeeds | None:
    """Perplexity over perplexity, paired by seed; None where they share fewer than two or scored other tokens."""
    difference = loss_difference(ours, theirs)
    return None if difference is None or difference.n == 1 else difference.exponentiated()


def seed_counts(entries: Iterable[Entry | TrainingRecord]) -> set[int]:
    """How many seeds methods have: {3}, or {2, 3} where they differ."""
    models = {entry.model for entry in entries}
    return set(Counter((model.name, model.train_length) for model in models).values())


def counted(entries: Iterable[Entry | TrainingRecord]) -> str:
    """`3`, and `2-3` where methods differ in how many seeds they have."""
    return format_range(seed_counts(entries), str)


def are_repeated(entries: Iterable[Entry | TrainingRecord]) -> bool:
    """Whether any method has more than one seed."""
    return max(seed_counts(entries), default=0) > 1


def thin_lines(entries: Iterable[Entry]) -> str:
    """What the reader is told of the single seeds in a figure, where there are several."""
    return " Thin lines are single seeds." if are_repeated(entries) else ""


def unanimous(verdicts: Iterable[str], otherwise: str) -> str:
    """The verdict that the mean and each of the seeds give, or what is said where they differ."""
    distinct = set(verdicts)
    return distinct.pop() if len(distinct) == 1 else otherwise


def mean_of_intervals(entries: Sequence[Entry]) -> str:
    """What is to be added of bootstrap intervals where there are several seeds; ends in a space."""
    if not are_repeated(entries):
        return ""
    return f"Figures and ends of intervals are means over {counted(entries)} seeds; a verdict is one of every seed. "


def on_chance(entries: Sequence[Entry]) -> str:
    """What is said where there are no intervals: that there is one seed, or over how many the figures are means."""
    if are_repeated(entries):
        return f"Each figure is the mean over {counted(entries)} seeds."
    return "Each figure is of one model from one seed: a difference of a percent or two may be chance."
