"""Picks out of results what the tables, figures and findings of one subject share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longreach.results import ContextRecord, DecompositionRecord, OffsetRecord, Record, Results, TrainingRecord

BASELINE = "sinusoidal"
"""The method that the paper sets the others beside."""
WAYS = {
    "sliding-window": "recomputed",
    "cached": "cached",
    "cached-shifted": "shifted",
    "cached-unbounded": "unbounded",
}
"""Protocol -> what a way to move a window over a text is called on the page."""
Z = 1.959963984540054
"""Standard deviations that hold 95% of a normal distribution around its mean."""


def perplexity_lengths(results: Results) -> tuple[int, ...]:
    """The training lengths of which there is a main table to show: asked for perplexity, or trained and so far not
    asked for anything.
    """
    trained = {entry.train_length for entry in results.training}
    asked = {entry.train_length for entry in results.entries()}
    return tuple(n for n in results.train_lengths() if n in trained - asked or results.valid_lengths(n))


def perplexity_methods(results: Results, train_length: int) -> tuple[str, ...]:
    """The methods trained at `train_length` that the main table has rows for: trained or asked for perplexity."""
    trained = {entry.method for entry in results.training if entry.train_length == train_length}
    measured = {entry.method for entry in _of_protocol(results, train_length, "nonoverlapping")}
    skipped = {e.method for e in results.skipped if (e.train_length, e.protocol) == (train_length, "nonoverlapping")}
    rows = trained | measured | skipped
    return tuple(method for method in results.methods(train_length) if method in rows)


def growth(results: Results, method: str, train_length: int, valid_length: int) -> float | None:
    """Perplexity at `valid_length` over the method's own at `train_length`; None when it cannot be told."""
    own, long = (results.find(method, train_length, length) for length in (train_length, valid_length))
    if not isinstance(own, Record) or not isinstance(long, Record) or math.isinf(own.perplexity):
        return None
    return long.perplexity / own.perplexity


def longest_past(results: Results, train_length: int) -> int | None:
    """The longest validation length of the grid; None when none is past the training length."""
    longest = max(results.valid_lengths(train_length), default=0)
    return longest if longest > train_length else None


def costs(results: Results, entry: TrainingRecord) -> tuple[float, float | None, int | None]:
    """Training tokens/s, evaluation tokens/s in nonoverlapping windows of the training length, peak memory of training.

    None stands for what was not measured.
    """
    record = results.find(entry.method, entry.train_length, entry.train_length)
    scored = record.tokens_per_second if isinstance(record, Record) else None
    return entry.tokens_per_second, scored, entry.peak_memory


def ratio(value: float | None, other: float | None) -> float | None:
    """`value` over `other`; None where one of them was not measured."""
    return value / other if value is not None and other else None


def contexts_of(results: Results, train_length: int, method: str) -> dict[int, list[ContextRecord]]:
    """Validation length -> losses by context of one method, both ascending."""
    found: dict[int, list[ContextRecord]] = {}
    for entry in sorted(results.contexts, key=lambda entry: (entry.valid_length, entry.first_context)):
        if (entry.train_length, entry.method) == (train_length, method):
            found.setdefault(entry.valid_length, []).append(entry)
    return found


def decompositions_of(results: Results, train_length: int) -> list[DecompositionRecord]:
    """Those of models trained at `train_length`, by validation length, methods in order of appearance."""
    methods = results.methods(train_length)
    found = [entry for entry in results.decompositions if entry.train_length == train_length]
    return sorted(found, key=lambda entry: (entry.valid_length, methods.index(entry.method)))


def sliding_strides(results: Results, train_length: int) -> tuple[int, ...]:
    """Strides of the sliding windows measured, ascending."""
    return tuple(sorted({entry.stride for entry in _of_protocol(results, train_length, "sliding-window")}))


def stride_lengths(results: Results, method: str, train_length: int) -> tuple[int, ...]:
    """Validation lengths at which a method has nonoverlapping or sliding windows; none without the latter."""
    sliding, plain = (
        {entry.valid_length for entry in _of_protocol(results, train_length, protocol) if entry.method == method}
        for protocol in ("sliding-window", "nonoverlapping")
    )
    return tuple(sorted(sliding | plain)) if sliding else ()


def find_strided(
    results: Results, method: str, train_length: int, valid_length: int, stride: int | None
) -> Record | None:
    """The perplexity at a stride, or of nonoverlapping windows when `stride` is None."""
    protocol = "nonoverlapping" if stride is None else "sliding-window"
    entry = results.find(method, train_length, valid_length, stride=stride, protocol=protocol)
    return entry if isinstance(entry, Record) else None


def offsets_of(results: Results, train_length: int) -> dict[str, list[OffsetRecord]]:
    """Method -> its losses at shifted positions, ascending by offset, at the shortest validation length measured."""
    found = [entry for entry in results.offsets if entry.train_length == train_length]
    shortest = min((entry.valid_length for entry in found), default=0)
    found = sorted((entry for entry in found if entry.valid_length == shortest), key=lambda entry: entry.offset)
    by_method = {
        method: [entry for entry in found if entry.method == method] for method in results.methods(train_length)
    }
    return {method: entries for method, entries in by_method.items() if entries}


def ways_of(results: Results, train_length: int) -> dict[tuple[str, int], dict[str, Record]]:
    """(method, validation length) -> protocol -> record, where a cache was tried.

    Of the sliding windows of one length the smallest stride is taken: the nearest to one step of a stream.
    """
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for protocol in WAYS:
        for entry in sorted(_of_protocol(results, train_length, protocol), key=lambda entry: entry.stride):
            found.setdefault((entry.method, entry.valid_length), {}).setdefault(protocol, entry)
    methods = results.methods(train_length)
    cached = [key for key, ways in found.items() if set(ways) - {"sliding-window"}]
    return {key: found[key] for key in sorted(cached, key=lambda key: (methods.index(key[0]), key[1]))}


def loss_ratio(over: Record | OffsetRecord, under: Record | OffsetRecord) -> float:
    """Perplexity over perplexity, from the losses: defined where a perplexity itself would overflow."""
    difference = over.nll / over.tokens - under.nll / under.tokens
    return math.exp(difference) if difference < 709 else math.inf


def _of_protocol(results: Results, train_length: int, protocol: str) -> list[Record]:
    return [e for e in results.records if (e.train_length, e.protocol) == (train_length, protocol)]


@dataclass(frozen=True)
class Score:
    """Answers found, over all depths."""

    correct: int
    """Exact matches."""
    cases: int
    """Prompts."""

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


def retrieval_tasks(results: Results) -> tuple[str, ...]:
    """Names of the retrieval tasks, in order of appearance."""
    return tuple(dict.fromkeys(entry.task for entry in results.retrieval))


def scores(results: Results, task: str, train_length: int) -> dict[str, dict[int, Score]]:
    """Method -> validation length -> the answers at all depths together, lengths ascending."""
    found: dict[str, dict[int, Score]] = {}
    for entry in sorted(results.retrieval, key=lambda entry: entry.valid_length):
        if (entry.task, entry.train_length) == (task, train_length):
            by_length = found.setdefault(entry.method, {})
            before = by_length.get(entry.valid_length, Score(0, 0))
            by_length[entry.valid_length] = Score(before.correct + entry.correct, before.cases + entry.cases)
    return {method: found[method] for method in results.methods(train_length) if method in found}
