"""Recomputing every window against keeping it in a KV cache: what that costs in perplexity and brings in speed."""

from __future__ import annotations

from collections.abc import Iterator

from longreach.report.entries import by_method, loss_ratio
from longreach.report.grid import (
    ALIKE,
    Grid,
    format_perplexity,
    format_range,
    format_ratio,
    format_rough,
    format_speed,
    is_alike,
)
from longreach.report.means import are_repeated, on_chance
from longreach.report.section import Finding, Section, at_each, clauses, first
from longreach.results import Record, Results

WAYS = {
    "sliding-window": "recomputed",
    "cached": "cached",
    "cached-shifted": "shifted",
    "cached-unbounded": "unbounded",
}
"""Protocol -> what a way to move a window over a text is called on the page."""
_HOLDS = 0.02
"""A cache whose perplexity is within this share of recomputing's holds it: windows differ in what they let a token see.
"""
_CACHES = {"cached", "cached-shifted"}  # the ways that have a window, as recomputing has


def sections(results: Results) -> Iterator[Section]:
    """Ways to move a window over a text."""
    tables = at_each(ways_grid, results)
    if tables:
        yield Section("Recompute the window, or keep it in a cache?", at_each(ways, results), tables=tables)


def ways_of(results: Results, train_length: int) -> dict[tuple[str, int], dict[str, Record]]:
    """(method, validation length) -> protocol -> record, where a cache was tried.

    Of the sliding windows of one length the smallest stride is taken: the nearest to one step of a stream.
    """
    order = list(WAYS)
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for method, entries in by_method(results, results.records, train_length).items():
        moving = [entry for entry in entries if entry.protocol in WAYS]
        for entry in sorted(moving, key=lambda e: (e.valid_length, order.index(e.protocol), e.stride)):
            found.setdefault((method, entry.valid_length), {}).setdefault(entry.protocol, entry)
    return {key: ways for key, ways in found.items() if set(ways) - {"sliding-window"}}


def ways(results: Results, train_length: int) -> Finding | None:
    """What a KV cache costs in perplexity and brings in speed, beside recomputing every window.

    It is judged in windows of the training length, where recomputing is right for every method: past it a method that
    does not extrapolate is wrong both ways, and which way is more so says nothing about caches.
    """
    found = ways_of(results, train_length)
    if not found:
        return None
    comparable = {
        method: by
        for (method, length), by in found.items()
        if length == train_length and "sliding-window" in by and _CACHES & set(by)
    }
    if not comparable:
        return Finding(f"Windows of {train_length:,} tokens were not both recomputed and cached: nothing to compare.")
    verdicts: dict[str, list[str]] = {"holds with": [], "is worse with": [], "is better with": []}
    speeds = []
    for method, by_protocol in comparable.items():
        recomputed = by_protocol["sliding-window"]
        for protocol in sorted(_CACHES & set(by_protocol)):
            ratio = loss_ratio(by_protocol[protocol], recomputed)
            speed = by_protocol[protocol].tokens_per_second / recomputed.tokens_per_second
            named = f"{method} ({WAYS[protocol]}, {format_ratio(ratio)})"
            verdicts[_verdict_on_cache(ratio)].append(named)
            speeds.append(f"{method} ({WAYS[protocol]}) {'as fast' if is_alike(speed) else format_rough(speed)}")
    chosen = [e for e in results.records if e.train_length == train_length and e.method in comparable]
    recomputed_by = format_range((by["sliding-window"].stride for by in comparable.values()), "{:,}".format)
    return Finding(
        f"In windows of {train_length:,} tokens, the training length, perplexity beside recomputing "
        f"{clauses(verdicts)}.",
        f"Speed over that of recomputing with stride {recomputed_by}: {first(speeds)}.",
        "A recomputed window sees its own tokens alone; in a cache, deeper layers also keep something of what came "
        f"before it. With a stride above 1 a recomputed token sees less than its whole window. Within {_HOLDS:.0%} "
        f"counts as holding. Speeds are of {'' if are_repeated(chosen) else 'one run on '}this machine. {ALIKE} "
        f"{on_chance(chosen)}",
    )


def _verdict_on_cache(ratio: float) -> str:
    if abs(ratio - 1) <= _HOLDS:
        return "holds with"
    return "is worse with" if ratio > 1 else "is better with"


def ways_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity and speed of each way to move a window over a text, by method and window."""
    rows = []
    for (method, length), ways in ways_of(results, train_length).items():
        recomputed = ways.get("sliding-window")
        for protocol, entry in ways.items():
            relative = None if recomputed is None else loss_ratio(entry, recomputed)
            perplexity, speed = format_perplexity(entry.perplexity), format_speed(entry.tokens_per_second)
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
        columns=(("method",), ("way",), ("window",), ("stride",), ("perplexity",), ("/ recomputed",), ("tokens/s",)),
        rows=tuple(rows),
        text_columns=2,
    )
