"""How sure one can be of a mean over text: the bootstrap over documents."""

from dataclasses import dataclass

import numpy as np

MIN_UNITS = 20
"""Documents that it takes to resample documents. With fewer, an interval says more of the draw than of the text."""

RESAMPLES = 1000
"""How many samples are drawn, each of as many units as there are."""
LEVEL = 0.95
"""Nominal coverage of the intervals."""

_RESAMPLES_AT_A_TIME = 100  # bounds memory

Interval = tuple[float | None, float | None]
"""Lower and upper end, both None where there are fewer than two units to resample."""


@dataclass(frozen=True)
class Units:
    """What the bootstrap draws: stretches of text, in each of which tokens resemble one another."""

    ids: np.ndarray
    """(N,) int64: the unit of each target, from 0 and without gaps."""
    description: str
    """What the units are, as in `35 documents` or `20 blocks of 1,638 tokens`."""

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.ids.max()) + 1


def units(tokens: np.ndarray, eos_id: int, valid_length: int) -> Units:
    """The resampling unit of every target of a sequence: its document, or a block where documents are few.

    Target t is token t + 1. A document's eos belongs to the document that it ends. Documents that the sequence holds
    only in part count as documents. Where there are fewer than MIN_UNITS, the units are contiguous blocks of
    valid_length targets, or of fewer so that there are MIN_UNITS; what is left over joins the last block.

    Args:
        tokens: (N + 1,) int64 ids, at least two.
        eos_id: the token that ends a document.
        valid_length: in tokens, the longest at which the sequence is scored.
    """
    num_targets = len(tokens) - 1
    ended = np.cumsum(tokens == eos_id)  # [N + 1], documents that end at or before a token
    document = ended[:-1] - ended[0]  # the document of token t + 1 is told by the eos up to token t
    if document[-1] + 1 >= MIN_UNITS:
        return Units(document, f"{document[-1] + 1:,} documents")
    block_length = max(1, min(valid_length, num_targets // MIN_UNITS))
    count = num_targets // block_length
    block = np.minimum(np.arange(num_targets) // block_length, count - 1)
    return Units(block, f"{count:,} block{'s' * (count > 1)} of {block_length:,} token{'s' * (block_length > 1)}")


def intervals(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> list[Interval]:
    """Percentile bootstrap intervals of sum(sums) / sum(counts) of each column, for units drawn with replacement.

    (Efron & Tibshirani, 1993, chapter 13.) Units weigh by their counts, as they do in the figure itself. The draws are
    the same for all columns. Units without counts in a column do not make an interval there: it takes two that have
    some. Draws that hold none of them say nothing of the column and are left out of it.

    Args:
        sums: (U, K) what is averaged, summed over each unit.
        counts: (U, K) how many it was summed over, 0 where a unit has none.
        seed: of the draws.
    """
    num_units, num_columns = sums.shape
    columns = np.concatenate((sums, counts), axis=1)  # [U, 2 K]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES // _RESAMPLES_AT_A_TIME):
        choices = random.integers(num_units, size=(_RESAMPLES_AT_A_TIME, num_units))
        choices += num_units * np.arange(_RESAMPLES_AT_A_TIME)[:, None]  # so that one bincount serves all
        times = np.bincount(choices.ravel(), minlength=choices.size).reshape(choices.shape)  # [resamples, U]
        drawn.append(times.astype(np.float64) @ columns)
    totals, weights = np.split(np.concatenate(drawn), 2, axis=1)  # [RESAMPLES, K] each
    enough = np.count_nonzero(counts, axis=0) >= 2  # [K]
    return [
        _ends(totals[:, column], weights[:, column]) if enough[column] else (None, None)
        for column in range(num_columns)
    ]


def _ends(totals: np.ndarray, weights: np.ndarray) -> Interval:
    """The middle LEVEL of the means totals / weights of the draws that have any weight."""
    weighed = weights > 0
    low, high = np.quantile(totals[weighed] / weights[weighed], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
