"""A table as a grid of strings, shown in the terminal, in Markdown and on the page, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "-"
_IN_MARKDOWN = str.maketrans(
    {character: f"\\{character}" for character in "\\|*_`[]"}
    | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "~": "&#126;"}  # no Markdown takes all of these after a backslash
)
"""What would end a cell, or be taken for emphasis, code, a link or HTML -> what stands for it."""
ALIKE = "Short works vary by some percent from run to run: within 5% they count as alike."
"""Why ratios of speed and memory have two digits."""


@dataclass(frozen=True)
class Grid:
    """One table, ready to be shown."""

    title: str
    """What the numbers are, with their unit or denominator."""
    note: str
    """How to read it; may be empty."""
    columns: tuple[tuple[str, ...], ...]
    """Header of each column, in one or more lines."""
    rows: tuple[tuple[str, ...], ...]
    """Text of each cell."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells to stress."""
    text_columns: int = 1
    """How many of the first columns hold text (left-aligned); the others hold numbers."""


def without_empty_columns(grid: Grid, first: int) -> Grid:
    """The grid without the columns from number `first` on in which no row has anything; `best` is of those before."""
    kept = [i for i in range(len(grid.columns)) if i < first or any(row[i] != MISSING for row in grid.rows)]
    columns = tuple(grid.columns[i] for i in kept)
    return replace(grid, columns=columns, rows=tuple(tuple(row[i] for i in kept) for row in grid.rows))


def unless_empty(grid: Grid) -> Grid | None:
    """The grid, or None where nothing stands beside its texts."""
    return grid if any(cell != MISSING for row in grid.rows for cell in row[grid.text_columns :]) else None


def to_rich(grid: Grid) -> Table:
    """The grid as a table of the `rich` library."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(grid.title, style="bold"),
        caption=Text(grid.note),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for index, column in enumerate(grid.columns):
        number = index >= grid.text_columns
        cells = [*column, *(row[index] for row in grid.rows)]
        table.add_column(
            Text("\n".join(column)),
            justify="right" if number else "left",
            no_wrap=number,
            # Said outright, for rich takes the longest word to be enough.
            min_width=max(map(cell_len, cells)) if number else None,
            overflow="fold",
        )
    for i, row in enumerate(grid.rows):
        table.add_row(*(Text(cell, style="bold" if (i, j) in grid.best else "") for j, cell in enumerate(row)))
    return table


def to_markdown(grid: Grid) -> str:
    """The grid as a Markdown table, title and note left to the surrounding text."""
    lines = [
        " | ".join(_escape_markdown("\n".join(column)) for column in grid.columns),
        " | ".join("---" if index < grid.text_columns else "---:" for index in range(len(grid.columns))),
    ]
    for i, row in enumerate(grid.rows):
        cells = (_escape_markdown(cell) for cell in row)
        lines.append(" | ".join(f"**{cell}**" if (i, j) in grid.best else cell for j, cell in enumerate(cells)))
    return "".join(f"| {line} |\n" for line in lines)


def format_perplexity(value: float) -> str:
    """Two decimals up to a thousand, then whole numbers, then powers of ten; overflow is infinity."""
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def format_ratio(value: float | None) -> str:
    """`1.22x`, and `0.998x` where two decimals would say 1.00x; a dash when there is none."""
    if value is None:
        return MISSING
    return f"{value:.3f}x" if 0.99 < value < 1.01 else f"{format_perplexity(value)}x"


def format_rough(value: float | None) -> str:
    """`1.8x`, `0.33x`, `25x`: the two digits that ratios of speeds and memories are good for; a dash without one."""
    if value is None:
        return MISSING
    digits = 1 - int(f"{value:.1e}".partition("e")[2])
    return f"{round(value, digits):,.{max(0, digits)}f}x"


def is_alike(relative: float) -> bool:
    """Whether a ratio of speeds or memories is too near to 1 to tell anything: `ALIKE` says why."""
    return abs(relative - 1) <= 0.05


def format_speed(value: float | None) -> str:
    """`12,346` tokens per second; a dash when it was not measured."""
    return MISSING if value is None else f"{value:,.0f}"


def format_memory(value: float | None) -> str:
    """MiB below one GiB, GiB from there; a dash when it was not measured."""
    if value is None:
        return MISSING
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:,.2f} GiB"


def format_multiple(valid_length: int, train_length: int) -> str:
    """`16x`, `1.5x`, `0.25x`."""
    return f"{valid_length / train_length:.3g}x"


def format_signed(value: float) -> str:
    """`+0.018` nats: a difference of losses, with its sign."""
    return f"{value:+.3f}"


def format_percent(share: float) -> str:
    """`85%`."""
    return f"{share:.0%}"


def format_interval(low: float | None, high: float | None, text: Callable[[float], str] = format_signed) -> str:
    """`[+0.010, +0.025]`; a dash when there is none. `text` says how an end is written."""
    return MISSING if low is None or high is None else f"[{text(low)}, {text(high)}]"


def format_range(values: Iterable[float], text: Callable[[float], str]) -> str:
    """The text of all values where they agree, `63.5-100` where they do not, a dash where there are none."""
    texts = list(dict.fromkeys(text(value) for value in sorted(values)))
    return "-".join(texts[:: max(1, len(texts) - 1)]) if texts else MISSING


def _escape_markdown(text: str) -> str:
    return "<br>".join(line.translate(_IN_MARKDOWN) for line in text.splitlines())
