"""The tables of a comparison: each is a grid of strings, shown in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longreach.report.paper_tables import METHODS, paper_cells
from longreach.results import Record, Results, TrainingRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MISSING = "-"


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


def main_grid(results: Results, train_length: int) -> Grid:
    """Perplexity by method and validation length, the ratio of the longest to 1x, training speed and memory."""
    columns, rows = _by_length(results, train_length, lambda record: format_perplexity(record.perplexity))
    trained = {entry.method: entry for entry in results.training if entry.train_length == train_length}
    longest = longest_past(results, train_length)
    past = "longest" if longest is None else format_multiple(longest, train_length)
    ends = []
    for method in results.methods(train_length):
        ratio = None if longest is None else growth(results, method, train_length, longest)
        ends.append((format_ratio(ratio), *_training_cost(trained.get(method))))
    return Grid(
        title=f"Perplexity per token, trained at {train_length:,} tokens",
        note="Columns: validation length, its multiple of the training length, mean context of a scored token.",
        columns=(*columns, (past, "/ 1x"), ("training", "tokens/s"), ("training", "memory")),
        rows=tuple(row + end for row, end in zip(rows, ends, strict=True)),
        best=_lowest(results, train_length),
    )


def bits_per_byte_grid(results: Results, train_length: int) -> Grid:
    """Bits per byte by method and validation length."""
    columns, rows = _by_length(results, train_length, lambda record: f"{record.bits_per_byte:.3f}")
    note = "Comparable between tokenizers, which perplexity per token is not."
    return Grid(f"Bits per byte, trained at {train_length:,} tokens", note, columns, rows)


def evaluation_speed_grid(results: Results, train_length: int) -> Grid:
    """Scored tokens per second by method and validation length."""
    columns, rows = _by_length(results, train_length, lambda record: f"{record.tokens_per_second:,.0f}")
    return Grid(f"Evaluation speed in tokens per second, trained at {train_length:,} tokens", "", columns, rows)


def evaluation_memory_grid(results: Results, train_length: int) -> Grid:
    """Peak memory of evaluation by method and validation length."""
    columns, rows = _by_length(results, train_length, lambda record: format_memory(record.peak_memory))
    return Grid(f"Peak memory of evaluation, trained at {train_length:,} tokens", "", columns, rows)


def training_grid(results: Results) -> Grid:
    """What each training took and where it arrived."""
    rows = tuple(
        (
            entry.method,
            entry.attention,
            f"{entry.train_length:,}",
            f"{entry.steps:,}",
            f"{entry.tokens:,}",
            f"{entry.parameters:,}",
            f"{entry.final_loss:.3f}",
            f"{entry.tokens_per_second:,.0f}",
            f"{entry.seconds:,.0f}",
            format_memory(entry.peak_memory),
        )
        for entry in results.training
    )
    columns = (
        ("method",),
        ("attention",),
        ("train", "length"),
        ("steps",),
        ("tokens",),
        ("parameters",),
        ("final", "loss"),
        ("tokens/s",),
        ("seconds",),
        ("peak", "memory"),
    )
    note = "Final loss: mean over the last logged steps, in nats per token."
    return Grid("Training", note, columns, rows, text_columns=2)


def skipped_grid(results: Results) -> Grid:
    """The cells that could not be evaluated, those of one reason together."""
    lengths: dict[tuple[str, str, int, str], list[int]] = {}
    for entry in results.skipped:
        same = (entry.method, entry.reason, entry.train_length, entry.protocol)
        lengths.setdefault(same, []).append(entry.valid_length)
    rows = tuple(
        (method, reason, protocol, f"{train_length:,}", ", ".join(f"{length:,}" for length in sorted(set(skipped))))
        for (method, reason, train_length, protocol), skipped in lengths.items()
    )
    columns = (("method",), ("reason",), ("protocol",), ("trained at",), ("validation length",))
    return Grid("Skipped", "", columns, rows, text_columns=3)


def paper_grid() -> Grid:
    """The paper's Table 5: ALiBi at every training length, and the other methods without extrapolation."""
    cells = {(c.method, c.train_length, c.valid_length): c.perplexity for c in paper_cells() if c.table == 5}
    lengths = sorted({valid_length for _, _, valid_length in cells})

    def row(name: str, values: list[float | None]) -> tuple[str, ...]:
        return (name, *(MISSING if value is None else format_perplexity(value) for value in values))

    rows = [row(f"alibi, trained at {n:,}", [cells.get(("alibi", n, length)) for length in lengths]) for n in lengths]
    for method in METHODS:
        if method != "alibi":
            same_length = [cells.get((method, length, length)) for length in lengths]
            rows.append(row(f"{method}, trained at the validation length", same_length))
    return Grid(
        title="The paper's Table 5 (page 19): perplexity per word",
        note="Columns: validation length.",
        columns=(("method",), *((f"{length:,}",) for length in lengths)),
        rows=tuple(rows),
    )


def growth(results: Results, method: str, train_length: int, valid_length: int) -> float | None:
    """Perplexity at `valid_length` over the method's own at `train_length`; None when it cannot be told."""
    own, long = (results.find(method, train_length, length) for length in (train_length, valid_length))
    if not isinstance(own, Record) or not isinstance(long, Record) or math.isinf(own.perplexity):
        return None
    return long.perplexity / own.perplexity


def longest_past(results: Results, train_length: int) -> int | None:
    """The longest validation length of the grid; None when none is past the training length."""
    longest = max(results.valid_lengths(train_length), default=0)
    return longest if longest > train_length else None


def to_rich(grid: Grid) -> Table:
    """The grid as a table of the `rich` library."""
    from rich import box
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
        table.add_column(
            Text("\n".join(column)), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for i, row in enumerate(grid.rows):
        table.add_row(*(Text(cell, style="bold" if (i, j) in grid.best else "") for j, cell in enumerate(row)))
    return table


def print_tables(results: Results, console: Console) -> None:
    """Print the main table of each training length, and what was skipped. No number is cut off: a terminal narrower
    than a table wraps its lines.
    """
    from rich.measure import Measurement

    grids = [main_grid(results, train_length) for train_length in results.train_lengths()]
    if results.skipped:
        grids.append(skipped_grid(results))
    for grid in grids:
        table = to_rich(grid)
        # Left to itself, rich would shorten the cells of a wide table to the width of the console.
        unbounded = console.options.update(max_width=100_000)
        narrowest = Measurement.get(console, unbounded, table).minimum
        if narrowest > console.width:
            table.width = narrowest
        console.print(table, crop=False, overflow="ignore")


def to_markdown(grid: Grid) -> str:
    """The grid as a Markdown table, title and note left to the surrounding text."""
    lines = [
        " | ".join(_escape_markdown("\n".join(column)).replace("\n", "<br>") for column in grid.columns),
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


def format_memory(value: int | None) -> str:
    """MiB below one GiB, GiB from there; a dash when it was not measured."""
    if value is None:
        return MISSING
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:,.2f} GiB"


def format_multiple(valid_length: int, train_length: int) -> str:
    """`16x`, `1.5x`, `0.25x`."""
    return f"{valid_length / train_length:.3g}x"


Columns = tuple[tuple[str, ...], ...]
Rows = tuple[tuple[str, ...], ...]


def _by_length(results: Results, train_length: int, text: Callable[[Record], str]) -> tuple[Columns, Rows]:
    """Columns and rows of a grid of method by validation length; `text` says what stands in a cell."""
    lengths = results.valid_lengths(train_length)
    columns: list[tuple[str, ...]] = [("method",)]
    for length in lengths:
        columns.append(
            (f"{length:,}", format_multiple(length, train_length), _mean_context(results, train_length, length))
        )
    rows = []
    for method in results.methods(train_length):
        entries = (results.find(method, train_length, length) for length in lengths)
        rows.append((method, *(text(entry) if isinstance(entry, Record) else MISSING for entry in entries)))
    return tuple(columns), tuple(rows)


def _mean_context(results: Results, train_length: int, valid_length: int) -> str:
    """One number where all methods agree, as they do on the same tokens; a range where they do not."""
    entries = (results.find(method, train_length, valid_length) for method in results.methods(train_length))
    contexts = [entry.mean_context for entry in entries if isinstance(entry, Record)]
    texts = dict.fromkeys(f"{context:,.4g}" if context < 1000 else f"{context:,.0f}" for context in sorted(contexts))
    return "-".join([*texts][:: max(1, len(texts) - 1)]) if texts else MISSING


def _lowest(results: Results, train_length: int) -> frozenset[tuple[int, int]]:
    """(row, column) of the lowest perplexity at each length, where methods can be compared."""
    methods = results.methods(train_length)
    best = set()
    for column, length in enumerate(results.valid_lengths(train_length), start=1):
        entries = ((row, results.find(method, train_length, length)) for row, method in enumerate(methods))
        measured = {row: entry.perplexity for row, entry in entries if isinstance(entry, Record)}
        if len(measured) > 1:
            best |= {(row, column) for row, value in measured.items() if value == min(measured.values()) < math.inf}
    return frozenset(best)


def _training_cost(entry: TrainingRecord | None) -> tuple[str, str]:
    if entry is None:
        return MISSING, MISSING
    return f"{entry.tokens_per_second:,.0f}", format_memory(entry.peak_memory)


def _escape_markdown(text: str) -> str:
    # Within a table cell: these would end it, or be taken for emphasis, code, a link or HTML.
    return "".join(f"\\{character}" if character in "\\|*_`[]<>" else character for character in text)
