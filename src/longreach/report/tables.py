"""The tables of perplexity and cost, and all that a terminal is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, TypeVar

from longreach.report.context_tables import decomposition_grid, stride_grid, ways_grid
from longreach.report.grid import (
    ALIKE,
    MISSING,
    Grid,
    format_memory,
    format_multiple,
    format_perplexity,
    format_range,
    format_ratio,
    format_rough,
    to_rich,
    without_empty_columns,
)
from longreach.report.grid import to_markdown as to_markdown
from longreach.report.paper_tables import METHODS, paper_cells
from longreach.report.selection import (
    BASELINE,
    costs,
    growth,
    longest_past,
    perplexity_lengths,
    perplexity_methods,
    ratio,
    retrieval_tasks,
)
from longreach.report.task_tables import accuracy_grid, summary_grid
from longreach.results import Record, Results, TrainingRecord

if TYPE_CHECKING:
    from rich.console import Console

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
_MEMORY = (
    "Peak memory: on CUDA what PyTorch's allocator held, on the CPU all that the process held, the interpreter and "
    "PyTorch included."
)


def main_grid(results: Results, train_length: int) -> Grid:
    """Perplexity by method and validation length, the ratio of the longest to 1x, training speed and memory."""
    columns, rows = _by_length(results, train_length, lambda record: format_perplexity(record.perplexity))
    trained = {entry.method: entry for entry in results.training if entry.train_length == train_length}
    longest = longest_past(results, train_length)
    past = "longest" if longest is None else format_multiple(longest, train_length)
    ends = []
    for method in perplexity_methods(results, train_length):
        ratio = None if longest is None else growth(results, method, train_length, longest)
        ends.append((format_ratio(ratio), *_training_cost(trained.get(method))))
    grid = Grid(
        title=f"Perplexity per token, trained at {train_length:,} tokens",
        note="Columns: validation length, its multiple of the training length, mean context of a scored token.",
        columns=(*columns, (past, "/ 1x"), ("training", "tokens/s"), ("training", "memory")),
        rows=tuple(row + end for row, end in zip(rows, ends, strict=True)),
        best=_lowest(results, train_length),
    )
    return without_empty_columns(grid, first=len(columns))


def bits_per_byte_grid(results: Results, train_length: int) -> Grid:
    """Bits per byte by method and validation length."""
    columns, rows = _by_length(results, train_length, lambda record: f"{record.bits_per_byte:.3f}")
    note = "Comparable between tokenizers, which perplexity per token is not."
    return Grid(f"Bits per byte, trained at {train_length:,} tokens", note, columns, rows)


def word_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity per word by method and validation length; None where no text was split into words."""

    def text(record: Record) -> str:
        return MISSING if record.word_perplexity is None else format_perplexity(record.word_perplexity)

    columns, rows = _by_length(results, train_length, text)
    if all(cell == MISSING for row in rows for cell in row[1:]):
        return None
    note = "Each end of line counts as a word, as in the paper: comparable with it where corpus and split are its own."
    return Grid(f"Perplexity per word, trained at {train_length:,} tokens", note, columns, rows)


def evaluation_speed_grid(results: Results, train_length: int) -> Grid:
    """Scored tokens per second by method and validation length."""
    columns, rows = _by_length(results, train_length, lambda record: f"{record.tokens_per_second:,.0f}")
    return Grid(f"Evaluation speed in tokens per second, trained at {train_length:,} tokens", "", columns, rows)


def evaluation_memory_grid(results: Results, train_length: int) -> Grid | None:
    """Peak memory of evaluation by method and validation length; None where it could not be measured."""
    columns, rows = _by_length(results, train_length, lambda record: format_memory(record.peak_memory))
    if all(cell == MISSING for row in rows for cell in row[1:]):
        return None
    return Grid(f"Peak memory of evaluation, trained at {train_length:,} tokens", _MEMORY, columns, rows)


def cost_grid(results: Results) -> Grid:
    """The paper's Table 1: speed and memory by method and training length, and relative to sinusoidal where it is."""
    baselines = {entry.train_length: entry for entry in results.training if entry.method == BASELINE}
    rows = []
    for entry in sorted(results.training, key=lambda entry: entry.train_length):
        baseline = baselines.get(entry.train_length)
        others = (None, None, None) if baseline is None else costs(results, baseline)
        row = [entry.method, f"{entry.train_length:,}"]
        for text, own, other in zip((_speed, _speed, format_memory), costs(results, entry), others, strict=True):
            row.append(text(own))
            if baselines:
                row.append(format_rough(ratio(own, other)))
        rows.append(tuple(row))
    columns: list[tuple[str, ...]] = [("method",), ("train", "length")]
    for name in (("training", "tokens/s"), ("evaluation", "tokens/s"), ("training", "peak memory")):
        columns += [name, (f"/ {BASELINE}'s", "at that length")] if baselines else [name]
    note = f"Evaluation: nonoverlapping windows of the training length, in the batches that it ran with. {_MEMORY}"
    if baselines:
        note = f"{note} {ALIKE}"
    return without_empty_columns(Grid("Cost, as in the paper's Table 1", note, tuple(columns), tuple(rows)), first=2)


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
    return without_empty_columns(Grid("Training", note, columns, rows, text_columns=2), first=2)


def skipped_grid(results: Results) -> Grid:
    """What could not be evaluated: a row for all models that lack the same measurements for the same reason."""
    skipped: dict[tuple[str, str, int], dict[str, set[int]]] = {}
    for entry in results.skipped:
        lengths = skipped.setdefault((entry.reason, entry.method, entry.train_length), {})
        lengths.setdefault(entry.protocol or entry.task, set()).add(entry.valid_length)
    models = _together(((reason, _missed(by), n), method) for (reason, method, n), by in skipped.items())
    rows = _together(((reason, missed, tuple(methods)), n) for (reason, missed, n), methods in models.items())
    return Grid(
        title="Skipped",
        note="",
        columns=(("reason",), ("methods",), ("trained at",), ("measurements, and their validation lengths",)),
        rows=tuple(
            (reason, ", ".join(methods), ", ".join(f"{n:,}" for n in lengths), missed)
            for (reason, missed, methods), lengths in rows.items()
        ),
        text_columns=4,
    )


def _missed(by_measurement: dict[str, set[int]]) -> str:
    """`cached, positions at 128, 256; offsets at 64`."""
    alike = _together((tuple(sorted(lengths)), measurement) for measurement, lengths in by_measurement.items())
    clauses = ((", ".join(names), ", ".join(f"{n:,}" for n in lengths)) for lengths, names in alike.items())
    return "; ".join(f"{names} at {lengths}" for names, lengths in clauses)


def _together(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """The values of each key, both in order of appearance."""
    found: dict[Key, list[Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


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


def print_tables(results: Results, console: Console) -> None:
    """Print what was found, from perplexity to summaries, and what was skipped. No number is cut off: a terminal
    narrower than a table wraps its lines.
    """
    from rich.measure import Measurement

    for grid in _terminal_grids(results):
        table = to_rich(grid)
        # Left to itself, rich would shorten the cells of a wide table to the width of the console.
        unbounded = console.options.update(max_width=100_000)
        narrowest = Measurement.get(console, unbounded, table).minimum
        if narrowest > console.width:
            table.width = narrowest
        console.print(table, crop=False, overflow="ignore")


def _terminal_grids(results: Results) -> list[Grid]:
    lengths = results.train_lengths()
    grids: list[Grid | None] = [main_grid(results, length) for length in perplexity_lengths(results)]
    for make in (word_grid, decomposition_grid, stride_grid, ways_grid):
        grids += [make(results, length) for length in lengths]
    grids += [accuracy_grid(results, task, length) for task in retrieval_tasks(results) for length in lengths]
    grids.append(summary_grid(results))
    if results.skipped:
        grids.append(skipped_grid(results))
    return [grid for grid in grids if grid is not None]


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
    for method in perplexity_methods(results, train_length):
        entries = (results.find(method, train_length, length) for length in lengths)
        rows.append((method, *(text(entry) if isinstance(entry, Record) else MISSING for entry in entries)))
    return tuple(columns), tuple(rows)


def _mean_context(results: Results, train_length: int, valid_length: int) -> str:
    """One number where all methods agree, as they do on the same tokens; a range where they do not."""
    entries = (results.find(method, train_length, valid_length) for method in perplexity_methods(results, train_length))
    contexts = (entry.mean_context for entry in entries if isinstance(entry, Record))
    return format_range(contexts, lambda context: f"{context:,.4g}" if context < 1000 else f"{context:,.0f}")


def _lowest(results: Results, train_length: int) -> frozenset[tuple[int, int]]:
    """(row, column) of the lowest perplexity at each length, where methods can be compared."""
    methods = perplexity_methods(results, train_length)
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


def _speed(tokens_per_second: float | None) -> str:
    return MISSING if tokens_per_second is None else f"{tokens_per_second:,.0f}"
