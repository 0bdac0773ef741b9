"""The same tokens at other positions: which methods depend on absolute positions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from longreach.report.curves import Curve, Panel, Scales, draw_panels, off_scale_note
from longreach.report.drawing import LIGHT, Theme
from longreach.report.entries import LEVEL, by_method, loss_ratio
from longreach.report.grid import MISSING, Grid, format_perplexity, format_range, format_ratio
from longreach.report.means import one_by_one, thin_lines
from longreach.report.section import Finding, Picture, Section, at_each, clauses, first, listed
from longreach.results import OffsetRecord, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sections(results: Results) -> Iterator[Section]:
    """Perplexity at shifted positions."""
    if results.offsets:
        yield Section(
            title="The same tokens at other positions",
            findings=at_each(offsets, results),
            picture=Picture(
                "offsets",
                partial(offset_figure, results),
                "Perplexity against the position of each window's first token. The table below has the numbers.",
            ),
            reading=(
                "To the right of the dotted line whole windows lie at positions past the training length. A method "
                "that sees distances alone is level."
                + thin_lines(results.offsets)
                + off_scale_note(entry.perplexity for entry in results.offsets)
            ),
            further=at_each(offset_grid, results),
        )


def offsets_of(results: Results, train_length: int) -> dict[str, list[OffsetRecord]]:
    """Method -> its losses at shifted positions, ascending by offset, at the shortest validation length measured."""
    return by_method(results, _at_shortest(results, train_length), train_length)


def _at_shortest(results: Results, train_length: int) -> list[OffsetRecord]:
    found = [entry for entry in results.offsets if entry.train_length == train_length]
    shortest = min((entry.valid_length for entry in found), default=0)
    return sorted((entry for entry in found if entry.valid_length == shortest), key=lambda entry: entry.offset)


def offsets(results: Results, train_length: int) -> Finding | None:
    """Which methods depend on absolute positions."""
    methods = offsets_of(results, train_length)
    if not methods:
        return None
    furthest = max(entry.offset for entries in methods.values() for entry in entries)
    steady, varying, details = [], [], []
    for method, entries in methods.items():
        best, worst = (choose(entries, key=lambda entry: entry.loss) for choose in (min, max))
        if len(entries) > 1 and loss_ratio(worst, best) < LEVEL:
            steady.append(method)
        elif len(entries) > 1:
            varying.append(f"{method} ({format_ratio(loss_ratio(worst, best))})")
            details.append(
                f"{method} from {format_perplexity(best.perplexity)} at {best.offset:,} to "
                f"{format_perplexity(worst.perplexity)} at {worst.offset:,}"
            )
    verdicts = {
        "leaves the perplexity of": [f"{listed(steady)} as it is"] if steady else [],
        "changes that of": varying,
    }
    if not steady and not varying:
        return Finding(f"Trained at {train_length:,}: no method was tested at more than one position.")
    tokens = format_range({e.tokens for entries in methods.values() for e in entries}, "{:,}".format)
    return Finding(
        f"Trained at {train_length:,}: raising all positions, by up to {furthest:,}, {clauses(verdicts)}.",
        f"Lowest and highest perplexity: {first(details)}." if details else "",
        f"The same {tokens} tokens in the same windows: positions alone differ. Below 1% counts as no change.",
    )


def offset_figure(results: Results, theme: Theme = LIGHT) -> Figure:
    """Perplexity of the same tokens against the position of each window's first token."""
    panels = []
    for train_length in results.train_lengths():
        methods = offsets_of(results, train_length)
        if methods:
            singles = one_by_one(_at_shortest(results, train_length))
            curves = tuple(
                Curve(method, _points(entries), seeds=tuple(map(_points, singles.get(method, ()))))
                for method, entries in methods.items()
            )
            panels.append(Panel(f"Trained at {train_length:,} tokens", train_length, curves))
    scales = Scales("Position of the window's first token", "Perplexity per token", x="symlog")
    return draw_panels(panels, scales, theme)


def _points(entries: list[OffsetRecord]) -> dict[float, float]:
    return {float(entry.offset): entry.perplexity for entry in entries}


def offset_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity of the same tokens by the position of each window's first token."""
    methods = offsets_of(results, train_length)
    if not methods:
        return None
    offsets = sorted({entry.offset for entries in methods.values() for entry in entries})
    length = next(iter(methods.values()))[0].valid_length
    rows = []
    for method, entries in methods.items():
        at = {entry.offset: format_perplexity(entry.perplexity) for entry in entries}
        rows.append((method, *(at.get(offset, MISSING) for offset in offsets)))
    return Grid(
        title=f"Perplexity per token at shifted positions, trained at {train_length:,} tokens",
        note=f"Columns: position of the first token of each nonoverlapping window of {length:,} tokens.",
        columns=(("method",), *((f"{offset:,}",) for offset in offsets)),
        rows=tuple(rows),
    )
