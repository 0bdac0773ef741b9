"""What lies behind a perplexity, in sentences: use of context, strides, positions and ways to use a window.

Each function gives None where nothing of its kind was measured at the training length.
"""

from __future__ import annotations

from longreach.report.findings import NAMED, ONE_SEED, Finding, listed
from longreach.report.grid import (
    ALIKE,
    format_multiple,
    format_perplexity,
    format_range,
    format_ratio,
    format_rough,
    format_signed,
    is_alike,
)
from longreach.report.selection import (
    WAYS,
    contexts_of,
    decompositions_of,
    find_strided,
    loss_ratio,
    offsets_of,
    sliding_strides,
    stride_lengths,
    ways_of,
)
from longreach.results import ContextRecord, DecompositionRecord, Results

LEVEL = 1.01
"""Perplexities nearer to each other than this are called unchanged."""
_HOLDS = 0.02
"""A cache whose perplexity is within this share of recomputing's holds it: windows differ in what they let a token see.
"""
_CACHES = {"cached", "cached-shifted"}  # the ways that have a window, as recomputing has


def loss_by_context(results: Results, train_length: int) -> Finding | None:
    """Whether loss goes on falling past the training length, in the longest windows of each method.

    The last bin within the training length is set beside the last bin of all; they differ when their intervals do not
    overlap.
    """
    bins = {method: contexts_of(results, train_length, method) for method in results.methods(train_length)}
    longest = {method: lengths[max(lengths)] for method, lengths in bins.items() if lengths}
    if not longest:
        return None
    verdicts: dict[str, list[str]] = {"falls further with": [], "is level within the intervals with": []}
    verdicts |= {"rises with": [], "cannot be judged with": []}
    details = []
    for method, entries in longest.items():
        within = [entry for entry in entries if entry.last_context <= train_length]
        if not within or entries[-1].first_context <= train_length:
            verdicts["cannot be judged with"].append(method)
            continue
        near, far = within[-1], entries[-1]
        verdicts[_verdict_on_loss(near, far)].append(method)
        details.append(f"{method} {near.loss:.3f} at {_context(near)} and {far.loss:.3f} at {_context(far)}")
    if not details:
        return Finding(f"Past {train_length:,} tokens of context nothing was measured.")
    measured = [entry for entries in longest.values() for entry in entries]
    intervals = _intervals("Bands", {e.resampled for e in measured}, any(e.low is not None for e in measured))
    return Finding(
        f"Past {train_length:,} tokens of context, loss {_clauses(verdicts)}.",
        f"Nats per token: {'; '.join(_first(details))} tokens of context.",
        f"{intervals} Each point is of other tokens of the same text; two whose bands overlap are not told apart.",
    )


def _verdict_on_loss(near: ContextRecord, far: ContextRecord) -> str:
    if near.low is None or near.high is None or far.low is None or far.high is None:
        return "cannot be judged with"
    if far.high < near.low:
        return "falls further with"
    return "rises with" if far.low > near.high else "is level within the intervals with"


def _context(entry: ContextRecord) -> str:
    ends = (entry.first_context, entry.last_context)
    return format_range(ends, "{:,}".format)


def decomposition(results: Results, train_length: int) -> Finding | None:
    """Which methods use context beyond the training length, at the longest length at which gains were split."""
    entries = decompositions_of(results, train_length)
    if not entries:
        return None
    longest = max(entry.valid_length for entry in entries)
    entries = [entry for entry in entries if entry.valid_length == longest]
    verdicts: dict[str, list[str]] = {"helps": [], "may help": [], "makes no difference that can be told with": []}
    verdicts |= {"harms": [], "cannot be judged, for want of intervals, with": []}
    for entry in entries:
        verdicts[_verdict_on_use(entry)].append(entry.method)
    span = f"From {train_length:,} to {longest:,} tokens ({format_multiple(longest, train_length)})"
    details = [
        f"{e.method} {format_signed(e.gain)} (relief {format_signed(e.relief)}, beyond {format_signed(e.beyond)})"
        for e in sorted(entries, key=lambda entry: -entry.gain)
    ]
    drawn = any(entry.beyond_low is not None for entry in entries)
    intervals = _intervals("Whiskers", {entry.resampled for entry in entries}, drawn)
    return Finding(
        f"{span}, context beyond {train_length:,} {_clauses(verdicts)}.",
        f"Gain in nats per token: {'; '.join(_first(details))}.",
        f"{intervals} {_exactness(entries)}",
    )


def _verdict_on_use(entry: DecompositionRecord) -> str:
    if entry.beyond_low is None or entry.beyond_high is None:
        return "cannot be judged, for want of intervals, with"
    if entry.beyond_high < 0:
        return "harms"
    if entry.beyond_low <= 0:
        return "makes no difference that can be told with"
    return "helps" if entry.stride == 1 else "may help"


def _exactness(entries: list[DecompositionRecord]) -> str:
    if all(entry.stride == 1 for entry in entries):
        return "With stride 1 the split is exact for these tokens."
    strides = format_range((entry.stride for entry in entries), "{:,}".format)
    return (
        f"The capped windows slid by {strides}, which left their tokens somewhat less context than the training length "
        "(the table says how much): where loss falls with context, beyond is an upper bound and relief a lower one."
    )


def strides(results: Results, train_length: int) -> Finding | None:
    """Whether what perplexity gains with longer windows is still there when windows slide.

    They slide by the smallest stride that was measured at more than one length: probes add one at the training length.
    """
    measured = {stride: _slid_by(results, train_length, stride) for stride in sliding_strides(results, train_length)}
    if not measured:
        return None
    comparable = [stride for stride, lengths in measured.items() if len(lengths) > 1]
    if not comparable:
        return Finding("Windows that slide were measured at one length alone for each stride: no gain to compare.")
    stride = min(comparable)
    methods, lengths = results.methods(train_length), measured[stride]
    last = max(lengths)
    first = train_length if train_length in lengths and train_length < last else min(lengths)
    verdicts: dict[str, list[str]] = {
        "still falls with": [],
        "no longer falls with": [],
        "did not fall before with": [],
    }
    details = []
    for method in methods:
        cells = [find_strided(results, method, train_length, n, s) for s in (None, stride) for n in (first, last)]
        before, after, sliding_before, sliding_after = cells
        if before is None or after is None or sliding_before is None or sliding_after is None:
            continue
        plain, sliding = loss_ratio(after, before), loss_ratio(sliding_after, sliding_before)
        if plain * LEVEL > 1:
            verdicts["did not fall before with"].append(method)
        else:
            verdicts["still falls with" if sliding * LEVEL <= 1 else "no longer falls with"].append(method)
        details.append(f"{method} {format_ratio(plain)} in nonoverlapping windows, {format_ratio(sliding)} in sliding")
    if not details:
        return Finding(f"No method was measured both ways at {first:,} and {last:,} tokens: no gain to compare.")
    return Finding(
        f"Where windows slide by {stride:,}, perplexity from {first:,} to {last:,} tokens {_clauses(verdicts)}.",
        f"Perplexity at {last:,} over that at {first:,}: {'; '.join(_first(details))}.",
        f"A fall that goes away was relief from the early token curse. One below 1% counts as none. {ONE_SEED}",
    )


def _slid_by(results: Results, train_length: int, stride: int) -> set[int]:
    """The validation lengths at which windows slid by this stride."""
    methods = results.methods(train_length)
    lengths = {length for method in methods for length in stride_lengths(results, method, train_length)}
    return {n for n in lengths if any(find_strided(results, method, train_length, n, stride) for method in methods)}


def offsets(results: Results, train_length: int) -> Finding | None:
    """Which methods depend on absolute positions."""
    methods = offsets_of(results, train_length)
    if not methods:
        return None
    furthest = max(entry.offset for entries in methods.values() for entry in entries)
    steady, varying, details = [], [], []
    for method, entries in methods.items():
        best, worst = (choose(entries, key=lambda entry: entry.nll / entry.tokens) for choose in (min, max))
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
        f"Trained at {train_length:,}: raising all positions, by up to {furthest:,}, {_clauses(verdicts)}.",
        f"Lowest and highest perplexity: {'; '.join(_first(details))}." if details else "",
        f"The same {tokens} tokens in the same windows: positions alone differ. Below 1% counts as no change.",
    )


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
    recomputed_by = format_range((by["sliding-window"].stride for by in comparable.values()), "{:,}".format)
    return Finding(
        f"In windows of {train_length:,} tokens, the training length, perplexity beside recomputing "
        f"{_clauses(verdicts)}.",
        f"Speed over that of recomputing with stride {recomputed_by}: {'; '.join(_first(speeds))}.",
        "A recomputed window sees its own tokens alone; in a cache, deeper layers also keep something of what came "
        f"before it. With a stride above 1 a recomputed token sees less than its whole window. Within {_HOLDS:.0%} "
        f"counts as holding. Speeds are of one run on this machine. {ALIKE} {ONE_SEED}",
    )


def _verdict_on_cache(ratio: float) -> str:
    if abs(ratio - 1) <= _HOLDS:
        return "holds with"
    return "is worse with" if ratio > 1 else "is better with"


def _intervals(name: str, resampled: set[str], are_there: bool) -> str:
    units = listed(sorted(resampled))
    if not are_there:
        return f"There are no intervals, for there was too little to resample ({units})."
    return f"{name}: 95% bootstrap intervals over {units}."


def _clauses(verdicts: dict[str, list[str]]) -> str:
    """`falls with alibi; rises with rotary and t5`: each verdict with those that it is passed on."""
    return "; ".join(f"{verdict} {listed(names)}" for verdict, names in verdicts.items() if names)


def _first(details: list[str]) -> list[str]:
    """As many as a sentence carries; the tables have the rest."""
    return details if len(details) <= NAMED else [*details[: NAMED - 1], f"and {len(details) - NAMED + 1} more"]
