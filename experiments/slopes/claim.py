"""Slopes: the paper's geometric sequence beside other exponents, one slope for all, random and learned ones."""

from experiments import rivals
from experiments.claim import HOLDS, IN_PART, NOT_HERE, Claim, Judgement, is_below, ratio, records
from longreach.report.subjects.perplexity import perplexity_figure
from longreach.results import OverSeeds, Results


def judge(results: Results) -> Judgement:
    """Alternatives that are better at the longest length speak against the claim."""
    better = [method for method, found in rivals.beside(results).items() if is_below(found, 1)]
    extrapolates = is_below(_growth(results), 1)
    word = NOT_HERE if not extrapolates else IN_PART if better else HOLDS
    return Judgement(word, rivals.sentences(results), (rivals.grid(results),))


def _growth(results: Results) -> OverSeeds:
    (train,) = results.train_lengths()
    longest = results.valid_lengths(train)[-1]
    return ratio(records(results, "alibi", train, longest), records(results, "alibi", train, train))


CLAIM = Claim(
    title="The paper's slopes need no tuning (8 heads)",
    statement=(
        "Press et al. 2022, section 3: a geometric sequence that starts at 2^(-8/H) and has that as its ratio works "
        "for all sizes and texts tried; slopes that are trained did not extrapolate strongly and slow training by 3%, "
        "and slopes drawn at random did well at times."
    ),
    rule=(
        "ALiBi with the paper's slopes is better at the longest length than at the training length beyond the interval "
        "over seeds; the claim holds in part where an alternative is below it at the longest length."
    ),
    judge=judge,
    caveats=(
        "Small models use near context alone, for which steep slopes are enough. Speeds were measured beside other "
        "work, and tell no method from another."
    ),
    figure=perplexity_figure,
    caption=(
        "Perplexity per token by tested length, both logarithmic: the mean over seeds, single seeds thin. Dotted: the "
        "training length."
    ),
)
