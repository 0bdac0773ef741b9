"""The headline: ALiBi trained at L beside sinusoidal positions trained at 2 L, tested at 2 L."""

from statistics import fmean

from experiments.claim import Claim, Judgement, is_above, perplexity, ratio, records, times, told, verdict
from longreach.report.grid import Grid, format_memory
from longreach.results import OverSeeds, Results, TrainingRecord, over_seeds


def judge(results: Results) -> Judgement:
    """Each training length but the longest, beside sinusoidal positions at twice of it."""
    rows, findings, parts = [], [], []
    for short in results.train_lengths()[:-1]:
        long = 2 * short
        ours, theirs = (_trained(results, *model) for model in (("alibi", short), ("sinusoidal", long)))
        found = ratio(records(results, "alibi", short, long), records(results, "sinusoidal", long, long))
        faster = _per_seed(ours, theirs, "tokens_per_second")
        memory = _per_seed(ours, theirs, "peak_memory")
        parts += [not is_above(found, 1), is_above(faster, 1), not is_above(memory, 1)]
        findings.append(
            f"At {long:,} tokens, ALiBi trained at {short:,} over sinusoidal trained at {long:,}: perplexity "
            f"{told(found, times)}, training speed {told(faster, times)}, memory {told(memory, times)}."
        )
        for method, trained_at, entries in (("alibi", short, ours), ("sinusoidal", long, theirs)):
            at = perplexity(records(results, method, trained_at, long))
            speed = f"{fmean(entry.tokens_per_second for entry in entries):,.0f}"
            held = format_memory(max(entry.peak_memory or 0 for entry in entries))
            rows.append((method, f"{trained_at:,}", f"{long:,}", told(at), speed, held))
    return Judgement(
        verdict(parts),
        tuple(findings),
        (
            Grid(
                title="Perplexity, training speed and peak memory",
                note="The same number of tokens in training. In brackets 95% t intervals over seeds.",
                columns=(
                    *(("method",), ("trained at",), ("tested at",)),
                    *(("perplexity",), ("training", "tokens/s"), ("training", "memory")),
                ),
                rows=tuple(rows),
            ),
        ),
    )


def _trained(results: Results, method: str, train_length: int) -> list[TrainingRecord]:
    return [entry for entry in results.training if (entry.method, entry.train_length) == (method, train_length)]


def _per_seed(ours: list[TrainingRecord], theirs: list[TrainingRecord], name: str) -> OverSeeds:
    pairs = zip(ours, theirs, strict=True)
    return over_seeds([getattr(one, name) / getattr(two, name) for one, two in pairs])


CLAIM = Claim(
    title="Trained at half the length, ALiBi matches sinusoidal positions, faster and with less memory",
    statement=(
        "Press et al. 2022, abstract and Table 11 (1.3B parameters, CC100 and RoBERTa's corpus): ALiBi trained at "
        "1,024 reaches 8.92 at 2,048 tokens, the sinusoidal model trained at 2,048 reaches 9.01; it trains 11% faster "
        "and uses 11% less memory. Trained at 512 it reaches 9.30 at 1,024 tokens, the other 9.24."
    ),
    rule=(
        "At each length, beyond the interval over seeds: ALiBi's perplexity is not above sinusoidal's, its training is "
        "faster, and its peak memory is not larger."
    ),
    judge=judge,
    caveats=(
        "Both see the same tokens, where the paper gives both the same time. At one of three seeds "
        "sinusoidal positions trained at 1,024 learned much less (117 where the others reach 73 and 72): the reason "
        "that no interval tells the two apart there. Speed and memory are of two processor cores, where models of this "
        "size spend little on attention, and the memory of the process holds Python and PyTorch too."
    ),
)
