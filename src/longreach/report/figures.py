"""Perplexity against validation length, for our results and for the paper's, drawn alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longreach.report.drawing import LIGHT, Theme
from longreach.report.drawing import to_svg as to_svg
from longreach.report.line_panels import Curve, Panel, Scales, draw_panels
from longreach.report.paper_tables import EXTRAPOLATION_TABLES, METHODS, paper_curve
from longreach.report.selection import perplexity_lengths
from longreach.results import Record, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def perplexity_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Perplexity per token against validation length, one panel per training length."""
    panels = []
    for train_length in perplexity_lengths(results):
        curves = []
        for method in results.methods(train_length):
            entries = (results.find(method, train_length, n) for n in results.valid_lengths(train_length))
            points = {float(entry.valid_length): entry.perplexity for entry in entries if isinstance(entry, Record)}
            if points:
                curves.append(Curve(method, points))
        panels.append(Panel(f"Trained at {train_length:,} tokens", train_length, tuple(curves)))
    scales = Scales("Validation length in tokens", "Perplexity per token")
    return draw_panels(panels, scales, 6.2 if len(panels) == 1 else 3.3, theme)


def paper_figure(theme: Theme = LIGHT) -> Figure:
    """The paper's Tables 2, 3 and 4 in the same style."""
    panels = [
        Panel(
            f"Trained at {train_length:,} (Table {table})",
            train_length,
            tuple(Curve(method, _floats(paper_curve(method, train_length))) for method in METHODS),
        )
        for train_length, table in EXTRAPOLATION_TABLES.items()
    ]
    return draw_panels(panels, Scales("Validation length in tokens", "Perplexity per word"), 2.6, theme)


def _floats(curve: dict[int, float]) -> dict[float, float]:
    return {float(length): perplexity for length, perplexity in curve.items()}
