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
                "line belongs to a model that uses longer context."
            ),
        )


def losses_of(results: Results, train_length: int) -> dict[str, dict[int, list[ContextRecord]]]:
    """Method -> validation length -> losses by context, both ascending."""
    found: dict[str, dict[int, list[ContextRecord]]] = {}
    for method, entries in by_method(results, results.contexts, train_length).items():
        for entry in sorted(entries, key=lambda entry: (entry.valid_length, entry.first_context)):
            found.setdefault(method, {}).setdefault(entry.valid_length, []).append(entry)
    return found


def loss_by_context(results: Results, train_length: int) -> Finding | None:
    """Whether loss goes on falling past the training length, in the longest windows of each method.

    The last bin within the training length is set beside the last bin of all; they differ when their intervals do not
    overlap.
    """
    longest = {method: lengths[max(lengths)] for method, lengths in losses_of(results, train_length).items()}
    if not longest:
        return None
    verdicts: dict[str, list[str]] = {"falls further with": [], "is level within the intervals with": []}
    verdicts |= {"rises with": [], "cannot be judged with": []}
    details = []
    for method, entries in longest.items():
        within = [entry for entry in entries if entry.last_context <= train_length]
        if not within or entries[-1].first_context <= train_length:
            verdicts["cannot be judged with"].append(method)
            continue
        near, far = within[-1], entries[-1]
        verdicts[_verdict_on_loss(near, far)].append(method)
        details.append(f"{method} {near.loss:.3f} at {_context(near)} and {far.loss:.3f} at {_context(far)}")
    if not details:
        return Finding(f"Past {train_length:,} tokens of context nothing was measured.")
    measured = [entry for entries in longest.values() for entry in entries]
    interval = intervals("Bands", {e.resampled for e in measured}, any(e.low is not None for e in measured))
    return Finding(
        f"Past {train_length:,} tokens of context, loss {clauses(verdicts)}.",
        f"Nats per token: {first(details)} tokens of context.",
        f"{interval} Each point is of other tokens of the same text; two whose bands overlap are not told apart.",
    )


def _verdict_on_loss(near: ContextRecord, far: ContextRecord) -> str:
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
        losses = losses_of(results, train_length)
        longest = max((length for lengths in losses.values() for length in lengths), default=0)
        curves = []
        for method, lengths in losses.items():
            window = max(lengths)
            remark = "" if window == longest else f" (windows of {window:,})"
            curves.append(_loss_curve(method, lengths[window], remark=remark))
            if window != train_length and train_length in lengths:
                curves.append(_loss_curve(method, lengths[train_length], faint=True))
        if curves:
            title = f"Trained at {train_length:,}, windows of {longest:,}"
            panels.append(Panel(title, train_length, tuple(curves)))
    scales = Scales("Tokens of context", "Loss in nats per token", y="linear", ticks="doublings")
    return draw_panels(panels, scales, theme)


def _loss_curve(method: str, bins: list[ContextRecord], *, remark: str = "", faint: bool = False) -> Curve:
    def middle(entry: ContextRecord) -> float:
        return math.sqrt(entry.first_context * entry.last_context)

    bands = {middle(e): (e.low, e.high) for e in bins if e.low is not None and e.high is not None and not faint}
    return Curve(method, {middle(entry): entry.loss for entry in bins}, bands, remark, faint)
