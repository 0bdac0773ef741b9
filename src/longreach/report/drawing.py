"""What all figures share: themes, a look for each method, a grid of axes, and how a figure becomes a file.

Figures depend on the numbers, the theme and the version of matplotlib only: not on the user's matplotlibrc, the time or
a random id, so that the same results give the same bytes. matplotlib is imported where it is used.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the curves, and which of a curve's two shades is used."""

    ink: str
    muted: str
    """Ticks and the line at the training length."""
    grid: str
    paper: str
    shade: int
    """0 takes the darker shade of each pair of colours, 1 the lighter."""


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
    "kerple": (("#00748c", "#4fc3d9"), "<"),
    "fire": (("#b3261e", "#f2837b"), "p"),
    "sandwich": (("#5d7a00", "#a9c940"), "h"),
    "xpos": (("#8a5a2b", "#d6a878"), ">"),
    "rotary-randomized": (("#8f6a00", "#d9bd4a"), "d"),
}
_PICKED = 7
"""Names from outside this package have the looks of one of so many, from the first on."""
_LINES = ("-", "--", "-.", ":")
FONT_SIZE = 9.0
"""Of all text but titles, in points."""
_LONGEST_NAME = 34


@dataclass(frozen=True)
class Margins:
    """Room around each axes for its labels, in inches."""

    left: float
    right: float
    bottom: float
    top: float


Look = tuple[str, str, str]
"""Colour, marker, line style."""


def looks(methods: list[str], theme: Theme) -> dict[str, Look]:
    """A method always has the same colour; its variants (`rotary:scaling=ntk`) differ from it in the line."""
    chosen: dict[str, Look] = {}
    known = list(_LOOKS.values())[:_PICKED]
    for method in methods:
        base = method.partition(":")[0]
        # A name from outside this package takes the colour that its spelling picks, the same in every report.
        colours, marker = _LOOKS.get(base) or known[zlib.crc32(base.encode("utf-8", "replace")) % len(known)]
        alike = sum(look[:2] == (colours[theme.shade], marker) for look in chosen.values())
        chosen[method] = (colours[theme.shade], marker, _LINES[alike % len(_LINES)])
    return chosen


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name as it can be drawn, its middle left out where it would take the figure's width; the tables have it
    whole.

    A replacement character stands for what the font has not, and for what is none to see: control characters, which no
    SVG may hold, and bytes of a path that are no text.
    """
    drawn = _drawn()
    name = "".join(character if ord(character) in drawn and character.isprintable() else "\ufffd" for character in name)
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


@cache
def _drawn() -> frozenset[int]:
    """The code points that the font of all figures has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    with settings():
        return frozenset(get_font(findfont(FontProperties())).get_charmap())


def text_width(characters: int) -> float:
    """About how wide a line of text is, in inches: wide letters have room, narrow ones leave some."""
    return 0.6 * FONT_SIZE / 72 * characters


def axes_grid(
    count: int, columns: int, size: tuple[float, float], margins: Margins, theme: Theme, header: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes of one size, row by row under a header, all in inches; without any it is one empty
    place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    pitch = (margins.left + size[0] + margins.right, margins.top + size[1] + margins.bottom)
    width, height = columns * pitch[0], header + rows * pitch[1]
    figure = Figure(figsize=(width, height), facecolor=theme.paper)
    FigureCanvasAgg(figure)
    places = []
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = column * pitch[0] + margins.left, height - header - row * pitch[1] - margins.top - size[1]
        axes = figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))
        axes.set_facecolor(theme.paper)
        axes.tick_params(colors=theme.muted, labelcolor=theme.muted, length=3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.muted)
        places.append(axes)
    return figure, places


def set_title(axes: Axes, title: str, theme: Theme, pad: float = 10) -> None:
    """Write what stands above axes, `pad` points over them."""
    axes.set_title(title, loc="left", color=theme.ink, fontsize=FONT_SIZE + 1, pad=pad)


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, its text as outlines, so that it looks the same on every machine."""
    buffer = io.BytesIO()
    with settings():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 200 dots per inch."""
    buffer = io.BytesIO()
    with settings():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib's settings for drawing and writing, instead of the user's."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Names are the user's: a dollar sign in one is a dollar sign. The salt replaces random ids.
        matplotlib.rcParams.update(
            {"text.parse_math": False, "svg.hashsalt": "longreach", "font.size": FONT_SIZE, "axes.linewidth": 0.8}
        )
        yield
