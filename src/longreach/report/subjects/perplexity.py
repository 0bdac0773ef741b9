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
    measured_seeds,
    perplexity_lengths,
    perplexity_methods,
)
from longreach.report.grid import (
    MISSING,
    Grid,
    format_interval,
    format_memory,
    format_multiple,
    format_perplexity,
    format_range,
    format_ratio,
    format_speed,
    unless_empty,
    without_empty_columns,
)
from longreach.report.means import are_repeated, counted, mean_over_seeds, one_by_one
from longreach.report.section import Finding, Picture, Section, at_each, first, listed
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
        + _on_curves(results)
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


def _on_curves(results: Results) -> str:
    if are_repeated(results.records):
        return f"Each curve is the mean over {counted(results.records)} seeds, the thin lines are single ones."
    return "Each curve is one model from one seed; a difference of a percent or two may be chance."


def extrapolation(results: Results, train_length: int) -> Finding:
    """Which methods extrapolate from `train_length` to the longest length measured, and how far the others worsen."""
    longest = longest_past(results, train_length)
    if longest is None:
        return Finding(f"Nothing was tested past the training length of {train_length:,} tokens.")
    methods = perplexity_methods(results, train_length)
    ratios = {method: growth(results, method, train_length, longest) for method in methods}
    known = sorted((ratio.mean, method, ratio) for method, ratio in ratios.items() if ratio is not None)
    span = f"from {train_length:,} to {longest:,} tokens ({format_multiple(longest, train_length)})"
    if not known:
        return Finding(f"No method has a usable perplexity at both ends, {span}: extrapolation cannot be judged.")

    holds = [f"{method} ({format_ratio(mean)})" for mean, method, _ in known if mean <= 1]
    worsens = [f"{method} ({format_ratio(mean)})" for mean, method, _ in known if mean > 1]
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
    repeated = [(method, ratio) for _, method, ratio in known if ratio.n > 1]
    if not repeated:
        return Finding(sentence, " ".join(details))
    seeds = format_range((ratio.n for _, ratio in repeated), str)
    ends = [f"{method} {format_interval(ratio.low, ratio.high, format_ratio)}" for method, ratio in repeated]
    details.append(f"Growth is the mean over {seeds} seeds; 95% t intervals: {first(ends)}.")
    return Finding(
        sentence, " ".join(details), "An interval over seeds that holds 1x leaves open whether perplexity grew."
    )


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
        singles = one_by_one(
            entry
            for entry in results.records
            if (entry.train_length, entry.protocol) == (train_length, "nonoverlapping")
        )
        drawn = tuple(
            Curve(method, points, seeds=tuple(map(_points, singles.get(method, ()))))
            for method, points in curves.items()
            if points
        )
        panels.append(Panel(f"Trained at {train_length:,} tokens", train_length, drawn))
    return draw_panels(panels, Scales("Validation length in tokens", "Perplexity per token"), theme)


def _points(entries: list[Record]) -> dict[float, float]:
    return {float(entry.valid_length): entry.perplexity for entry in sorted(entries, key=lambda e: e.valid_length)}


def main_grid(results: Results, train_length: int) -> Grid:
    """Perplexity by method and validation length, the ratio of the longest to 1x, training speed and memory."""
    note = "Columns: validation length, its multiple of the training length, mean context of a scored token."
    repeated = are_repeated(results.records)
    if repeated:
        note = f"{note} After ±: standard deviation over seeds, of which the losses are averaged."
    grid = grid_by_length(
        "Perplexity per token", note, results, train_length, lambda record: record.perplexity, format_perplexity
    )
    methods, lengths = perplexity_methods(results, train_length), results.valid_lengths(train_length)
    trained = {e.method: e for e in mean_over_seeds(results.training) if e.train_length == train_length}
    longest = longest_past(results, train_length)
    past = "longest" if longest is None else format_multiple(longest, train_length)
    rows = []
    for method, row in zip(methods, grid.rows, strict=True):
        ratio = None if longest is None else growth(results, method, train_length, longest)
        entry = trained.get(method)
        speed, memory = (None, None) if entry is None else (entry.tokens_per_second, entry.peak_memory)
        counts = (len(measured_seeds(results, method, train_length, length)) for length in lengths)
        seeds = format_range(filter(None, counts), str) if repeated else MISSING
        texts = (format_ratio(None if ratio is None else ratio.mean), format_speed(speed), format_memory(memory))
        rows.append((*row, seeds, *texts))
    best = set()
    for column, length in enumerate(lengths, start=1):
        found = _perplexities(results, train_length, length)
        if len(found) > 1:  # there is something to compare
            low = min(found.values())
            best |= {(methods.index(method), column) for method, value in found.items() if value == low < math.inf}
    ends = (("seeds",), (past, "/ 1x"), ("training", "tokens/s"), ("training", "memory"))
    whole = replace(grid, columns=(*grid.columns, *ends), rows=tuple(rows), best=frozenset(best))
    return without_empty_columns(whole, first=len(grid.columns))


def in_one_line(results: Results, model: Model) -> str | None:
    """The perplexities of one model, as the main table has them, to be read while others train; None without any."""
    records = sorted(
        (record for record in results.records if record.model == model and record.protocol == "nonoverlapping"),
        key=lambda record: record.valid_length,
    )
    if not records:
        return None
    cells = ", ".join(f"{format_perplexity(record.perplexity)} at {record.valid_length:,}" for record in records)
    far = records[-1]
    growths = [
        f"; {format_multiple(far.valid_length, model.train_length)} / 1x {format_ratio(loss_ratio(far, near))}"
        for near in records[:-1]
        if near.valid_length == model.train_length
    ]
    return f"{model}: perplexity {cells}{''.join(growths)}"


def word_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity per word by method and validation length; None where no text was split into words."""
    note = "Each end of line counts as a word, as in the paper: comparable with it where corpus and split are its own."
    title = "Perplexity per word"
    return unless_empty(
        grid_by_length(title, note, results, train_length, lambda record: record.word_perplexity, format_perplexity)
    )


def bits_per_byte_grid(results: Results, train_length: int) -> Grid | None:
    """Bits per byte by method and validation length; None where nothing was measured."""
    note = "Comparable between tokenizers, which perplexity per token is not."
    title = "Bits per byte"
    return unless_empty(
        grid_by_length(title, note, results, train_length, lambda record: record.bits_per_byte, "{:.3f}".format)
    )
