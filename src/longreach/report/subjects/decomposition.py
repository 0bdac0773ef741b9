"""Where gains past the training length come from: relief from the early token curse, or use of longer context."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING

from longreach.report.drawing import FONT_SIZE, LIGHT, Margins, Theme, axes_grid, set_title, settings, short, text_width
from longreach.report.entries import by_method
from longreach.report.grid import Grid, format_interval, format_multiple, format_range, format_signed
from longreach.report.means import are_repeated, mean_of_intervals, one_by_one, unanimous
from longreach.report.section import Finding, Picture, Section, at_each, clauses, first, intervals
from longreach.results import DecompositionRecord, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RELIEF = ("#a86400", "#e0a63c")
_BEYOND = ("#0068a8", "#58b0ea")
"""(shade on white, shade on black), told apart in the common forms of colour blindness; text in the colour of the paper
reads on them."""
_DIFFERS = "acts differently from seed to seed with"
_ROW = 0.34  # inches from method to method
_THICKNESS = 0.38  # of a bar, in rows: two make a method's
_BARS_WIDTH = 3.6


def sections(results: Results) -> Iterator[Section]:
    """The gain of each method, split."""
    if results.decompositions:
        yield Section(
            title="Longer context, or relief from the early token curse?",
            findings=at_each(decomposition, results),
            picture=Picture(
                "decomposition",
                partial(decomposition_figure, results),
                "Relief and beyond as bars around zero for each method and length. The table below has the numbers.",
            ),
            reading=(
                "Relief is the part of the gain that remains when no token may see more than the training length; "
                "beyond is what the context past it adds, or takes where the bar is on the left. Bars with an arrow "
                "go on past the scale, to the value written on them."
            ),
            tables=at_each(decomposition_grid, results),
        )


def decompositions_of(results: Results, train_length: int) -> list[DecompositionRecord]:
    """Those of models trained at `train_length`, by validation length, methods in order of appearance."""
    methods = by_method(results, results.decompositions, train_length)
    return sorted(chain.from_iterable(methods.values()), key=lambda entry: entry.valid_length)


def decomposition(results: Results, train_length: int) -> Finding | None:
    """Which methods use context beyond the training length, at the longest length at which gains were split."""
    entries = decompositions_of(results, train_length)
    if not entries:
        return None
    longest = max(entry.valid_length for entry in entries)
    entries = [entry for entry in entries if entry.valid_length == longest]
    verdicts: dict[str, list[str]] = {"helps": [], "may help": [], "makes no difference that can be told with": []}
    verdicts |= {"harms": [], _DIFFERS: [], "cannot be judged, for want of intervals, with": []}
    singles = one_by_one(
        e for e in results.decompositions if (e.train_length, e.valid_length) == (train_length, longest)
    )
    for entry in entries:
        seeds = (single for seed in singles.get(entry.method, ()) for single in seed)
        verdicts[unanimous(map(_verdict_on_use, (entry, *seeds)), _DIFFERS)].append(entry.method)
    span = f"From {train_length:,} to {longest:,} tokens ({format_multiple(longest, train_length)})"
    details = [
        f"{e.method} {format_signed(e.gain)} (relief {format_signed(e.relief)}, beyond {format_signed(e.beyond)})"
        for e in sorted(entries, key=lambda entry: -entry.gain)
    ]
    drawn = any(entry.beyond_low is not None for entry in entries)
    interval = intervals("Whiskers", {entry.resampled for entry in entries}, drawn)
    return Finding(
        f"{span}, context beyond {train_length:,} {clauses(verdicts)}.",
        f"Gain in nats per token: {first(details)}.",
        f"{interval} {mean_of_intervals(results.decompositions)}{_exactness(entries)}",
    )


def _verdict_on_use(entry: DecompositionRecord) -> str:
    if entry.beyond_low is None or entry.beyond_high is None:
        return "cannot be judged, for want of intervals, with"
    if entry.beyond_high < 0:
        return "harms"
    if entry.beyond_low <= 0:
        return "makes no difference that can be told with"
    return "helps" if entry.stride == 1 else "may help"


def _exactness(entries: list[DecompositionRecord]) -> str:
    if all(entry.stride == 1 for entry in entries):
        return "With stride 1 the split is exact for these tokens."
    strides = format_range((entry.stride for entry in entries), "{:,}".format)
    return (
        f"The capped windows slid by {strides}, which left their tokens somewhat less context than the training length "
        "(the table says how much): where loss falls with context, beyond is an upper bound and relief a lower one."
    )


def decomposition_grid(results: Results, train_length: int) -> Grid | None:
    """Gain, relief and beyond of each method at each validation length, with intervals."""
    entries = decompositions_of(results, train_length)
    if not entries:
        return None
    rows = tuple(
        (
            entry.method,
            f"{entry.valid_length:,}",
            format_signed(entry.gain),
            f"{format_signed(entry.relief)} {format_interval(entry.relief_low, entry.relief_high)}",
            f"{format_signed(entry.beyond)} {format_interval(entry.beyond_low, entry.beyond_high)}",
            f"{entry.stride:,}",
            f"{entry.capped_context:,.4g}",
        )
        for entry in entries
    )
    return Grid(
        title=f"Where the gain comes from, in nats per token, trained at {train_length:,} tokens",
        note=(
            "Gain: fall of the loss from windows of the training length to windows of the validation length. It is "
            "the sum of relief, which remains when no token may see more than the training length, and beyond. "
            "Stride and mean context are those of the windows that were so capped."
        ),
        columns=(
            ("method",),
            ("validation", "length"),
            ("gain",),
            ("relief", "95% interval"),
            ("beyond", "95% interval"),
            ("capped", "stride"),
            ("capped", "context"),
        ),
        rows=rows,
    )


def decomposition_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Relief over beyond, two bars that start at zero, for each method at each length past the training length."""
    from matplotlib.ticker import MaxNLocator

    panels = {length: decompositions_of(results, length) for length in results.train_lengths()}
    panels = {length: entries for length, entries in panels.items() if entries}
    everything = [entry for entries in panels.values() for entry in entries]
    low, high = decomposition_limits([*everything, *results.decompositions])
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
            singles = [e for e in results.decompositions if e.train_length == train_length]
            _draw_bars(axes, train_length, entries, singles if are_repeated(singles) else [], theme)
            _explain_bars(axes, theme, any(e.relief_low is not None for e in entries), are_repeated(singles))
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


def _draw_bars(
    axes: Axes, train_length: int, entries: list[DecompositionRecord], singles: list[DecompositionRecord], theme: Theme
) -> None:
    """Bars from top to bottom, each validation length under a heading of its own."""
    labels: list[tuple[str, str]] = []  # text and colour of each row
    for valid_length, group in groupby(entries, key=lambda entry: entry.valid_length):
        labels.append((_heading(valid_length, train_length), theme.muted))
        for entry in group:
            seeds = [one for one in singles if (one.method, one.valid_length) == (entry.method, valid_length)]
            _draw_method(axes, len(labels), entry, seeds, theme)
            labels.append((short(entry.method), theme.ink))
    axes.set_yticks(range(len(labels)), [text for text, _ in labels])
    for label, (_, colour) in zip(axes.get_yticklabels(), labels, strict=True):
        label.set_color(colour)
    axes.tick_params(axis="y", length=0)


def _heading(valid_length: int, train_length: int) -> str:
    return f"{valid_length:,} tokens ({format_multiple(valid_length, train_length)})"


def _draw_method(
    axes: Axes, y: float, entry: DecompositionRecord, seeds: list[DecompositionRecord], theme: Theme
) -> None:
    """Relief above, beyond below, and between them the gain, which the table alone has where one is off the scale."""
    dots = [(one.relief, y - 0.8 * _THICKNESS) for one in seeds] + [(one.beyond, y + 0.8 * _THICKNESS) for one in seeds]
    for x, height in dots:
        if x >= axes.get_xlim()[0]:
            axes.plot([x], [height], marker=".", markersize=3, color=theme.ink, markeredgewidth=0, zorder=4)
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


def _explain_bars(axes: Axes, theme: Theme, have_intervals: bool, have_seeds: bool) -> None:
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
    if have_seeds:
        handles.append(Line2D([], [], linestyle="", marker=".", markersize=3, color=theme.ink, label="seeds"))
    axes.legend(
        handles=handles,
        loc="lower left",
        # A fifth word would leave the figure to the right: it begins over the names then, where nothing stands.
        bbox_to_anchor=(-0.08 if have_seeds else 0, 1),
        ncols=len(handles),
        frameon=False,
        labelcolor=theme.ink,
        borderpad=0,
        handlelength=1,
        handletextpad=0.5,
        columnspacing=1,
        borderaxespad=0.3,
    )
