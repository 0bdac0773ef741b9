"""The tables of what lies behind a perplexity: where gains come from, strides, positions and ways to use a window.

Each function gives None where nothing of its kind was measured at the training length.
"""

from __future__ import annotations

from longreach.report.grid import (
    MISSING,
    Grid,
    format_interval,
    format_perplexity,
    format_ratio,
    format_signed,
)
from longreach.report.selection import (
    WAYS,
    decompositions_of,
    find_strided,
    loss_ratio,
    offsets_of,
    sliding_strides,
    stride_lengths,
    ways_of,
)
from longreach.results import Results


def decomposition_grid(results: Results, train_length: int) -> Grid | None:
    """Gain, relief and beyond of each method at each validation length, with intervals."""
    entries = decompositions_of(results, train_length)
    if not entries:
        return None
    rows = tuple(
        (
            entry.method,
            f"{entry.valid_length:,}",
            format_signed(entry.gain),
            f"{format_signed(entry.relief)} {format_interval(entry.relief_low, entry.relief_high)}",
            f"{format_signed(entry.beyond)} {format_interval(entry.beyond_low, entry.beyond_high)}",
            f"{entry.stride:,}",
            f"{entry.capped_context:,.4g}",
        )
        for entry in entries
    )
    return Grid(
        title=f"Where the gain comes from, in nats per token, trained at {train_length:,} tokens",
        note=(
            "Gain: fall of the loss from windows of the training length to windows of the validation length. It is "
            "the sum of relief, which remains when no token may see more than the training length, and beyond. "
            "Stride and mean context are those of the windows that were so capped."
        ),
        columns=(
            ("method",),
            ("validation", "length"),
            ("gain",),
            ("relief", "95% interval"),
            ("beyond", "95% interval"),
            ("capped", "stride"),
            ("capped", "context"),
        ),
        rows=rows,
    )


def stride_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity by method, validation length and stride; nonoverlapping windows come last."""
    strides = sliding_strides(results, train_length)
    if not strides:
        return None
    rows = []
    for method in results.methods(train_length):
        for length in stride_lengths(results, method, train_length):
            entries = [find_strided(results, method, train_length, length, stride) for stride in (*strides, None)]
            cells = (MISSING if entry is None else format_perplexity(entry.perplexity) for entry in entries)
            rows.append((method, f"{length:,}", *cells))
    return Grid(
        title=f"Perplexity per token by stride, trained at {train_length:,} tokens",
        note="Stride: tokens newly scored in each sliding window; all the others in it are context alone.",
        columns=(
            ("method",),
            ("validation", "length"),
            *(("stride", f"{stride:,}") for stride in strides),
            ("no overlap",),
        ),
        rows=tuple(rows),
    )


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


def ways_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity and speed of each way to move a window over a text, by method and window."""
    rows = []
    for (method, length), ways in ways_of(results, train_length).items():
        recomputed = ways.get("sliding-window")
        for protocol, entry in ways.items():
            relative = None if recomputed is None else loss_ratio(entry, recomputed)
            perplexity, speed = format_perplexity(entry.perplexity), f"{entry.tokens_per_second:,.0f}"
            rows.append(
                (method, WAYS[protocol], f"{length:,}", f"{entry.stride:,}", perplexity, format_ratio(relative), speed)
            )
    if not rows:
        return None
    return Grid(
        title=f"Ways to use a window, trained at {train_length:,} tokens",
        note=(
            "Recomputed: every window anew. Cached: one token after another, its window in a KV cache. Shifted: the "
            "naive cache, in which positions stay below the window's length and cached keys keep those that they came "
            "with. Unbounded: nothing leaves the cache, and the window is the whole text."
        ),
        columns=(
            ("method",),
            ("way",),
            ("window",),
            ("stride",),
            ("perplexity",),
            ("/ recomputed",),
            ("tokens/s",),
        ),
        rows=tuple(rows),
        text_columns=2,
    )
