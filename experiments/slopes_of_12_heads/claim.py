"""Slopes at 12 heads, where the paper's code interleaves two sequences and others have a closed form."""

from dataclasses import replace

from experiments.slopes.claim import CLAIM as OF_8_HEADS

CLAIM = replace(
    OF_8_HEADS,
    title="The paper's slopes need no tuning (12 heads, no power of two)",
    statement=(
        "Press et al. 2022, their code: where H is no power of two, slopes are those of the power below, then every "
        "other one of the power above. Other implementations take the closed form 2^(-8 h/H)."
    ),
)
