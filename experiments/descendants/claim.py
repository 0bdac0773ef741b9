"""Descendants of ALiBi: which of them extrapolates better at this size, and at what cost."""

from experiments import rivals
from experiments.claim import Claim, Judgement, is_below, verdict
from longreach.report.subjects.perplexity import perplexity_figure
from longreach.results import Results

BETTER = ("kerple", "fire")
"""Said by their papers to be better than ALiBi past the training length."""


def judge(results: Results) -> Judgement:
    """Whether those whose papers say so are below ALiBi at the longest length."""
    found = rivals.beside(results)
    return Judgement(
        verdict(is_below(found[method], 1) for method in BETTER), rivals.sentences(results), (rivals.grid(results),)
    )


CLAIM = Claim(
    title="Learned biases extrapolate better than ALiBi",
    statement=(
        "Chi et al. 2022 (KERPLE, arXiv 2205.09921) and Li et al. 2024 (FIRE, arXiv 2310.04418): biases that fall as "
        "the logarithm of distance, or that are learned functions of it, have lower perplexity past the training "
        "length than ALiBi. Beside them Sandwich (2212.10356), xPos (2212.10554), rotary at randomized positions "
        "(2305.16843) and no positions at all."
    ),
    rule="The perplexity of KERPLE's logarithm and of FIRE at the longest length is below ALiBi's beyond the interval.",
    judge=judge,
    caveats=(
        "Parameters of a bias are the same in every layer here, and learn from a million tokens of 128: the likely "
        "reason that what is learned of distances says little of longer ones. Speeds were measured beside other work, "
        "and tell no method from another. xPos ends where float32 does."
    ),
    figure=perplexity_figure,
    caption=(
        "Perplexity per token by tested length, both logarithmic: the mean over seeds, single seeds thin. Dotted: the "
        "training length."
    ),
)
