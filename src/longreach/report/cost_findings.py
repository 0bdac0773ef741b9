"""What speed and memory say, in sentences: beside sinusoidal, and the paper's headline."""

from __future__ import annotations

from longreach.report.findings import Finding, listed
from longreach.report.grid import ALIKE, MISSING, format_memory, format_perplexity, format_rough, is_alike
from longreach.report.selection import BASELINE, ratio
from longreach.results import Record, Results, TrainingRecord

OURS = "alibi"
"""The method that the paper sets against the baseline."""
_MACHINE = f"Speed and memory are of one run on this machine. {ALIKE}"


def cost(results: Results) -> Finding | None:
    """Speed and memory of training beside sinusoidal's at the same length; None where it was not trained."""
    baselines = {entry.train_length: entry for entry in results.training if entry.method == BASELINE}
    compared = []
    for entry in results.training:
        baseline = baselines.get(entry.train_length)
        if baseline is not None and entry is not baseline:
            relative = entry.tokens_per_second / baseline.tokens_per_second
            speed = "as fast" if is_alike(relative) else f"at {format_rough(relative)} the speed"
            at = f" at {entry.train_length:,}" if len(baselines) > 1 else ""
            compared.append(f"{entry.method}{at} trains {speed}{_used(entry, baseline)}")
    if not compared:
        return None
    return Finding(f"Beside {BASELINE} at the same training length: {listed(compared)}.", "", _MACHINE)


def _used(entry: TrainingRecord, baseline: TrainingRecord) -> str:
    relative = ratio(entry.peak_memory, baseline.peak_memory)
    if relative is None:
        return ""
    return f" with {'as much' if is_alike(relative) else f'{format_rough(relative)} the'} memory"


def training_advantage(results: Results) -> Finding | None:
    """The paper's headline, whatever the numbers say: ALiBi trained at L against sinusoidal trained at a longer L2.

    Both are scored in nonoverlapping windows of L2, which is 2 L where sinusoidal was trained there, or else the next
    length above L at which it was. The longest L comes first. None where there is no such pair.
    """
    sentences, details = [], []
    for ours in sorted(_trained(results, OURS), key=lambda entry: -entry.train_length):
        for theirs in _rivals(results, ours):
            long = theirs.train_length
            own, other = (results.find(entry.method, entry.train_length, long) for entry in (ours, theirs))
            if isinstance(own, Record) and isinstance(other, Record):
                sentences.append(_comparison(ours, theirs, own, other))
                details.append(_efforts(ours, theirs))
    if not sentences:
        return None
    distinct = list(dict.fromkeys(details))
    return Finding(
        sentences[0],
        " ".join([*sentences[1:], *distinct]),
        f"{_MACHINE} Each model is one seed: a difference of a percent or two in perplexity may be chance.",
    )


def _trained(results: Results, base: str) -> list[TrainingRecord]:
    """Trainings of a method and of its variants (`alibi:...`)."""
    return [entry for entry in results.training if entry.method.partition(":")[0] == base]


def _rivals(results: Results, ours: TrainingRecord) -> list[TrainingRecord]:
    longer = [entry for entry in _trained(results, BASELINE) if entry.train_length > ours.train_length]
    lengths = {entry.train_length for entry in longer}
    double = 2 * ours.train_length
    chosen = double if double in lengths else min(lengths, default=0)
    return [entry for entry in longer if entry.train_length == chosen]


def _comparison(ours: TrainingRecord, theirs: TrainingRecord, own: Record, other: Record) -> str:
    one, two = (f"{entry.method} trained at {entry.train_length:,}" for entry in (ours, theirs))
    at = f"{theirs.train_length:,} tokens"
    figures = f"({format_perplexity(own.perplexity)} and {format_perplexity(other.perplexity)})"
    # Losses are compared, for perplexities that overflow are all alike.
    if own.nll / own.tokens <= other.nll / other.tokens:
        sentence = f"In perplexity at {at}, {one} is at or below {two} {figures}"
    else:
        sentence = f"In perplexity at {at}, {one} is worse than {two} {figures}"
    relative = ours.tokens_per_second / theirs.tokens_per_second
    return f"{sentence}; its training is {_speed(relative)}{_memory(ours, theirs)}."


def _speed(relative: float) -> str:
    if is_alike(relative):
        return "as fast"
    return f"{'faster' if relative > 1 else 'slower'}, at {format_rough(relative)} the tokens per second"


def _memory(ours: TrainingRecord, theirs: TrainingRecord) -> str:
    relative = ratio(ours.peak_memory, theirs.peak_memory)
    if relative is None:
        return ""
    change = relative - 1
    if is_alike(relative):
        return ", and takes as much memory"
    return f", and takes {abs(change):.0%} {'less' if change < 0 else 'more'} memory"


def _efforts(ours: TrainingRecord, theirs: TrainingRecord) -> str:
    memory = [format_memory(entry.peak_memory) for entry in (ours, theirs)]
    peaks = "" if MISSING in memory else f", peak memory {memory[0]} and {memory[1]}"
    saw = (
        f"Both saw {ours.tokens:,} training tokens"
        if ours.tokens == theirs.tokens
        else f"They did not see as many training tokens ({ours.tokens:,} and {theirs.tokens:,})"
    )
    return f"{saw}, at {ours.tokens_per_second:,.0f} and {theirs.tokens_per_second:,.0f} tokens/s{peaks}."
