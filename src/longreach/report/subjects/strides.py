"""Sliding windows beside nonoverlapping ones: whether a gain with length is still there when windows slide."""

from __future__ import annotations

from collections.abc import Iterator

from longreach.report.entries import LEVEL, by_method, loss_ratio
from longreach.report.grid import MISSING, Grid, format_perplexity, format_ratio
from longreach.report.means import on_chance
from longreach.report.section import Finding, Section, at_each, clauses, first
from longreach.results import Record, Results

Cells = dict[tuple[int, int | None], Record]
"""(validation length, stride) -> perplexity; the stride of nonoverlapping windows is None."""


def sections(results: Results) -> Iterator[Section]:
    """Perplexity by stride."""
    tables = at_each(stride_grid, results)
    if tables:
        yield Section(
            title="Sliding windows",
            findings=at_each(strides, results),
            reading=(
                "The smaller the stride, the fewer tokens are scored with little context, and the dearer is scoring."
            ),
            tables=tables,
        )


def cells_of(results: Results, train_length: int) -> dict[str, Cells]:
    """Method -> its perplexities, of those methods that have sliding windows."""
    found: dict[str, Cells] = {}
    for method, entries in by_method(results, results.records, train_length).items():
        cells: Cells = {(e.valid_length, e.stride): e for e in entries if e.protocol == "sliding-window"}
        if cells:
            plain = (entry for entry in entries if entry.protocol == "nonoverlapping")
            found[method] = cells | {(entry.valid_length, None): entry for entry in plain}
    return found


def _strides(methods: dict[str, Cells]) -> list[int]:
    """By how much windows slid, ascending."""
    return sorted({stride for cells in methods.values() for _, stride in cells if stride is not None})


def strides(results: Results, train_length: int) -> Finding | None:
    """Whether what perplexity gains with longer windows is still there when windows slide.

    They slide by the smallest stride that was measured at more than one length: probes add one at the training length.
    """
    methods = cells_of(results, train_length)
    lengths = {s: {n for cells in methods.values() for n, by in cells if by == s} for s in _strides(methods)}
    if not lengths:
        return None
    stride = min((stride for stride in lengths if len(lengths[stride]) > 1), default=None)
    if stride is None:
        return Finding("Windows that slide were measured at one length alone for each stride: no gain to compare.")
    far = max(lengths[stride])
    near = train_length if train_length in lengths[stride] and train_length < far else min(lengths[stride])
    verdicts: dict[str, list[str]] = {
        "still falls with": [],
        "no longer falls with": [],
        "did not fall before with": [],
    }
    details = []
    for method, cells in methods.items():
        plain, sliding = (_growth(cells, near, far, by) for by in (None, stride))
        if plain is None or sliding is None:
            continue
        if plain * LEVEL > 1:
            verdicts["did not fall before with"].append(method)
        else:
            verdicts["still falls with" if sliding * LEVEL <= 1 else "no longer falls with"].append(method)
        details.append(f"{method} {format_ratio(plain)} in nonoverlapping windows, {format_ratio(sliding)} in sliding")
    chosen = [entry for entry in results.records if entry.train_length == train_length and entry.method in methods]
    if not details:
        return Finding(f"No method was measured both ways at {near:,} and {far:,} tokens: no gain to compare.")
    return Finding(
        f"Where windows slide by {stride:,}, perplexity from {near:,} to {far:,} tokens {clauses(verdicts)}.",
        f"Perplexity at {far:,} over that at {near:,}: {first(details)}.",
        "A fall that goes away was relief from the early token curse. One below 1% counts as none. "
        f"{on_chance(chosen)}",
    )


def _growth(cells: Cells, near: int, far: int, stride: int | None) -> float | None:
    over, under = cells.get((far, stride)), cells.get((near, stride))
    return None if over is None or under is None else loss_ratio(over, under)


def stride_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity by method, validation length and stride; nonoverlapping windows come last."""
    methods = cells_of(results, train_length)
    if not methods:
        return None
    strides = _strides(methods)
    rows = []
    for method, cells in methods.items():
        for length in sorted({length for length, _ in cells}):
            entries = [cells.get((length, stride)) for stride in (*strides, None)]
            texts = (MISSING if entry is None else format_perplexity(entry.perplexity) for entry in entries)
            rows.append((method, f"{length:,}", *texts))
    columns = (("method",), ("validation", "length"), *(("stride", f"{stride:,}") for stride in strides))
    return Grid(
        title=f"Perplexity per token by stride, trained at {train_length:,} tokens",
        note="Stride: tokens newly scored in each sliding window; all the others in it are context alone.",
        columns=(*columns, ("no overlap",)),
        rows=tuple(rows),
    )
