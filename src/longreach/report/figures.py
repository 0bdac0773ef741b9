"""Perplexity against validation length, for our results and for the paper's, drawn alike.

The figures depend on the numbers, the theme and the version of matplotlib only: not on the user's matplotlibrc, the
time or a random id, so that the same results give the same bytes. matplotlib is imported where it is used.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longreach.report.paper_tables import EXTRAPOLATION_TABLES, METHODS, paper_curve
from longreach.results import Record, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the curves, and which of a curve's two shades is used."""

    ink: str
    """Text."""
    muted: str
    """Ticks and the line at the training length."""
    grid: str
    """Grid lines."""
    paper: str
    """Background."""
    shade: int
    """0 takes the darker shade of each curve's pair, 1 the lighter."""


LIGHT = Theme(ink="#1c2128", muted="#59636e", grid="#e4e7eb", paper="#ffffff", shade=0)
DARK = Theme(ink="#e6e9ed", muted="#9aa4b0", grid="#2c333c", paper="#15191e", shade=1)

# (shade on white, shade on black), marker. The hues are those of Okabe and Ito, told apart in the common forms of
# colour blindness, darkened or lightened until text in them reads on its background. The markers say it once more.
_LOOKS: dict[str, tuple[tuple[str, str], str]] = {
    "alibi": (("#0068a8", "#58b0ea"), "o"),
    "rotary": (("#b06a00", "#f0b040"), "s"),
    "sinusoidal": (("#b83a00", "#ff8552"), "^"),
    "t5": (("#007a5a", "#35c79b"), "D"),
    "sinusoidal-shifted": (("#a8507f", "#e79cc6"), "v"),
    "learned": (("#6f5bb5", "#b3a4f0"), "P"),
    "none": (("#59636e", "#a9b3be"), "X"),
}
_LINES = ("-", "--", "-.", ":")
_FONT_SIZE = 9.0
_LABEL_PITCH = 1.35 * _FONT_SIZE / 72  # inches between the baselines of neighbouring labels
_LONGEST_LABEL = 34
OFF_SCALE = 1e9
"""Perplexities above this are marked at the upper edge: no curve that can be compared goes there."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: all curves of one training length."""

    title: str
    """What stands above it."""
    train_length: int
    """Where the training length is marked."""
    curves: dict[str, dict[int, float]]
    """Method -> validation length -> perplexity per token or word, which may be infinite."""


def perplexity_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Perplexity per token against validation length, one panel per training length."""
    panels = []
    for train_length in results.train_lengths():
        curves = {}
        for method in results.methods(train_length):
            entries = (results.find(method, train_length, n) for n in results.valid_lengths(train_length))
            curve = {entry.valid_length: entry.perplexity for entry in entries if isinstance(entry, Record)}
            if curve:
                curves[method] = curve
        panels.append(Panel(f"Trained at {train_length:,} tokens", train_length, curves))
    return _draw(panels, "Perplexity per token", 6.2 if len(panels) == 1 else 3.3, theme)


def paper_figure(theme: Theme = LIGHT) -> Figure:
    """The paper's Tables 2, 3 and 4 in the same style."""
    panels = [
        Panel(
            f"Trained at {train_length:,} (Table {table})",
            train_length,
            {method: paper_curve(method, train_length) for method in METHODS},
        )
        for train_length, table in EXTRAPOLATION_TABLES.items()
    ]
    return _draw(panels, "Perplexity per word", 2.6, theme)


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, its text as outlines, so that it looks the same on every machine."""
    buffer = io.BytesIO()
    with _settings():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 200 dots per inch."""
    buffer = io.BytesIO()
    with _settings():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Names are the user's: a dollar sign in one is a dollar sign. The salt replaces random ids.
        matplotlib.rcParams.update(
            {"text.parse_math": False, "svg.hashsalt": "longreach", "font.size": _FONT_SIZE, "axes.linewidth": 0.8}
        )
        yield


def _draw(panels: list[Panel], ylabel: str, panel_width: float, theme: Theme) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most_curves = max((len(panel.curves) for panel in panels), default=0)
    left, bottom, top = 0.72, 0.6, 0.55  # inches, as all lengths here
    panel_height = max(3.1, _LABEL_PITCH * (most_curves + 1))
    # To the right of each panel there is room for the names of its curves.
    rights = [0.35 + 0.6 * _FONT_SIZE / 72 * max(map(len, map(_short, p.curves)), default=0) for p in panels]
    width = left + len(panels) * panel_width + sum(rights)
    height = bottom + panel_height + top
    # The panels share one scale, or their curves could not be compared.
    ylim = _limits([value for panel in panels for curve in panel.curves.values() for value in curve.values()])
    with _settings():
        figure = Figure(figsize=(width, height), facecolor=theme.paper)
        FigureCanvasAgg(figure)
        looks = _looks(list(dict.fromkeys(method for panel in panels for method in panel.curves)), theme)
        for index, panel in enumerate(panels):
            x = left + index * panel_width + sum(rights[:index])
            axes = figure.add_axes((x / width, bottom / height, panel_width / width, panel_height / height))
            _draw_axes(axes, panel, ylim, panel_width, theme)
            _draw_curves(axes, panel.curves, ylim[1], looks)
            _name_curves(axes, panel.curves, ylim, _LABEL_PITCH / panel_height, looks)
        if panels:
            figure.axes[0].set_ylabel(ylabel, color=theme.ink)
    return figure


def _draw_axes(axes: Axes, panel: Panel, ylim: tuple[float, float], panel_width: float, theme: Theme) -> None:
    lengths = sorted({panel.train_length, *(length for curve in panel.curves.values() for length in curve)})
    # A lone length has no spread of its own: it gets a factor of two on either side.
    pad = (lengths[-1] / lengths[0]) ** 0.04 if len(lengths) > 1 else 2.0
    xlim = (lengths[0] / pad, lengths[-1] * pad)
    axes.set(xscale="log", yscale="log", xlim=xlim, ylim=ylim, facecolor=theme.paper)
    xticks, yticks = _length_ticks(lengths, panel.train_length, xlim, panel_width), _perplexity_ticks(*ylim)
    axes.set_xticks(xticks, [f"{tick:,}" for tick in xticks])
    axes.set_yticks(yticks, [f"{tick:,.10g}" if tick < 1e6 else f"{tick:.0e}" for tick in yticks])
    axes.minorticks_off()
    axes.tick_params(colors=theme.muted, labelcolor=theme.muted, length=3)
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    axes.axvline(panel.train_length, color=theme.muted, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.set_xlabel("Validation length in tokens", color=theme.ink)
    axes.set_title(panel.title, loc="left", color=theme.ink, fontsize=_FONT_SIZE + 1, pad=10)


Look = tuple[str, str, str]
"""Colour, marker, line style."""


def _looks(methods: list[str], theme: Theme) -> dict[str, Look]:
    """A method always has the same colour; its variants (`rotary:scaling=ntk`) differ from it in the line."""
    looks: dict[str, Look] = {}
    known = list(_LOOKS.values())
    for method in methods:
        base = method.partition(":")[0]
        # A name from outside this package takes the colour that its spelling picks, the same in every report.
        colours, marker = _LOOKS.get(base) or known[zlib.crc32(base.encode("utf-8", "replace")) % len(known)]
        alike = sum(look[:2] == (colours[theme.shade], marker) for look in looks.values())
        looks[method] = (colours[theme.shade], marker, _LINES[alike % len(_LINES)])
    return looks


def _draw_curves(axes: Axes, curves: dict[str, dict[int, float]], ceiling: float, looks: dict[str, Look]) -> None:
    from matplotlib.markers import CARETUPBASE

    for method, curve in curves.items():
        colour, marker, line = looks[method]
        drawn = [(length, value) for length, value in curve.items() if value <= OFF_SCALE]
        # The paper's curves have more points than markers have room.
        every = 0.12 if len(drawn) > 12 else 1
        axes.plot(
            *zip(*drawn, strict=True) if drawn else ([], []),
            color=colour,
            linestyle=line,
            linewidth=1.6,
            marker=marker,
            markersize=4.5,
            markevery=every,
        )
        off = [length for length, value in curve.items() if value > OFF_SCALE]
        axes.plot(
            off,
            [ceiling] * len(off),
            color=colour,
            linestyle="",
            marker=CARETUPBASE,
            markersize=7,
            clip_on=False,
        )


def _name_curves(
    axes: Axes, curves: dict[str, dict[int, float]], ylim: tuple[float, float], pitch: float, looks: dict[str, Look]
) -> None:
    """Write each curve's name beside its end, moved up or down where names would touch."""
    low, high = map(math.log, ylim)
    ends = {method: min(curve[max(curve)], ylim[1]) for method, curve in curves.items()}
    furthest = max((max(curve) for curve in curves.values()), default=0)
    methods = sorted(ends, key=lambda method: ends[method])
    wanted = [(math.log(ends[method]) - low) / (high - low) for method in methods]
    for method, y in zip(methods, _spread(wanted, pitch), strict=True):
        # The line to the name of a curve that ends early crosses the panel: dotted, it is not taken for the curve.
        leader = {
            "arrowstyle": "-",
            "color": looks[method][0],
            "linewidth": 0.6,
            "linestyle": "-" if max(curves[method]) == furthest else (0, (1, 4)),
            "relpos": (0, 0.5),
            "shrinkA": 2,
            "shrinkB": 4,
        }
        axes.annotate(
            _short(method),
            xy=(max(curves[method]), ends[method]),
            xytext=(1.035, y),
            textcoords="axes fraction",
            color=looks[method][0],
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


def _limits(values: list[float]) -> tuple[float, float]:
    drawn = [value for value in values if value <= OFF_SCALE] or [1.0, 10.0]
    low, high = min(drawn), max(drawn)
    pad = max((high / low) ** 0.06, 1.05)
    return low / pad, high * pad


def _length_ticks(lengths: list[int], train_length: int, xlim: tuple[float, float], panel_width: float) -> list[int]:
    """The lengths themselves, or doublings of the training length where they are many; never so close as to touch."""
    candidates = [train_length, lengths[-1], *lengths]
    if len(lengths) > 10:
        candidates = [train_length * 2**k for k in range(20) if train_length * 2**k <= xlim[1]]
    inches = panel_width / math.log(xlim[1] / xlim[0])
    ticks: list[int] = []
    for tick in candidates:
        room = (0.62 * len(f"{tick:,}") + 1) * _FONT_SIZE / 72
        if all(abs(math.log(tick / other)) * inches >= room for other in ticks):
            ticks.append(tick)
    return sorted(ticks)


def _perplexity_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    if high / low < 4:
        ticks = [float(tick) for tick in MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**k for k in decades for digit in ([1, 2, 5] if len(decades) < 5 else [1])]
    return [tick for tick in ticks if low <= tick <= high]


def _short(name: str) -> str:
    """The name, its middle left out where it would take the figure's width; the tables have it whole."""
    name = name.encode("utf-8", "replace").decode()  # bytes of a path that are no text cannot be drawn
    if len(name) <= _LONGEST_LABEL:
        return name
    half = (_LONGEST_LABEL - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
