"""What speed and memory say: beside sinusoidal, as in the paper's Table 1, and the paper's headline."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from longreach.report.entries import grid_by_length, measured, perplexity_lengths
from longreach.report.grid import (
    ALIKE,
    MISSING,
    Grid,
    format_memory,
    format_perplexity,
    format_rough,
    format_speed,
    is_alike,
    unless_empty,
    without_empty_columns,
)
from longreach.report.means import are_repeated, counted, mean_over_seeds
from longreach.report.section import Finding, Section, listed
from longreach.results import Record, Results, TrainingRecord

BASELINE = "sinusoidal"
"""The method that the paper sets the others beside."""
OURS = "alibi"
"""The method that the paper sets against the baseline."""
_ONE_SEED = "Each model is one seed: a difference of a percent or two in perplexity may be chance."
_MEMORY = (
    "Peak memory: on CUDA what PyTorch's allocator held, on the CPU all that the process held, the interpreter and "
    "PyTorch included."
)


def sections(results: Results) -> Iterator[Section]:
    """Speed and memory of training and evaluation."""
    finding, lengths = cost(results), perplexity_lengths(results)
    trained = (cost_grid(results), training_grid(results)) if results.training else ()
    details = (grid for n in lengths for make in (speed_grid, memory_grid) if (grid := make(results, n)) is not None)
    tables = (*trained, *details)
    if tables:
        yield Section("Speed and memory", () if finding is None else (finding,), further=tables)


def cost(results: Results) -> Finding | None:
    """Speed and memory of training beside sinusoidal's at the same length; None where it was not trained."""
    training = mean_over_seeds(results.training)
    baselines = {_of(entry): entry for entry in training if entry.model.method == BASELINE}
    compared = []
    for entry in training:
        baseline = baselines.get(_of(entry))
        if baseline is not None and entry is not baseline:
            relative = entry.tokens_per_second / baseline.tokens_per_second
            speed = "as fast" if is_alike(relative) else f"at {format_rough(relative)} the speed"
            at = f" at {entry.train_length:,}" if len({length for length, _ in baselines}) > 1 else ""
            compared.append(f"{entry.method}{at} trains {speed}{_used(entry, baseline)}")
    if not compared:
        return None
    return Finding(f"Beside {BASELINE} at the same training length: {listed(compared)}.", "", _on_runs(results))


def _on_runs(results: Results) -> str:
    of = f"means over {counted(results.training)} seeds" if are_repeated(results.training) else "of one run"
    return f"Speed and memory are {of} on this machine. {ALIKE}"


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
            one, two = (measured(results, entry.method, entry.train_length, long) for entry in (ours, theirs))
            if one is not None and two is not None:
                sentences.append(_comparison(ours, theirs, one, two))
                details.append(_efforts(ours, theirs))
    if not sentences:
        return None
    distinct = list(dict.fromkeys(details))
    return Finding(
        sentences[0],
        " ".join([*sentences[1:], *distinct]),
        _on_runs(results) if are_repeated(results.training) else f"{_on_runs(results)} {_ONE_SEED}",
    )


def _trained(results: Results, base: str) -> list[TrainingRecord]:
    """Trainings of a method and of its variants (`alibi:...`)."""
    return [entry for entry in mean_over_seeds(results.training) if entry.method.partition(":")[0] == base]


def _of(entry: TrainingRecord) -> tuple[int, str | None]:
    """What a model and its baseline have in common."""
    return entry.train_length, entry.model.shape


def _rivals(results: Results, ours: TrainingRecord) -> list[TrainingRecord]:
    alike = [entry for entry in _trained(results, BASELINE) if entry.model.shape == ours.model.shape]
    longer = [entry for entry in alike if entry.train_length > ours.train_length]
    lengths = {entry.train_length for entry in longer}
    double = 2 * ours.train_length
    chosen = double if double in lengths else min(lengths, default=0)
    return [entry for entry in longer if entry.train_length == chosen]


def _comparison(ours: TrainingRecord, theirs: TrainingRecord, one: Record, two: Record) -> str:
    short, long = (f"{entry.method} trained at {entry.train_length:,}" for entry in (ours, theirs))
    # Losses are compared, for perplexities that overflow are all alike.
    verdict = "at or below" if one.loss <= two.loss else "worse than"
    return (
        f"In perplexity at {theirs.train_length:,} tokens, {short} is {verdict} {long} "
        f"({format_perplexity(one.perplexity)} and {format_perplexity(two.perplexity)}); its training is "
        f"{_speed(ours.tokens_per_second / theirs.tokens_per_second)}{_memory(ours, theirs)}."
    )


def _speed(relative: float) -> str:
    if is_alike(relative):
        return "as fast"
    return f"{'faster' if relative > 1 else 'slower'}, at {format_rough(relative)} the tokens per second"


def _memory(ours: TrainingRecord, theirs: TrainingRecord) -> str:
    relative = ratio(ours.peak_memory, theirs.peak_memory)
    if relative is None:
        return ""
    if is_alike(relative):
        return ", and takes as much memory"
    change = relative - 1
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


def cost_grid(results: Results) -> Grid:
    """The paper's Table 1: speed and memory by method and training length, and relative to sinusoidal where it is."""
    training = mean_over_seeds(results.training)
    baselines = {_of(entry): entry for entry in training if entry.model.method == BASELINE}
    rows = []
    for entry in sorted(training, key=lambda entry: entry.train_length):
        baseline = baselines.get(_of(entry))
        others = (None, None, None) if baseline is None else _costs(results, baseline)
        row = [entry.method, f"{entry.train_length:,}"]
        formats = (format_speed, format_speed, format_memory)
        for text, value, other in zip(formats, _costs(results, entry), others, strict=True):
            row.append(text(value))
            if baselines:
                row.append(format_rough(ratio(value, other)))
        rows.append(tuple(row))
    columns: list[tuple[str, ...]] = [("method",), ("train", "length")]
    for name in (("training", "tokens/s"), ("evaluation", "tokens/s"), ("training", "peak memory")):
        columns += [name, (f"/ {BASELINE}'s", "at that length")] if baselines else [name]
    note = f"Evaluation: nonoverlapping windows of the training length, in the batches that it ran with. {_MEMORY}"
    if baselines:
        note = f"{note} {ALIKE}"
    return without_empty_columns(Grid("Cost, as in the paper's Table 1", note, tuple(columns), tuple(rows)), first=2)


def _costs(results: Results, entry: TrainingRecord) -> tuple[float, float | None, int | None]:
    """Training tokens/s, evaluation tokens/s in nonoverlapping windows of the training length, peak memory of training.

    None stands for what was not measured.
    """
    record = measured(results, entry.method, entry.train_length, entry.train_length)
    return entry.tokens_per_second, None if record is None else record.tokens_per_second, entry.peak_memory


def ratio(value: float | None, other: float | None) -> float | None:
    """`value` over `other`; None where one of them was not measured."""
    return value / other if value is not None and other else None


def training_grid(results: Results) -> Grid:
    """What each training took and where it arrived."""
    repeated = are_repeated(results.training)
    columns: dict[tuple[str, ...], Callable[[TrainingRecord], str]] = {
        ("method",): lambda entry: entry.method,
        ("attention",): lambda entry: entry.attention,
        ("train", "length"): lambda entry: f"{entry.train_length:,}",
        ("seed",): lambda entry: str(entry.seed) if repeated else MISSING,
        ("steps",): lambda entry: f"{entry.steps:,}",
        ("tokens",): lambda entry: f"{entry.tokens:,}",
        ("parameters",): lambda entry: f"{entry.parameters:,}",
        ("final", "loss"): lambda entry: f"{entry.final_loss:.3f}",
        ("tokens/s",): lambda entry: format_speed(entry.tokens_per_second),
        ("seconds",): lambda entry: f"{entry.seconds:,.0f}",
        ("peak", "memory"): lambda entry: format_memory(entry.peak_memory),
    }
    rows = tuple(tuple(text(entry) for text in columns.values()) for entry in results.training)
    note = "Final loss: mean over the last logged steps, in nats per token."
    return without_empty_columns(Grid("Training", note, tuple(columns), rows, text_columns=2), first=2)


def speed_grid(results: Results, train_length: int) -> Grid | None:
    """Scored tokens per second by method and validation length; None where nothing was measured."""
    title = "Evaluation speed in tokens per second"
    return unless_empty(
        grid_by_length(title, "", results, train_length, lambda record: record.tokens_per_second, format_speed, False)
    )


def memory_grid(results: Results, train_length: int) -> Grid | None:
    """Peak memory of evaluation by method and validation length; None where it could not be measured."""
    title = "Peak memory of evaluation"
    return unless_empty(
        grid_by_length(title, _MEMORY, results, train_length, lambda record: record.peak_memory, format_memory, False)
    )
