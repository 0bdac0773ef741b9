"""Ways to move a window over a text: recomputed at each token, cached, and cached with positions that stay put."""

from experiments.claim import Claim, Judgement, is_above, perplexity, ratio, records, times, told, verdict
from longreach.report.grid import Grid
from longreach.report.subjects.caches import WAYS
from longreach.results import Results

SHOWN = ("sliding-window", "cached", "cached-shifted")
ABSOLUTE = ("sinusoidal", "learned")
HARMLESS = 1.02
"""Below this times the recomputed perplexity a cache holds it: deeper layers see somewhat more than one window."""


def judge(results: Results) -> Judgement:
    """Perplexity of each way, in windows of the training length, over that of recomputing with stride 1."""
    (train,) = results.train_lengths()
    of = {
        (method, way): [r for r in records(results, method, train, train, way) if r.stride == 1]
        for method in results.methods()
        for way in SHOWN
    }
    shifted = {m: ratio(of[m, "cached-shifted"], of[m, "sliding-window"]) for m in results.methods()}
    cached = ratio(of["alibi", "cached"], of["alibi", "sliding-window"])
    named = "; ".join(f"{method} {told(figure, times)}" for method, figure in shifted.items())
    parts = [is_above(shifted[method], HARMLESS) for method in ABSOLUTE if method in shifted]
    return Judgement(
        verdict([*parts, not is_above(cached, HARMLESS), not is_above(shifted["alibi"], HARMLESS)]),
        (
            f"Perplexity of the shifted cache over that of recomputing, windows of {train:,} tokens: {named}.",
            f"ALiBi with an ordinary cached window: {told(cached, times)}.",
        ),
        (
            Grid(
                title=f"Perplexity per token in windows of {train:,} tokens that move by one token",
                note=(
                    "Recomputed: each window anew. Cached: the last tokens in a KV cache. Shifted: likewise, positions "
                    "held below the window's length, keys with those that they came with. In brackets 95% t intervals."
                ),
                columns=(("method",), *((WAYS[way],) for way in SHOWN)),
                rows=tuple((m, *(told(perplexity(of[m, way])) for way in SHOWN)) for m in results.methods()),
            ),
        ),
    )


CLAIM = Claim(
    title="A cached sliding window fails with absolute positions, and works with ALiBi",
    statement=(
        "Press et al. 2021 (Shortformer) and 2022, section 2: with positions added to token embeddings, cached keys "
        "and values keep the positions that they were computed at, so that a window that moves over a text must be "
        "computed anew for each token; with biases that depend on distances alone the cache serves."
    ),
    rule=(
        "With sinusoidal and learned positions the shifted cache is worse than recomputing by more than 2% beyond the "
        "interval over seeds; ALiBi's caches, shifted or not, are not."
    ),
    judge=judge,
    caveats="In a cache, deeper layers also keep something of what left the window.",
)
