"""The ALiBi paper's own perplexities, set beside ours: its curves, its Table 5, and whether the shapes agree.

Source: Ofir Press, Noah A. Smith, Mike Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input
Length Extrapolation", ICLR 2022, arXiv 2108.12409v2: Tables 2, 3 and 4 (pages 16 to 18: models trained at 512, 1024
and 3072 tokens) and Table 5 (page 19: ALiBi trained at eight lengths; the other methods at L_valid = L only).
WikiText-103 validation set, 247M parameters, nonoverlapping evaluation, perplexity per word.

The numbers are in `paper.csv`, one line per table, training length and validation length, one column per method.
`OOM` is the paper's own mark for a run that did not fit in memory; an empty field was not reported.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

from longreach.report.curves import Curve, Panel, Scales, draw_panels
from longreach.report.drawing import LIGHT, Theme
from longreach.report.entries import growth, measured, perplexity_lengths
from longreach.report.grid import MISSING, Grid, format_multiple, format_perplexity, format_ratio
from longreach.report.section import Finding, Picture, Section, at_each
from longreach.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CITATION = "Press, Smith and Lewis, Train Short, Test Long, ICLR 2022"
URL = "https://arxiv.org/abs/2108.12409v2"
METHODS = ("sinusoidal", "rotary", "t5", "alibi")
EXTRAPOLATION_TABLES = {512: 2, 1024: 3, 3072: 4}
"""Training length -> number of the table in which all four methods are tested past it."""


def sections(results: Results) -> Iterator[Section]:
    """The paper's own curves, where there are some to set them beside."""
    lengths = perplexity_lengths(results)
    if not lengths:
        return
    yield Section(
        title="Beside the paper's own curves",
        findings=at_each(agreement_with_paper, results, lengths),
        picture=Picture(
            "paper",
            paper_figure,
            "The paper's perplexity against validation length for models trained at 512, 1,024 and 3,072 tokens.",
        ),
        reading=(
            "In the paper ALiBi alone stays level at every training length; sinusoidal leaves its level soon after "
            "the training length, rotary and the T5 bias later. Tables 2 to 4 (pages 16 to 18): WikiText-103 "
            "validation set, 247M parameters, nonoverlapping evaluation, perplexity per word. The T5 bias ran out of "
            "memory at the longest lengths. Model, corpus and tokens differ from those above: compare shapes, not "
            "levels."
        ),
        further=(paper_grid(),),
        source=(f"{CITATION}, arXiv 2108.12409v2", URL),
    )


@functools.cache
def paper_cells() -> Mapping[tuple[int, str, int, int], float | None]:
    """(table, method, train_length, valid_length) -> perplexity, of every reported cell of Tables 2 to 5, in the
    paper's order; None where the paper ran out of memory.
    """
    text = resources.files("longreach.report.subjects").joinpath("paper.csv").read_text(encoding="utf-8")
    cells = {
        (int(row["table"]), method, int(row["train_length"]), int(row["valid_length"])): (
            None if row[method] == "OOM" else float(row[method])
        )
        for row in csv.DictReader(text.splitlines())
        for method in METHODS
        if row[method]
    }
    return MappingProxyType(cells)  # for all who ask are given the same


def paper_curve(method: str, train_length: int) -> dict[int, float]:
    """valid_length -> perplexity from Table 2, 3 or 4, ascending; without the lengths that ran out of memory."""
    wanted = (EXTRAPOLATION_TABLES[train_length], method)
    return {
        valid_length: perplexity
        for (table, by, _, valid_length), perplexity in paper_cells().items()
        if (table, by) == wanted and perplexity is not None
    }


def agreement_with_paper(results: Results, train_length: int) -> Finding:
    """Compare growth over 1x with the paper's table whose training length is nearest (in proportion).

    Shape is two things: which methods worsen, and the order of methods from least to most growth. The sizes differ
    with the model, the corpus and the training length and are given, not judged.
    """
    paper_length = min(EXTRAPOLATION_TABLES, key=lambda length: abs(math.log(length / train_length)))
    table = f"Table {EXTRAPOLATION_TABLES[paper_length]}, L = {paper_length:,}"
    shared = [method for method in METHODS if measured(results, method, train_length, train_length)]
    lengths = [n for n in results.valid_lengths(train_length) if n > train_length]
    for valid_length in reversed(lengths):
        multiple = valid_length / train_length
        ours = {method: growth(results, method, train_length, valid_length) for method in shared}
        theirs = {method: _growth_in_paper(method, paper_length, multiple) for method in shared}
        pairs = {m: (a.mean, b) for m in shared if (a := ours[m]) is not None and (b := theirs[m]) is not None}
        if len(pairs) > 1:
            break
    else:
        return Finding(f"Fewer than two methods can be compared with the paper ({table}).")

    same_direction = sum((a > 1) == (b > 1) for a, b in pairs.values())
    couples = list(combinations(pairs.values(), 2))
    same_order = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in couples)
    where = f"at {format_multiple(valid_length, train_length)} the training length ({table})"
    if same_direction == len(pairs) and same_order == len(couples):
        sentence = f"The shape agrees with the paper's {where}: the same methods worsen, in the same order."
    else:
        verdict = "agrees only in part with" if same_direction and same_order else "does not agree with"
        sentence = (
            f"The shape {verdict} the paper's {where}: {same_direction} of {len(pairs)} methods move in the same"
            f" direction, {same_order} of {len(couples)} pairs of methods stand in the same order."
        )
    figures = (f"{m} {format_ratio(a)} here, {format_ratio(b)} in the paper" for m, (a, b) in pairs.items())
    return Finding(sentence, f"Perplexity over its own at 1x: {'; '.join(figures)}.")


def _growth_in_paper(method: str, train_length: int, multiple: float) -> float | None:
    """Perplexity at `multiple` x train_length over that at 1x, straight between measured points on log-log axes."""
    curve = [
        (math.log(length), math.log(perplexity)) for length, perplexity in paper_curve(method, train_length).items()
    ]
    x = math.log(multiple * train_length)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - curve[0][1])
    return None


def paper_figure(theme: Theme = LIGHT) -> Figure:
    """The paper's Tables 2, 3 and 4 in the same style."""
    panels = [
        Panel(
            f"Trained at {train_length:,} (Table {table})",
            train_length,
            tuple(
                Curve(method, {float(n): y for n, y in paper_curve(method, train_length).items()}) for method in METHODS
            ),
        )
        for train_length, table in EXTRAPOLATION_TABLES.items()
    ]
    return draw_panels(panels, Scales("Validation length in tokens", "Perplexity per word"), theme, panel_width=2.6)


def paper_grid() -> Grid:
    """The paper's Table 5: ALiBi at every training length, and the other methods without extrapolation."""
    cells = paper_cells()
    lengths = sorted({valid_length for table, _, _, valid_length in cells if table == 5})

    def row(name: str, values: list[float | None]) -> tuple[str, ...]:
        return (name, *(MISSING if value is None else format_perplexity(value) for value in values))

    rows = [
        row(f"alibi, trained at {n:,}", [cells.get((5, "alibi", n, length)) for length in lengths]) for n in lengths
    ]
    for method in METHODS:
        if method != "alibi":
            same_length = [cells.get((5, method, length, length)) for length in lengths]
            rows.append(row(f"{method}, trained at the validation length", same_length))
    return Grid(
        title="The paper's Table 5 (page 19): perplexity per word",
        note="Columns: validation length.",
        columns=(("method",), *((f"{length:,}",) for length in lengths)),
        rows=tuple(rows),
    )
