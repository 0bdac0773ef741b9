"""Heat maps of accuracy by prompt length and depth, in small multiples: one for each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longreach.report.drawing import FONT_SIZE, Margins, Theme, axes_grid, settings, short, text_width
from longreach.report.grid import MISSING

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
_ROWS = "Depth"
_BELOW, _ABOVE = "0%", "100%  accuracy"  # at the ends of the colour bar


@dataclass(frozen=True)
class HeatMap:
    """One panel."""

    method: str
    train_length: int
    rows: tuple[str, ...]
    """Depths, from top to bottom."""
    columns: tuple[str, ...]
    """Prompt lengths, from left to right."""
    cells: dict[tuple[str, str], tuple[float, str]]
    """(row, column) -> accuracy, from 0 to 1, and text. What is not there was not measured."""


def draw_heat_maps(maps: list[HeatMap], theme: Theme) -> Figure:
    """The panels, cells of one size, row by row under the colour bar."""
    columns = max((len(panel.columns) for panel in maps), default=1)
    rows = max((len(panel.rows) for panel in maps), default=1)
    labels = max((len(label) for panel in maps for label in panel.rows), default=0)
    size = (columns * _CELL[0], max(rows * _CELL[1], text_width(len(_ROWS))))
    left = 0.45 + text_width(labels)
    # Narrow panels get room to the right for their titles, and for the words above that one or two must hold.
    words = text_width(len(_BELOW + _ABOVE) + 4) + _BAR[0]
    above = (left + words) / max(1, min(len(maps), 2)) - left
    right = max(0.25, text_width(_LONGEST_TITLE) - size[0], above - size[0])
    margins = Margins(left, right, bottom=0.62, top=0.5)
    per_row = max(1, int(_FIGURE_WIDTH / (left + size[0] + right)))
    with settings():
        figure, places = axes_grid(len(maps), per_row, size, margins, theme, header=_HEADER)
        for axes, panel in zip(places, maps, strict=True):
            _draw_map(axes, panel, size, theme)
        _draw_colour_bar(figure, margins.left, theme)
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


def _draw_map(axes: Axes, panel: HeatMap, size: tuple[float, float], theme: Theme) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, size[0] / _CELL[0]), ylim=(size[1] / _CELL[1], 0))
    axes.spines[:].set_visible(False)
    title = f"{short(panel.method, _LONGEST_TITLE)}\ntrained at {panel.train_length:,}"
    axes.set_title(title, loc="left", color=theme.ink, fontsize=FONT_SIZE, pad=5, linespacing=1.3)
    axes.set_xticks([j + 0.5 for j in range(len(panel.columns))], panel.columns)
    axes.set_yticks([i + 0.5 for i in range(len(panel.rows))], panel.rows)
    axes.tick_params(length=0)
    axes.set_xlabel("Prompt length in tokens", color=theme.ink, loc="left")
    axes.set_ylabel(_ROWS, color=theme.ink)
    for i, row in enumerate(panel.rows):
        for j, column in enumerate(panel.columns):
            value, text = panel.cells.get((row, column), (None, MISSING))
            fill = to_rgb(theme.paper) if value is None else shade(value, theme)
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=fill, edgecolor=theme.paper, linewidth=1.5))
            colour = theme.muted if value is None else text_on(fill, theme)
            axes.text(j + 0.5, i + 0.5, text, color=colour, ha="center", va="center", fontsize=FONT_SIZE - 0.5)


def _draw_colour_bar(figure: Figure, x: float, theme: Theme) -> None:
    """Write what the shades mean at the figure's top, from `x` inches on."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    bottom = height - 0.3
    start = x + text_width(len(_BELOW) + 1)
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
    figure.text(x / width, middle, _BELOW, color=theme.muted, va="center")
    figure.text((start + _BAR[0] + 0.07) / width, middle, _ABOVE, color=theme.muted, va="center")
