"""The ALiBi paper's own perplexities, to be set beside ours.

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
from dataclasses import dataclass
from importlib import resources

CITATION = "Press, Smith and Lewis, Train Short, Test Long, ICLR 2022"
URL = "https://arxiv.org/abs/2108.12409v2"
METHODS = ("sinusoidal", "rotary", "t5", "alibi")
EXTRAPOLATION_TABLES = {512: 2, 1024: 3, 3072: 4}
"""Training length -> number of the table in which all four methods are tested past it."""


@dataclass(frozen=True)
class PaperCell:
    """One perplexity of the paper."""

    table: int
    """Number of the table in arXiv 2108.12409v2."""
    page: int
    """Page of that table."""
    method: str
    """Our name of the method."""
    train_length: int
    """The paper's L."""
    valid_length: int
    """The paper's L_valid."""
    perplexity: float | None
    """Per word; None where the paper ran out of memory."""


@functools.cache
def paper_cells() -> tuple[PaperCell, ...]:
    """Every reported cell of Tables 2 to 5, in the paper's order."""
    text = resources.files("longreach.report").joinpath("paper.csv").read_text(encoding="utf-8")
    return tuple(
        PaperCell(
            table=int(row["table"]),
            page=int(row["page"]),
            method=method,
            train_length=int(row["train_length"]),
            valid_length=int(row["valid_length"]),
            perplexity=None if row[method] == "OOM" else float(row[method]),
        )
        for row in csv.DictReader(text.splitlines())
        for method in METHODS
        if row[method]
    )


def paper_curve(method: str, train_length: int) -> dict[int, float]:
    """valid_length -> perplexity from Table 2, 3 or 4, ascending; without the lengths that ran out of memory."""
    table = EXTRAPOLATION_TABLES[train_length]
    return {
        cell.valid_length: cell.perplexity
        for cell in paper_cells()
        if (cell.table, cell.method) == (table, method) and cell.perplexity is not None
    }
