"""Differences between methods over seeds: which hold on the same seeds and tokens, and which may be chance."""

from __future__ import annotations

import math
from collections.abc import Iterator

from longreach.report.entries import measured, measured_seeds, perplexity_lengths, perplexity_methods
from longreach.report.grid import MISSING, Grid, format_interval, format_multiple, format_perplexity, unless_empty
from longreach.report.means import counted, ratio_to
from longreach.report.section import Finding, Section, at_each, clauses
from longreach.results import Results
from longreach.results.seeds import OverSeeds


def sections(results: Results) -> Iterator[Section]:
    """Ratios of perplexities, paired by seed; nothing where each method has one seed."""
    lengths = perplexity_lengths(results)
    tables = at_each(difference_grid, results, lengths)
    if tables:
        findings = at_each(differences, results, lengths)
        yield Section("Which differences hold over seeds?", findings, tables=tables)


def ratios_of(results: Results, train_length: int) -> tuple[str, dict[str, dict[int, OverSeeds]]]:
    """The method of the lowest perplexity at the longest length, and other method -> length -> perplexity over its."""
    methods, lengths = perplexity_methods(results, train_length), results.valid_lengths(train_length)
    seeds = {
        (method, length): measured_seeds(results, method, train_length, length)
        for method in methods
        for length in lengths
    }
    repeated = [length for length in lengths if any(len(seeds[method, length]) > 1 for method in methods)]
    if not repeated:
        return "", {}

    def level(method: str) -> float:
        mean = measured(results, method, train_length, repeated[-1])
        return math.inf if mean is None or len(seeds[method, repeated[-1]]) < 2 else mean.loss

    lowest = min(methods, key=level)
    found: dict[str, dict[int, OverSeeds]] = {}
    for method in methods:
        for length in repeated:
            ratio = ratio_to(seeds[method, length], seeds[lowest, length])
            if ratio is not None and method != lowest:
                found.setdefault(method, {})[length] = ratio
    return lowest, found


def differences(results: Results, train_length: int) -> Finding | None:
    """What the best method is told apart from at the longest length."""
    lowest, ratios = ratios_of(results, train_length)
    if not ratios:
        return None
    longest = max(length for by_length in ratios.values() for length in by_length)
    verdicts: dict[str, list[str]] = {"is below that of": [], "is above that of": []}
    verdicts["cannot be told from that of"] = []
    for method, by_length in ratios.items():
        if longest in by_length:
            verdicts[_verdict(by_length[longest])].append(method)
    return Finding(
        f"Trained at {train_length:,}, on the same seeds and tokens, the perplexity of {lowest} at {longest:,} tokens "
        f"{clauses(verdicts)}.",
        "",
        "Paired by seed: the mean difference of losses with its 95% t interval, written as a ratio of perplexities. It "
        "speaks for other seeds on the same text; where it holds 1x, the difference may be chance.",
    )


def _verdict(ratio: OverSeeds) -> str:
    if ratio.low is None or ratio.high is None or ratio.low <= 1 <= ratio.high:
        return "cannot be told from that of"
    return "is below that of" if ratio.low > 1 else "is above that of"


def difference_grid(results: Results, train_length: int) -> Grid | None:
    """Perplexity of each method over that of the best, paired by seed, by validation length."""
    lowest, ratios = ratios_of(results, train_length)
    lengths = sorted({length for by_length in ratios.values() for length in by_length})
    rows = []
    for method, by_length in ratios.items():
        rows.append((method, *(_ratio(by_length.get(length)) for length in lengths)))
    seeds = counted(entry for entry in results.records if entry.train_length == train_length)
    return unless_empty(
        Grid(
            title=f"Perplexity over that of {lowest}, trained at {train_length:,} tokens",
            note=f"Paired by seed, over {seeds} seeds, with 95% t intervals. Columns: validation length.",
            columns=(("method",), *((f"{length:,}", format_multiple(length, train_length)) for length in lengths)),
            rows=tuple(rows),
        )
    )


def _ratio(ratio: OverSeeds | None) -> str:
    if ratio is None:
        return MISSING
    return f"{_number(ratio.mean)} {format_interval(ratio.low, ratio.high, _number)}"


def _number(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 2 else format_perplexity(ratio)
