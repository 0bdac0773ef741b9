"""Position interpolation: scaled slopes and frequencies at 1x to 4x the training length, and fine-tuned at 2x."""

from experiments.claim import Claim, Judgement, is_above, is_below, perplexity, ratio, records, times, told, verdict
from experiments.interpolation.commands import FACTOR
from longreach.report.grid import Grid, format_interval, format_percent
from longreach.report.subjects.retrieval import Score, scores
from longreach.results import OverSeeds, Results, over_seeds

LINEAR = "alibi:linear"


def judge(results: Results) -> Judgement:
    """Twice the training length decides; what is longer, and rotary positions, stand in the tables."""
    train, tuned = results.train_lengths()
    tested = results.valid_lengths(train)
    twice = 2 * train
    answers = {length: scores("retrieval", results, length) for length in (train, tuned)}
    plain, linear = (answers[train][method][twice] for method in ("alibi", LINEAR))
    loss = ratio(records(results, LINEAR, train, twice), records(results, "alibi", train, twice))
    without, factored = (answers[tuned][method][twice] for method in ("alibi", f"alibi:{FACTOR}"))
    helped = [n for n in tested if n > train and is_below(_over_plain(results, LINEAR, train, n), 1)]
    finds = [n for n in tested if n > train and _more(answers[train][LINEAR][n], answers[train]["alibi"][n])]
    return Judgement(
        verdict((_more(linear, plain), not is_above(loss, 1), not _more(without, factored))),
        (
            f"At {twice:,} tokens ALiBi trained at {train:,} finds {_found(plain)} of the words as it is and "
            f"{_found(linear)} with linear scaling, whose perplexity is {told(loss, times)} of that without.",
            f"Fine-tuned at {tuned:,}, it finds {_found(without)} there, and {_found(factored)} with the fixed factor.",
            f"Linear scaling lowers ALiBi's perplexity beyond the interval at {_lengths(helped)}, and finds more words "
            f"beyond theirs at {_lengths(finds)}, of the tested lengths past {train:,}.",
        ),
        (
            Grid(
                title="Perplexity per token by tested length, and speed of evaluation at the longest",
                note=(
                    f"Trained at {train:,}, tested under each scaling; or then fine-tuned at {tuned:,}. Speed over "
                    "that of the same model unscaled. In brackets 95% t intervals over seeds."
                ),
                columns=(("method",), ("trained at",), *((f"{n:,}",) for n in tested), ("speed",)),
                rows=tuple(
                    (
                        method,
                        f"{length:,}",
                        *(told(perplexity(records(results, method, length, n))) for n in tested),
                        told(_speed(results, method, length, tested[-1]), times),
                    )
                    for length in (train, tuned)
                    for method in results.methods(length)
                ),
                text_columns=2,
            ),
            Grid(
                title="Words found by prompt length",
                note="All seeds and depths together. In brackets 95% intervals of a share (Wilson).",
                columns=(("method",), ("trained at",), *((f"{n:,}",) for n in tested)),
                rows=tuple(
                    (method, f"{length:,}", *(_found(by_length[n]) for n in tested))
                    for length in (train, tuned)
                    for method, by_length in answers[length].items()
                ),
                text_columns=2,
            ),
        ),
    )


def _plain(method: str) -> str:
    """The same method unscaled."""
    return method.partition(":")[0]


def _over_plain(results: Results, method: str, train: int, length: int) -> OverSeeds:
    return ratio(records(results, method, train, length), records(results, _plain(method), train, length))


def _speed(results: Results, method: str, train: int, length: int) -> OverSeeds | None:
    """Tokens per second over those of the same method unscaled, a ratio for each seed."""
    if method == _plain(method):
        return None
    pairs = zip(records(results, method, train, length), records(results, _plain(method), train, length), strict=True)
    return over_seeds([ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs])


def _more(one: Score, other: Score) -> bool:
    """Whether one finds more than the other beyond the intervals of both."""
    return one.interval[0] > other.interval[1]


def _found(score: Score) -> str:
    return f"{format_percent(score.accuracy)} {format_interval(*score.interval, text=format_percent)}"


def _lengths(lengths: list[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths) or "none"


CLAIM = Claim(
    title="Slopes interpolated at test time find at twice the length what they do not find unscaled",
    statement=(
        "Al-Khateeb et al. 2023 (arXiv 2310.13017): slopes times L/L' past L let ALiBi models use about twice their "
        "training length without fine-tuning; QMSum's ROUGE-1 of BTLM-3B-8K is 16.6 with and 7.3 without. For further "
        "training at a longer length the factor is fixed. Left open: how it fares beside rotary positions with "
        "theirs, where it stops to help, and what it costs."
    ),
    rule=(
        "At twice the training length, ALiBi with linear scaling finds more words than without, beyond the intervals "
        "of both, at a perplexity that is not above its own without scaling beyond the interval over seeds; "
        "fine-tuned there with the fixed factor it does not find fewer than fine-tuned without."
    ),
    judge=judge,
    caveats=(
        "A fifth of all sequences are for retrieval; the 300 steps are those of fine-tuning. The word to be found is "
        "told once among eight sentences that come again and again, which is easier than a meeting to summarize. "
        "Speeds were measured beside other work: their intervals say how little they tell."
    ),
)
