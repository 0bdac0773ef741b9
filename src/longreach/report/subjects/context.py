"""Loss by context: whether it goes on falling past the training length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from longreach.report.curves import Curve, Panel, Scales, draw_panels
from longreach.report.drawing import LIGHT, Theme
from longreach.report.entries import by_method
from longreach.report.grid import format_range
from longreach.report.means import mean_of_intervals, one_by_one, thin_lines, unanimous
from longreach.report.section import Finding, Picture, Section, at_each, clauses, first, intervals
from longreach.results import ContextRecord, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sections(results: Results) -> Iterator[Section]:
    """Loss against context."""
    if results.contexts:
        yield Section(
            title="Does loss fall with context?",
            findings=at_each(loss_by_context, results),
            picture=Picture(
                "context",
                partial(context_figure, results),
                "Loss against tokens of context, one curve per method, with the training length marked.",
            ),
            reading=(
                "Tokens at the start of a window have little context and a high loss: the early token curse. Thin "
                "dotted curves are of windows of the training length. A curve that goes on falling past the dotted "
                "line belongs to a model that uses longer context." + thin_lines(results.contexts)
            ),
        )


def losses_of(results: Results, train_length: int) -> dict[str, dict[int, list[ContextRecord]]]:
    """Method -> validation length -> losses by context, both ascending."""
    methods = by_method(results, results.contexts, train_length)
    return {method: _by_window(entries) for method, entries in methods.items()}


def _seeds_of(results: Results, train_length: int) -> dict[str, list[dict[int, list[ContextRecord]]]]:
    """As `losses_of`, seed by seed, for methods of several."""
    singles = one_by_one(entry for entry in results.contexts if entry.train_length == train_length)
    return {method: list(map(_by_window, seeds)) for method, seeds in singles.items()}


def _by_window(entries: list[ContextRecord]) -> dict[int, list[ContextRecord]]:
    found: dict[int, list[ContextRecord]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.valid_length, entry.first_context)):
        found.setdefault(entry.valid_length, []).append(entry)
    return found


def loss_by_context(results: Results, train_length: int) -> Finding | None:
    """Whether loss goes on falling past the training length, in the longest windows of each method.

    The last bin within the training length is set beside the last bin of all; they differ when their intervals do not
    overlap.
    """
    longest = {method: lengths[max(lengths)] for method, lengths in losses_of(results, train_length).items()}
    if not longest:
        return None
    singles = _seeds_of(results, train_length)
    verdicts: dict[str, list[str]] = {"falls further with": [], "is level within the intervals with": []}
    verdicts |= {"rises with": [], "differs between seeds with": [], "cannot be judged with": []}
    details = []
    for method, entries in longest.items():
        window = entries[0].valid_length
        seeds = [seed[window] for seed in singles.get(method, ()) if window in seed]
        each = (_verdict(bins, train_length) for bins in (entries, *seeds))
        verdicts[unanimous(each, "differs between seeds with")].append(method)
        if (ends := _ends(entries, train_length)) is None:
            continue
        near, far = ends
        details.append(f"{method} {near.loss:.3f} at {_context(near)} and {far.loss:.3f} at {_context(far)}")
    if not details:
        return Finding(f"Past {train_length:,} tokens of context nothing was measured.")
    measured = [entry for entries in longest.values() for entry in entries]
    interval = intervals("Bands", {e.resampled for e in measured}, any(e.low is not None for e in measured))
    return Finding(
        f"Past {train_length:,} tokens of context, loss {clauses(verdicts)}.",
        f"Nats per token: {first(details)} tokens of context.",
        f"{interval} {mean_of_intervals(results.contexts)}Each point is of other tokens of the same text; two whose "
        "bands overlap are not told apart.",
    )


def _ends(bins: list[ContextRecord], train_length: int) -> tuple[ContextRecord, ContextRecord] | None:
    """The last bin within the training length and the last of all, where that is past it."""
    within = [entry for entry in bins if entry.last_context <= train_length]
    return (within[-1], bins[-1]) if within and bins[-1].first_context > train_length else None


def _verdict(bins: list[ContextRecord], train_length: int) -> str:
    if (ends := _ends(bins, train_length)) is None:
        return "cannot be judged with"
    near, far = ends
    if near.low is None or near.high is None or far.low is None or far.high is None:
        return "cannot be judged with"
    if far.high < near.low:
        return "falls further with"
    return "rises with" if far.low > near.high else "is level within the intervals with"


def _context(entry: ContextRecord) -> str:
    ends = (entry.first_context, entry.last_context)
    return format_range(ends, "{:,}".format)


def context_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Loss against tokens of context: in the longest windows, and faint in those of the training length."""
    panels = []
    for train_length in results.train_lengths():
        losses, singles = losses_of(results, train_length), _seeds_of(results, train_length)
        longest = max((length for lengths in losses.values() for length in lengths), default=0)
        curves = []
        for method, lengths in losses.items():
            window = max(lengths)
            remark = "" if window == longest else f" (windows of {window:,})"
            seeds = tuple(_points(seed[window]) for seed in singles.get(method, ()) if window in seed)
            curves.append(Curve(method, _points(lengths[window]), _band(lengths[window]), remark, seeds=seeds))
            if window != train_length and train_length in lengths:
                curves.append(Curve(method, _points(lengths[train_length]), faint=True))
        if curves:
            title = f"Trained at {train_length:,}, windows of {longest:,}"
            panels.append(Panel(title, train_length, tuple(curves)))
    scales = Scales("Tokens of context", "Loss in nats per token", y="linear", ticks="doublings")
    return draw_panels(panels, scales, theme)


def _middle(entry: ContextRecord) -> float:
    return math.sqrt(entry.first_context * entry.last_context)


def _points(bins: list[ContextRecord]) -> dict[float, float]:
    return {_middle(entry): entry.loss for entry in bins}


def _band(bins: list[ContextRecord]) -> dict[float, tuple[float, float]]:
    return {_middle(e): (e.low, e.high) for e in bins if e.low is not None and e.high is not None}
