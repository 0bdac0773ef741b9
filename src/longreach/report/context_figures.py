"""What lies behind a perplexity, drawn: loss by context, where gains come from, and shifted positions."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

from longreach.report.drawing import FONT_SIZE, LIGHT, Margins, Theme, axes_grid, set_title, settings, short, text_width
from longreach.report.grid import format_multiple, format_signed
from longreach.report.line_panels import Curve, Panel, Scales, draw_panels
from longreach.report.selection import contexts_of, decompositions_of, offsets_of
from longreach.results import ContextRecord, DecompositionRecord, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RELIEF = ("#a86400", "#e0a63c")
_BEYOND = ("#0068a8", "#58b0ea")
"""(shade on white, shade on black), told apart in the common forms of colour blindness; text in the colour of the paper
reads on them."""
_ROW = 0.34  # inches from method to method
_THICKNESS = 0.38  # of a bar, in rows: two make a method's
_BARS_WIDTH = 3.6


def context_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Loss against tokens of context: in the longest windows, and faint in those of the training length."""
    panels = []
    for train_length in results.train_lengths():
        by_method = {method: contexts_of(results, train_length, method) for method in results.methods(train_length)}
        longest = max((length for lengths in by_method.values() for length in lengths), default=0)
        curves = []
        for method, lengths in by_method.items():
            if not lengths:
                continue
            own = max(lengths)
            remark = "" if own == longest else f" (windows of {own:,})"
            curves.append(_loss_curve(method, lengths[own], remark=remark))
            if own != train_length and train_length in lengths:
                curves.append(_loss_curve(method, lengths[train_length], faint=True))
        if curves:
            title = f"Trained at {train_length:,}, windows of {longest:,}"
            panels.append(Panel(title, train_length, tuple(curves)))
    scales = Scales("Tokens of context", "Loss in nats per token", y="linear", ticks="doublings")
    return draw_panels(panels, scales, 6.2 if len(panels) == 1 else 3.3, theme)


def _loss_curve(method: str, bins: list[ContextRecord], *, remark: str = "", faint: bool = False) -> Curve:
    def middle(entry: ContextRecord) -> float:
        return math.sqrt(entry.first_context * entry.last_context)

    bands = {middle(e): (e.low, e.high) for e in bins if e.low is not None and e.high is not None and not faint}
    return Curve(method, {middle(entry): entry.loss for entry in bins}, bands, remark, faint)


def offset_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Perplexity of the same tokens against the position of each window's first token."""
    panels = []
    for train_length in results.train_lengths():
        methods = offsets_of(results, train_length)
        if methods:
            curves = (Curve(m, {float(e.offset): e.perplexity for e in entries}) for m, entries in methods.items())
            panels.append(Panel(f"Trained at {train_length:,} tokens", train_length, tuple(curves)))
    scales = Scales("Position of the window's first token", "Perplexity per token", x="symlog")
    return draw_panels(panels, scales, 6.2 if len(panels) == 1 else 3.3, theme)


def decomposition_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Relief over beyond, two bars that start at zero, for each method at each length past the training length."""
    from matplotlib.ticker import MaxNLocator

    panels = {length: decompositions_of(results, length) for length in results.train_lengths()}
    panels = {length: entries for length, entries in panels.items() if entries}
    everything = [entry for entries in panels.values() for entry in entries]
    low, high = decomposition_limits(everything)
    labels = [short(entry.method) for entry in everything]
    labels += [_heading(entry.valid_length, entry.train_length) for entry in everything]
    rows = max((len(entries) + len({e.valid_length for e in entries}) for entries in panels.values()), default=1)
    margins = Margins(left=0.3 + text_width(max(map(len, labels), default=0)), right=0.55, bottom=0.6, top=0.85)
    with settings():
        figure, places = axes_grid(len(panels), 2, (_BARS_WIDTH, _ROW * (rows + 0.4)), margins, theme)
        for axes, (train_length, entries) in zip(places, panels.items(), strict=True):
            axes.set(xlim=(low, high), ylim=(rows - 0.3, -0.7))
            axes.spines["left"].set_visible(False)
            axes.axvline(0, color=theme.muted, linewidth=0.8, zorder=1)
            axes.grid(True, axis="x", color=theme.grid, linewidth=0.8)
            axes.set_xlabel("Gain in nats per token", color=theme.ink)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
            set_title(axes, f"Trained at {train_length:,} tokens", theme, pad=26)
            _draw_bars(axes, train_length, entries, theme)
            _explain_bars(axes, theme, any(entry.relief_low is not None for entry in entries))
    return figure


def decomposition_limits(entries: list[DecompositionRecord]) -> tuple[float, float]:
    """Ends of the scale of gains: a loss greater than any gain is cut off, for it could hide all others."""
    ends = [value for entry in entries for value in _ends(entry)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    if high > 0:
        low = max(low, -high)
    pad = 0.06 * (high - low) or 0.01
    return min(low, 0.0) - pad, max(high, 0.0) + pad


def _ends(entry: DecompositionRecord) -> list[float]:
    """Where the bars and the intervals of an entry end, and where its gain stands."""
    ends = [entry.relief, entry.beyond, entry.gain]
    intervals = [entry.relief_low, entry.relief_high, entry.beyond_low, entry.beyond_high]
    return [0.0, *ends, *(end for end in intervals if end is not None)]


def _draw_bars(axes: Axes, train_length: int, entries: list[DecompositionRecord], theme: Theme) -> None:
    """Bars from top to bottom, each validation length under a heading of its own."""
    labels: list[tuple[str, str]] = []  # text and colour of each row
    for valid_length, group in groupby(entries, key=lambda entry: entry.valid_length):
        labels.append((_heading(valid_length, train_length), theme.muted))
        for entry in group:
            _draw_method(axes, len(labels), entry, theme)
            labels.append((short(entry.method), theme.ink))
    axes.set_yticks(range(len(labels)), [text for text, _ in labels])
    for label, (_, colour) in zip(axes.get_yticklabels(), labels, strict=True):
        label.set_color(colour)
    axes.tick_params(axis="y", length=0)


def _heading(valid_length: int, train_length: int) -> str:
    return f"{valid_length:,} tokens ({format_multiple(valid_length, train_length)})"


def _draw_method(axes: Axes, y: float, entry: DecompositionRecord, theme: Theme) -> None:
    """Relief above, beyond below, and between them the gain, which the table alone has where one is off the scale."""
    relief, beyond = (entry.relief_low, entry.relief_high), (entry.beyond_low, entry.beyond_high)
    _draw_bar(axes, y - _THICKNESS / 2, "relief", entry.relief, relief, _RELIEF[theme.shade], theme)
    _draw_bar(axes, y + _THICKNESS / 2, "beyond", entry.beyond, beyond, _BEYOND[theme.shade], theme)
    if min(entry.relief, entry.beyond, entry.gain) >= axes.get_xlim()[0]:
        axes.plot([entry.gain], [y], marker="D", markersize=3.6, color=theme.ink, markeredgecolor=theme.paper, zorder=4)


def _draw_bar(
    axes: Axes, y: float, name: str, size: float, interval: tuple[float | None, float | None], colour: str, theme: Theme
) -> None:
    """One bar with its whisker, or, where it goes on past the scale, with its name and value."""
    from matplotlib.patheffects import withStroke

    low, high = interval
    axes.barh(y, size, height=_THICKNESS, color=colour, linewidth=0, zorder=2)
    if size < axes.get_xlim()[0]:
        axes.annotate(
            f"◂ {name} {format_signed(size)}",
            (0, y),
            xytext=(3, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=theme.paper,
            fontsize=FONT_SIZE - 1.5,
            va="center_baseline",
            zorder=5,
        )
    elif low is not None and high is not None:
        edge = [withStroke(linewidth=2.4, foreground=theme.paper)]  # sets it off from its bar
        axes.plot(
            [low, high], [y] * 2, marker="|", markersize=5, color=theme.ink, linewidth=0.9, zorder=3, path_effects=edge
        )


def _explain_bars(axes: Axes, theme: Theme, have_intervals: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=_RELIEF[theme.shade], label="relief"),
        Patch(color=_BEYOND[theme.shade], label="beyond"),
        Line2D([], [], linestyle="", marker="D", markersize=3.6, color=theme.ink, label="gain: the sum"),
    ]
    if have_intervals:
        interval = Line2D([], [], linewidth=0.9, marker="|", markersize=5, color=theme.ink, label="95% interval")
        handles.insert(2, interval)
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
        labelcolor=theme.ink,
        borderpad=0,
        handlelength=1,
        handletextpad=0.5,
        columnspacing=1,
        borderaxespad=0.3,
    )
