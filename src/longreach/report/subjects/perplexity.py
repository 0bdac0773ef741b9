"""Perplexity at each length: who extrapolates, and whose perplexity is the lowest.

A method *extrapolates* here when its perplexity at the longest validation length is at or below its own at the
training length. That alone does not make it the best model, so the lowest perplexity is named beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from longreach.report.curves import Curve, Panel, Scales, draw_panels, off_scale_note
from longreach.report.drawing import LIGHT, Theme
from longreach.report.entries import (
    grid_by_length,
    growth,
    longest_past,
    loss_ratio,
    measured,
    perplexity_lengths,
    perplexity_methods,
)
from longreach.report.grid import (
    MISSING,
    Grid,
    format_memory,
    format_multiple,
    format_perplexity,
    format_ratio,
    format_speed,
    unless_empty,
    without_empty_columns,
)
from longreach.report.section import Finding, Picture, Section, at_each, listed
from longreach.report.subjects.cost import training_advantage
from longreach.results import Model, Record, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sections(results: Results) -> Iterator[Section]:
    """Perplexity against length, and the paper's headline."""
    lengths = perplexity_lengths(results)
    if not lengths:
        return
    picture = Picture(
        "perplexity",
        partial(perplexity_figure, results),
        "Perplexity per token against validation length, one curve per method. The table below has the numbers.",
    )
    reading = (
        "A curve that stays level or falls to the right of the dotted line, the training length, belongs to a "
        "method that extrapolates: longer inputs do not harm it. A curve that rises belongs to one that does not. "
        "The same tokens are scored at every length, in nonoverlapping windows; both axes are logarithmic. Part "
        "of a fall is relief from the early token curse: longer windows leave fewer tokens with little context. "
        "Each curve is one model from one seed; a difference of a percent or two may be chance."
        + off_scale_note(record.perplexity for record in results.records)
    )
    is_drawn = any(record.protocol == "nonoverlapping" for record in results.records)
    advantage = training_advantage(results)
    yield Section(
        title="Perplexity at each length",
        findings=at_each(extrapolation, results, lengths) + (() if advantage is None else (advantage,)),
        picture=picture if is_drawn else None,
        reading=reading if is_drawn else "",
        tables=at_each(main_grid, results, lengths) + at_each(word_grid, results, lengths),
        further=at_each(bits_per_byte_grid, results, lengths),
    )


def extrapolation(results: Results, train_length: int) -> Finding:
    """Which methods extrapolate from `train_length` to the longest length measured, and how far the others worsen."""
    longest = longest_past(results, train_length)
    if longest is None:
        return Finding(f"Nothing was tested past the training length of {train_length:,} tokens.")
    methods = perplexity_methods(results, train_length)
    ratios = {method: growth(results, method, train_length, longest) for method in methods}
    known = sorted((ratio, method) for method, ratio in ratios.items() if ratio is not None)
    span = f"from {train_length:,} to {longest:,} tokens ({format_multiple(longest, train_length)})"
    if not known:
        return Finding(f"No method has a usable perplexity at both ends, {span}: extrapolation cannot be judged.")

    holds = [f"{method} ({format_ratio(ratio)})" for ratio, method in known if ratio <= 1]
    worsens = [f"{method} ({format_ratio(ratio)})" for ratio, method in known if ratio > 1]
    unknown = [method for method, ratio in ratios.items() if ratio is None]
    if holds:
        verb = "extrapolates" if len(holds) == 1 else "extrapolate"
        sentence = f"{listed(holds)} {verb} {span}: perplexity ends at or below where it began."
    else:
        sentence = f"No method extrapolates {span}: every perplexity measured at both ends grew."
    details = [f"Perplexity grows with {listed(worsens)}."] if worsens else []
    if unknown:
        details.append(f"Not judged, for want of a usable figure at one end: {listed(unknown)}.")
    at_longest = _perplexities(results, train_length, longest)
    lowest = min(at_longest, key=lambda method: at_longest[method], default="")
    if len(at_longest) > 1 and at_longest[lowest] < math.inf:
        perplexity = format_perplexity(at_longest[lowest])
        details.append(f"The lowest perplexity at {longest:,} is {lowest}'s, {perplexity} per token.")
    return Finding(sentence, " ".join(details))


def _perplexities(results: Results, train_length: int, valid_length: int) -> dict[str, float]:
    """Method -> perplexity."""
    methods = perplexity_methods(results, train_length)
    entries = {method: measured(results, method, train_length, valid_length) for method in methods}
    return {method: entry.perplexity for method, entry in entries.items() if entry is not None}


def perplexity_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Perplexity per token against validation length, one panel per training length."""
    panels = []
    for train_length in perplexity_lengths(results):
        curves: dict[str, dict[float, float]] = {method: {} for method in results.methods(train_length)}
        for length in results.valid_lengths(train_length):
            for method, perplexity in _perplexities(results, train_length, length).items():
                curves[method][float(length)] = perplexity
        drawn = tuple(Curve(method, points) for method, points in curves.items() if points)
        panels.append(Panel(f"Trained at {train_length:,} tokens", train_length, drawn))
    return draw_panels(panels, Scales("Validation length in tokens", "Perplexity per token"), theme)


def main_grid(results: Results, train_length: int) -> Grid:
    """Perplexity by method and validation length, the ratio of the longest to 1x, training speed and memory."""
    note = "Columns: validation length, its multiple of the training length, mean context of a scored token."
    grid = grid_by_length("Perplexity per token", note, results, train_length, _perplexity)
    methods = perplexity_methods(results, train_length)
    trained = {entry.method: entry for entry in results.training if entry.train_length == train_length}
    longest = longest_past(results, train_length)
    past = "longest" if longest is None else format_multiple(longest, train_length)
    rows = []
    for method, row in zip(methods, grid.rows, strict=True):
        ratio = None if longest is None else growth(results, method, train_length, longest)
        entry = trained.get(method)
        speed, memory = (None, None) if entry is None else (entry.tokens_per_second, entry.peak_memory)
        rows.append((*row, format_ratio(ratio), format_speed(speed), format_memory(memory)))
    best = set()
    for column, length in enumerate(results.valid_lengths(train_length), start=1):
        found = _perplexities(results, train_length, length)
        if len(found) > 1:  # there is something to compare
            low = min(found.values())
            best |= {(methods.index(method), column) for method, value in found.items() if value == low < math.inf}
    ends = ((past, "/ 1x"), ("training", "tokens/s"), ("training", "memory"))
    whole = replace(grid, columns=(*grid.columns, *ends), rows=tuple(rows), best=frozenset(best))
    return without_empty_columns(whole, first=len(grid.columns))


def in_one_line(results: Results, model: Model) -> str | None:
    """The perplexities of one model, as the main table has them, to be read while others train; None without any."""
    own = sorted(
        (record for record in results.records if record.model == model and record.protocol == "nonoverlapping"),
        key=lambda record: record.valid_length,
    )
    if not own:
        return None
    cells = ", ".join(f"{_perplexity(record)} at {record.valid_length:,}" for record in own)
    growths = [
        f"; {format_multiple(own[-1].valid_length, model.train_length)} / 1x {format_ratio(loss_ratio(own[-1], near))}"
        for near in own[:-1]
        if near.valid_length == model.train_length
    ]
    return f"{model}: perplexity {cells}{''.join(growths)}"


def _perplexity(record: Record) -> str:
    return format_perplexity(record.perplexity)


def word_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity per word by method and validation length; None where no text was split into words."""
    note = "Each end of line counts as a word, as in the paper: comparable with it where corpus and split are its own."

    def text(record: Record) -> str:
        return MISSING if record.word_perplexity is None else format_perplexity(record.word_perplexity)

    return unless_empty(grid_by_length("Perplexity per word", note, results, train_length, text))


def bits_per_byte_grid(results: Results, train_length: int) -> Grid | None:
    """Bits per byte by method and validation length; None where nothing was measured."""
    note = "Comparable between tokenizers, which perplexity per token is not."
    grid = grid_by_length("Bits per byte", note, results, train_length, lambda record: f"{record.bits_per_byte:.3f}")
    return unless_empty(grid)
