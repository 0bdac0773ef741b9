"""What the numbers say, in sentences: the headline, and whether the shape is the paper's.

A method *extrapolates* here when its perplexity at the longest validation length is at or below its own at the
training length. That alone does not make it the best model, so the lowest perplexity is named beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, pairwise

from longreach.report.grid import format_multiple, format_perplexity, format_ratio
from longreach.report.paper_tables import EXTRAPOLATION_TABLES, METHODS, paper_curve
from longreach.report.selection import growth, longest_past, perplexity_methods
from longreach.results import Record, Results

NAMED = 6
"""So many methods are named one by one in a sentence; the rest are counted."""
ONE_SEED = "Each figure is of one model from one seed: a difference of a percent or two may be chance."
"""What is said where there are no intervals."""


@dataclass(frozen=True)
class Finding:
    """A conclusion and what it rests on."""

    sentence: str
    """What to conclude."""
    details: str = ""
    """The figures behind it; may be empty."""
    certainty: str = ""
    """How sure one can be of it; may be empty."""


def extrapolation(results: Results, train_length: int) -> Finding:
    """Which methods extrapolate from `train_length` to the longest length measured, and how far the others worsen."""
    longest = longest_past(results, train_length)
    if longest is None:
        return Finding(f"Nothing was tested past the training length of {train_length:,} tokens.")
    ratios = {
        method: growth(results, method, train_length, longest) for method in perplexity_methods(results, train_length)
    }
    known = sorted((ratio, method) for method, ratio in ratios.items() if ratio is not None)
    span = f"from {train_length:,} to {longest:,} tokens ({format_multiple(longest, train_length)})"
    if not known:
        return Finding(f"No method has a usable perplexity at both ends, {span}: extrapolation cannot be judged.")

    holds = [f"{method} ({format_ratio(ratio)})" for ratio, method in known if ratio <= 1]
    worsens = [f"{method} ({format_ratio(ratio)})" for ratio, method in known if ratio > 1]
    unknown = [method for method, ratio in ratios.items() if ratio is None]
    if holds:
        verb = "extrapolates" if len(holds) == 1 else "extrapolate"
        sentence = f"{listed(holds)} {verb} {span}: perplexity ends at or below where it began."
    else:
        sentence = f"No method extrapolates {span}: every perplexity measured at both ends grew."
    details = [f"Perplexity grows with {listed(worsens)}."] if worsens else []
    if unknown:
        details.append(f"Not judged, for want of a usable figure at one end: {listed(unknown)}.")
    return Finding(sentence, " ".join([*details, *_lowest_at(results, train_length, longest)]))


def agreement_with_paper(results: Results, train_length: int) -> Finding:
    """Compare growth over 1x with the paper's table whose training length is nearest (in proportion).

    Shape is two things: which methods worsen, and the order of methods from least to most growth. The sizes differ
    with the model, the corpus and the training length and are given, not judged.
    """
    paper_length = min(EXTRAPOLATION_TABLES, key=lambda length: abs(math.log(length / train_length)))
    table = f"Table {EXTRAPOLATION_TABLES[paper_length]}, L = {paper_length:,}"
    shared = [method for method in METHODS if isinstance(results.find(method, train_length, train_length), Record)]
    longest_in_paper = max(paper_curve("alibi", paper_length)) / paper_length
    lengths = [n for n in results.valid_lengths(train_length) if 1 < n / train_length <= longest_in_paper]
    for valid_length in reversed(lengths):
        multiple = valid_length / train_length
        ours = {method: growth(results, method, train_length, valid_length) for method in shared}
        theirs = {method: _growth_in_paper(method, paper_length, multiple) for method in shared}
        pairs = {m: (a, b) for m in shared if (a := ours[m]) is not None and (b := theirs[m]) is not None}
        if len(pairs) > 1:
            break
    else:
        return Finding(f"Fewer than two methods can be compared with the paper ({table}).")

    same_direction = sum((a > 1) == (b > 1) for a, b in pairs.values())
    couples = list(combinations(pairs.values(), 2))
    same_order = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in couples)
    where = f"at {format_multiple(valid_length, train_length)} the training length ({table})"
    if same_direction == len(pairs) and same_order == len(couples):
        sentence = f"The shape agrees with the paper's {where}: the same methods worsen, in the same order."
    else:
        verdict = "agrees only in part with" if same_direction and same_order else "does not agree with"
        sentence = (
            f"The shape {verdict} the paper's {where}: {same_direction} of {len(pairs)} methods move in the same"
            f" direction, {same_order} of {len(couples)} pairs of methods stand in the same order."
        )
    figures = (f"{m} {format_ratio(a)} here, {format_ratio(b)} in the paper" for m, (a, b) in pairs.items())
    return Finding(sentence, f"Perplexity over its own at 1x: {'; '.join(figures)}.")


def _growth_in_paper(method: str, train_length: int, multiple: float) -> float | None:
    """Perplexity at `multiple` x train_length over that at 1x, straight between measured points on log-log axes."""
    curve = [
        (math.log(length), math.log(perplexity)) for length, perplexity in paper_curve(method, train_length).items()
    ]
    x = math.log(multiple * train_length)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - curve[0][1])
    return None


def _lowest_at(results: Results, train_length: int, valid_length: int) -> list[str]:
    entries = (results.find(method, train_length, valid_length) for method in perplexity_methods(results, train_length))
    measured = [(entry.perplexity, entry.method) for entry in entries if isinstance(entry, Record)]
    if len(measured) < 2 or math.isinf(min(measured)[0]):
        return []
    perplexity, method = min(measured)
    return [f"The lowest perplexity at {valid_length:,} is {method}'s, {format_perplexity(perplexity)} per token."]


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`; of many the first few and how many more."""
    if len(names) > NAMED:
        names = [*names[: NAMED - 1], f"{len(names) - NAMED + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
