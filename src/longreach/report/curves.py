"""Panels of named curves over a logarithmic axis, drawn alike for every figure that has them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from longreach.report.drawing import (
    FONT_SIZE,
    Look,
    Margins,
    Theme,
    axes_grid,
    looks,
    set_title,
    settings,
    short,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL_PITCH = 1.35 * FONT_SIZE / 72  # inches between the baselines of neighbouring labels
_PANELS_PER_ROW = 3
OFF_SCALE = 1e9
"""Values above this are marked at the upper edge: no curve that can be compared goes there."""


@dataclass(frozen=True)
class Curve:
    """One line, named at its end."""

    method: str
    """Whose colour, marker and name it has."""
    points: dict[float, float]
    """x -> y, which may be infinite."""
    band: dict[float, tuple[float, float]] = field(default_factory=dict)
    """x -> ends of an interval, shaded."""
    remark: str = ""
    """What follows the name."""
    faint: bool = False
    """Whether it is there to compare another with: thin, dotted, and without a name."""
    seeds: tuple[dict[float, float], ...] = ()
    """x -> y of each seed that it is the mean of, drawn thin."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: all curves of one training length."""

    title: str
    train_length: int
    """Where the training length is marked."""
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Scales:
    """What the axes of a figure's panels are."""

    xlabel: str
    """Under each panel."""
    ylabel: str
    """Beside the first panel of each row."""
    x: Literal["log", "symlog"] = "log"
    """`symlog` has a place for 0."""
    y: Literal["log", "linear"] = "log"
    """How values are laid out."""
    ticks: Literal["points", "doublings"] = "points"
    """Whether ticks stand at the curves' own x, where there is room, or at doublings of the training length."""


def off_scale_note(perplexities: Iterable[float]) -> str:
    """What the reader is told of marks at the upper edge, where there are any."""
    is_off = any(perplexity > OFF_SCALE for perplexity in perplexities)
    return " Triangles at the upper edge stand for perplexities above a billion." if is_off else ""


def draw_panels(panels: list[Panel], scales: Scales, theme: Theme, panel_width: float | None = None) -> Figure:
    """The panels, of one width in inches, row by row; they share the scale of y, or they could not be compared."""
    panel_width = panel_width or (6.2 if len(panels) == 1 else 3.3)
    named = [[curve for curve in panel.curves if not curve.faint] for panel in panels]
    # To the right of each panel there is room for the names of its curves.
    longest = max((len(_label(curve)) for curves in named for curve in curves), default=0)
    margins = Margins(left=0.72, right=0.4 + text_width(longest), bottom=0.6, top=0.55)
    panel_height = max(3.1, _LABEL_PITCH * (max(map(len, named), default=0) + 1))
    values = [y for panel in panels for curve in panel.curves for y in _heights(curve)]
    ylim = _limits(values, scales.y)
    with settings():
        figure, places = axes_grid(len(panels), _PANELS_PER_ROW, (panel_width, panel_height), margins, theme)
        methods = dict.fromkeys(curve.method for panel in panels for curve in panel.curves)
        chosen = looks(list(methods), theme)
        for index, (panel, axes) in enumerate(zip(panels, places, strict=True)):
            _draw_axes(axes, panel, scales, ylim, theme)
            for curve in panel.curves:
                _draw_curve(axes, curve, chosen[curve.method], ylim[1])
            _name_curves(axes, named[index], _LABEL_PITCH / panel_height, chosen)
            if index % _PANELS_PER_ROW == 0:
                axes.set_ylabel(scales.ylabel, color=theme.ink)
    return figure


def _label(curve: Curve) -> str:
    return short(curve.method) + curve.remark


def _heights(curve: Curve) -> list[float]:
    seeds = (y for points in curve.seeds for y in points.values())
    return [*curve.points.values(), *(end for ends in curve.band.values() for end in ends), *seeds]


def _draw_axes(axes: Axes, panel: Panel, scales: Scales, ylim: tuple[float, float], theme: Theme) -> None:
    xs = sorted({float(panel.train_length), *(x for curve in panel.curves for x in curve.points)})
    if scales.x == "symlog":
        axes.set_xscale("symlog", linthresh=min((x for x in xs if x > 0), default=1.0), linscale=0.5)
        xlim = (min(xs[0], 0.0), xs[-1] * 1.15)
    else:
        axes.set_xscale("log")
        # A lone length has no spread of its own: it gets a factor of two on either side.
        pad = (xs[-1] / xs[0]) ** 0.04 if len(xs) > 1 else 2.0
        xlim = (xs[0] / pad, xs[-1] * pad)
    axes.set(yscale=scales.y, xlim=xlim, ylim=ylim)
    axes.minorticks_off()
    xticks, yticks = _length_ticks(axes, panel.train_length, xs, scales), _value_ticks(*ylim, scales.y)
    axes.set_xticks(xticks, [_number(tick) for tick in xticks])
    axes.set_yticks(yticks, [_number(tick) if tick < 1e6 else f"{tick:.0e}" for tick in yticks])
    axes.minorticks_off()
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.axvline(panel.train_length, color=theme.muted, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.set_xlabel(scales.xlabel, color=theme.ink)
    set_title(axes, panel.title, theme)


def _draw_curve(axes: Axes, curve: Curve, look: Look, ceiling: float) -> None:
    from matplotlib.markers import CARETUPBASE

    colour, marker, line = look
    drawn = [(x, y) for x, y in curve.points.items() if y <= OFF_SCALE]
    style: dict[str, Any]
    if curve.faint:
        style = {"linestyle": ":", "linewidth": 1.2}
    else:
        # The paper's curves have more points than markers have room.
        every = 0.12 if len(drawn) > 12 else 1
        style = {"linestyle": line, "linewidth": 1.6, "marker": marker, "markersize": 4.5, "markevery": every}
    axes.plot(*zip(*drawn, strict=True) if drawn else ([], []), color=colour, **style)
    for points in curve.seeds:
        within = [(x, y) for x, y in points.items() if y <= OFF_SCALE]
        axes.plot(*zip(*within, strict=True) if within else ([], []), color=colour, linewidth=0.6, alpha=0.6)
    if curve.band:
        lows, highs = zip(*curve.band.values(), strict=True)
        axes.fill_between([*curve.band], lows, highs, color=colour, alpha=0.18, linewidth=0)
    off = [x for x, y in curve.points.items() if y > OFF_SCALE]
    if off:
        edge: dict[str, Any] = {"linestyle": "", "marker": CARETUPBASE, "markersize": 7, "clip_on": False}
        axes.plot(off, [ceiling] * len(off), color=colour, **edge)


def _name_curves(axes: Axes, curves: list[Curve], pitch: float, chosen: dict[str, Look]) -> None:
    """Write each curve's name beside its end, moved up or down where names would touch."""
    ceiling = axes.get_ylim()[1]
    ends = [(max(curve.points), min(curve.points[max(curve.points)], ceiling)) for curve in curves]
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = [float(to_fraction.transform(end)[1]) for end in ends]
    order = sorted(range(len(curves)), key=lambda index: heights[index])
    furthest = max((x for x, _ in ends), default=0)
    for index, y in zip(order, _spread([heights[index] for index in order], pitch), strict=True):
        colour = chosen[curves[index].method][0]
        # The line to the name of a curve that ends early crosses the panel: dotted, it is not taken for the curve.
        leader = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.6,
            "linestyle": "-" if ends[index][0] == furthest else (0, (1, 4)),
            "relpos": (0, 0.5),
            "shrinkA": 2,
            "shrinkB": 4,
        }
        axes.annotate(
            _label(curves[index]),
            xy=ends[index],
            xytext=(1.035, y),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops=leader,
        )


def _spread(wanted: list[float], pitch: float) -> list[float]:
    """The positions nearest to the ascending `wanted` (least squares) that lie `pitch` apart, within 0 to 1.

    Without the spacing, y[i] - i * pitch must not fall: isotonic regression, by pooling neighbours that violate it.
    """
    pools: list[tuple[float, int]] = []  # (mean, members)
    for index, y in enumerate(wanted):
        mean, members = y - index * pitch, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, members = (mean * members + other * count) / (members + count), members + count
        pools.append((mean, members))
    free = [mean for mean, members in pools for _ in range(members)]
    top = max(0.0, 1 - (len(wanted) - 1) * pitch)
    return [min(max(y, 0.0), top) + index * pitch for index, y in enumerate(free)]


def _limits(values: list[float], scale: str) -> tuple[float, float]:
    drawn = [value for value in values if value <= OFF_SCALE] or [1.0, 10.0]
    low, high = min(drawn), max(drawn)
    if scale == "linear":
        pad = max(0.06 * (high - low), 0.05)
        return low - pad, high + pad
    factor = max((high / low) ** 0.06, 1.05)
    return low / factor, high * factor


def _length_ticks(axes: Axes, train_length: int, xs: list[float], scales: Scales) -> list[float]:
    """The training length first of all, then others that do not come so close as to touch."""
    low, high = axes.get_xlim()

    def touch(one: float, other: float) -> bool:
        pixels = (axes.transData.transform((x, axes.get_ylim()[0]))[0] for x in (one, other))
        room = (0.62 * max(len(_number(one)), len(_number(other))) + 1) * FONT_SIZE / 72
        return abs(next(pixels) - next(pixels)) < room * axes.figure.dpi

    if scales.ticks == "points" and len(xs) <= 10:
        ticks: list[float] = []
        for tick in (train_length, xs[-1], *xs):
            if not any(touch(tick, other) for other in ticks):
                ticks.append(tick)
        return sorted(ticks)
    for doublings in range(1, 40):
        ticks = [train_length * 2.0 ** (doublings * k) for k in range(-40 // doublings, 40 // doublings)]
        ticks = [tick for tick in ticks if low <= tick <= high and tick == int(tick)]
        if not any(touch(*pair) for pair in pairwise(ticks)):
            break
    return ticks


def _value_ticks(low: float, high: float, scale: str) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    if scale == "linear" or high / low < 4:
        ticks = [float(tick) for tick in MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**k for k in decades for digit in ([1, 2, 5] if len(decades) < 5 else [1])]
    return [tick for tick in ticks if low <= tick <= high]


def _number(value: float) -> str:
    return f"{value:,.10g}"
