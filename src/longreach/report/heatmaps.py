"""Heat maps in small multiples: retrieval by length and depth, perplexity by length and stride."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longreach.report.drawing import FONT_SIZE, LIGHT, Margins, Theme, axes_grid, settings, short, text_width
from longreach.report.grid import format_perplexity
from longreach.report.selection import find_strided, sliding_strides, stride_lengths
from longreach.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOW = ("#eef2f6", "#232a32")
_HIGH = ("#004f86", "#8fcdff")
"""(shade on white, shade on black) of the ends of the scale: one hue, lightness alone tells the value."""
_CELL = (0.62, 0.32)  # inches
_FIGURE_WIDTH = 10.8  # inches, at most
_BAR = (1.5, 0.12)  # inches
_HEADER = 0.4  # inches, for the colour bar
_STEPS = 48  # of the colour bar
_LONGEST_TITLE = 24  # characters


@dataclass(frozen=True)
class HeatMap:
    """One panel."""

    title: str
    """What stands above it."""
    rows: tuple[str, ...]
    """From top to bottom."""
    columns: tuple[str, ...]
    """From left to right."""
    cells: dict[tuple[int, int], tuple[float, str]]
    """(row, column) -> value and text. What is not there was not measured."""


@dataclass(frozen=True)
class Scale:
    """What the axes and the colours of a figure stand for."""

    xlabel: str
    """Under each panel."""
    ylabel: str
    """Beside each panel."""
    colour: str
    """What the shade shows."""
    low: str
    """The value at shade 0."""
    high: str
    """The value at shade 1."""
    place: Callable[[float], float] = float
    """Value -> shade from 0 to 1."""


def retrieval_figure(results: Results, task: str, theme: Theme = LIGHT) -> Figure:
    """Answers found by prompt length and depth, one panel for each model."""
    entries = [entry for entry in results.retrieval if entry.task == task]
    models = [(m, n) for n in results.train_lengths() for m in results.methods(n)]
    maps = []
    for method, train_length in models:
        depths = sorted({entry.depth for entry in entries if entry.train_length == train_length})
        lengths = sorted({entry.valid_length for entry in entries if entry.train_length == train_length})
        cells = {
            (depths.index(e.depth), lengths.index(e.valid_length)): (e.accuracy, f"{e.correct}/{e.cases}")
            for e in entries
            if (e.method, e.train_length) == (method, train_length)
        }
        if cells:
            rows, columns = tuple(f"{depth:.0%}" for depth in depths), tuple(f"{length:,}" for length in lengths)
            maps.append(HeatMap(_title(method, train_length), rows, columns, cells))
    return draw_heat_maps(maps, Scale("Prompt length in tokens", "Depth", "accuracy", "0%", "100%"), theme)


def stride_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Perplexity by validation length and stride, one panel for each model, shaded by its logarithm."""
    maps = []
    for train_length in results.train_lengths():
        strides = (*sliding_strides(results, train_length), None)
        columns = tuple("none" if stride is None else f"{stride:,}" for stride in strides)
        for method in results.methods(train_length):
            lengths = stride_lengths(results, method, train_length)
            cells = {
                (i, j): (entry.perplexity, format_perplexity(entry.perplexity))
                for i, length in enumerate(lengths)
                for j, stride in enumerate(strides)
                if (entry := find_strided(results, method, train_length, length, stride)) is not None
            }
            if cells:
                rows = tuple(f"{length:,}" for length in lengths)
                maps.append(HeatMap(_title(method, train_length), rows, columns, cells))
    values = [value for panel in maps for value, _ in panel.cells.values() if value < math.inf] or [1.0]
    low, high = min(values), max(values)

    def place(value: float) -> float:
        return 0.0 if value <= low else min(1.0, math.log(value / low) / (math.log(high / low) or 1.0))

    ends = format_perplexity(low), format_perplexity(high)
    scale = Scale("Stride (none: no overlap)", "Validation length", "perplexity, logarithmic", *ends, place)
    return draw_heat_maps(maps, scale, theme)


def draw_heat_maps(maps: list[HeatMap], scale: Scale, theme: Theme) -> Figure:
    """The panels, cells of one size, row by row under the colour bar."""
    columns = max((len(panel.columns) for panel in maps), default=1)
    rows = max((len(panel.rows) for panel in maps), default=1)
    labels = max((len(label) for panel in maps for label in panel.rows), default=0)
    size = (columns * _CELL[0], max(rows * _CELL[1], text_width(len(scale.ylabel))))
    left = 0.45 + text_width(labels)
    # Narrow panels get room to the right for their titles, and for the words above that one or two must hold.
    words = text_width(len(scale.low + scale.high + scale.colour) + 6) + _BAR[0]
    above = (left + words) / max(1, min(len(maps), 2)) - left
    right = max(0.25, text_width(_LONGEST_TITLE) - size[0], above - size[0])
    margins = Margins(left, right, bottom=0.62, top=0.5)
    per_row = max(1, int(_FIGURE_WIDTH / (left + size[0] + right)))
    with settings():
        figure, places = axes_grid(len(maps), per_row, size, margins, theme, header=_HEADER)
        for axes, panel in zip(places, maps, strict=True):
            _draw_map(axes, panel, size, scale, theme)
        _draw_colour_bar(figure, margins.left, scale, theme)
    return figure


def shade(value: float, theme: Theme) -> tuple[float, float, float]:
    """The colour of a value from 0 to 1."""
    from matplotlib.colors import to_rgb

    low, high = to_rgb(_LOW[theme.shade]), to_rgb(_HIGH[theme.shade])
    red, green, blue = (a + (b - a) * value for a, b in zip(low, high, strict=True))
    return red, green, blue


def text_on(colour: tuple[float, float, float], theme: Theme) -> str:
    """The one of ink and paper that is read better on a colour."""
    return max((theme.ink, theme.paper), key=lambda text: contrast(text, colour))


def contrast(one: str | tuple[float, float, float], other: str | tuple[float, float, float]) -> float:
    """Contrast ratio of two colours, from 1 to 21 (W3C, Web Content Accessibility Guidelines 2.2)."""
    from matplotlib.colors import to_rgb

    def luminance(colour: str | tuple[float, float, float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _title(method: str, train_length: int) -> str:
    return f"{short(method, _LONGEST_TITLE)}\ntrained at {train_length:,}"


def _draw_map(axes: Axes, panel: HeatMap, size: tuple[float, float], scale: Scale, theme: Theme) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, size[0] / _CELL[0]), ylim=(size[1] / _CELL[1], 0))
    axes.spines[:].set_visible(False)
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=FONT_SIZE, pad=5, linespacing=1.3)
    axes.set_xticks([j + 0.5 for j in range(len(panel.columns))], panel.columns)
    axes.set_yticks([i + 0.5 for i in range(len(panel.rows))], panel.rows)
    axes.tick_params(length=0)
    axes.set_xlabel(scale.xlabel, color=theme.ink, loc="left")
    axes.set_ylabel(scale.ylabel, color=theme.ink)
    for i in range(len(panel.rows)):
        for j in range(len(panel.columns)):
            value, text = panel.cells.get((i, j), (None, "-"))
            fill = to_rgb(theme.paper) if value is None else shade(scale.place(value), theme)
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=fill, edgecolor=theme.paper, linewidth=1.5))
            colour = theme.muted if value is None else text_on(fill, theme)
            axes.text(j + 0.5, i + 0.5, text, color=colour, ha="center", va="center", fontsize=FONT_SIZE - 0.5)


def _draw_colour_bar(figure: Figure, x: float, scale: Scale, theme: Theme) -> None:
    """Write what the shades mean at the figure's top, from `x` inches on."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    bottom = height - 0.3
    start = x + text_width(len(scale.low) + 1)
    for step in range(_STEPS):
        # Each step reaches under the next one, or hairlines would show between them.
        reach = _BAR[0] * min(2, _STEPS - step) / _STEPS
        figure.add_artist(
            Rectangle(
                ((start + _BAR[0] * step / _STEPS) / width, bottom / height),
                reach / width,
                _BAR[1] / height,
                transform=figure.transFigure,
                facecolor=shade(step / (_STEPS - 1), theme),
                linewidth=0,
            )
        )
    middle = (bottom + _BAR[1] / 2) / height
    figure.text(x / width, middle, scale.low, color=theme.muted, va="center")
    words = f"{scale.high}  {scale.colour}"
    figure.text((start + _BAR[0] + 0.07) / width, middle, words, color=theme.muted, va="center")
