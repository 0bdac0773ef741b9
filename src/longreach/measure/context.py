"""What context is worth: loss by how much of it a token had, and where the gain of longer windows comes from.

`docs/evaluation.md` has the algebra of the decomposition and says how to read it.
"""

import numpy as np

from longreach.measure.bootstrap import Units, intervals
from longreach.measure.score import Scores
from longreach.results import ContextRecord, DecompositionRecord, Model

BINS_PER_OCTAVE = 2
"""Bins of context for each doubling of it."""


def context_bins(length: int) -> np.ndarray:
    """Edges of bins that partition the contexts 1..length: bin k holds edges[k] <= context < edges[k + 1].

    Bins end at length / 2^(i / BINS_PER_OCTAVE), rounded, so that none is cut short at the top, and so that lengths
    that are each other's power of two share their ends. Bins of short contexts, where these ends lie closer than one
    token, hold a single context.
    """
    halvings = np.arange(BINS_PER_OCTAVE * length.bit_length()) / BINS_PER_OCTAVE
    ends = np.unique(np.rint(length / 2**halvings).astype(np.int64))  # the last of each bin, down to 1
    return np.concatenate(([1], ends + 1))


def loss_by_context(scores: Scores, documents: Units, *, model: Model, valid_length: int) -> list[ContextRecord]:
    """Loss of nonoverlapping windows of valid_length by the tokens of context that each target had.

    Bins into which no target falls are left out; there are none where the text has a whole window.

    Args:
        scores: of every target.
        documents: what to resample for the intervals.
        model: whose scores they are.
        valid_length: the most context that a target can have had.
    """
    edges = context_bins(valid_length)
    num_bins = len(edges) - 1
    bins = np.searchsorted(edges, scores.context, side="right") - 1  # [N]
    cells = documents.ids * num_bins + bins
    shape = (documents.count, num_bins)
    sums = np.bincount(cells, weights=scores.nll, minlength=shape[0] * shape[1]).reshape(shape)  # [U, bins]
    counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    ends = intervals(sums, counts)
    return [
        ContextRecord(
            model=model,
            valid_length=valid_length,
            first_context=int(edges[k]),
            last_context=int(edges[k + 1]) - 1,
            tokens=int(tokens),
            nll=float(sums[:, k].sum()),
            low=ends[k][0],
            high=ends[k][1],
            resampled=documents.description,
        )
        for k, tokens in enumerate(counts.sum(axis=0))
        if tokens
    ]


def decompose(
    base: Scores,
    sliding: Scores,
    long: Scores,
    documents: Units,
    *,
    model: Model,
    valid_length: int,
    stride: int,
) -> DecompositionRecord:
    """Split the gain from windows of L, the model's train_length, to windows of valid_length, target by target.

    With c and c' the context of a target in nonoverlapping windows of the two lengths,

        gain   = mean nll(c) - nll(c')
        relief = mean nll(c) - nll(min(L, c'))
        beyond = mean nll(min(L, c')) - nll(c')

    The middle term, of capped context, is taken from base where c = min(L, c'), else from long where c' <= L, else
    from sliding.

    Args:
        base: nonoverlapping windows of L.
        sliding: windows of L that slide by stride.
        long: nonoverlapping windows of valid_length, at least one of them whole.
        documents: what to resample for the intervals.
        model: whose scores they are.
        valid_length: above L.
        stride: of sliding. At 1 the capped context is exact, else it falls short of L by up to stride - 1.
    """
    train_length = model.train_length
    longer = long.context > train_length  # [N]
    from_base = base.context == np.minimum(train_length, long.context)
    from_sliding = longer & ~from_base
    capped = np.select([from_base, from_sliding], [base.nll, sliding.nll], default=long.nll)
    capped_context = np.where(from_sliding, sliding.context, train_length)[longer]

    parts = np.stack((base.nll - capped, capped - long.nll), axis=1)  # [N, relief and beyond]
    sums = np.stack([np.bincount(documents.ids, weights=part) for part in parts.T], axis=1)  # [U, 2]
    counts = np.repeat(np.bincount(documents.ids)[:, None], 2, axis=1)
    (relief_low, relief_high), (beyond_low, beyond_high) = intervals(sums, counts)
    return DecompositionRecord(
        model=model,
        valid_length=valid_length,
        stride=stride,
        capped_context=float(capped_context.mean()),
        tokens=len(capped),
        base_nll=float(base.nll.sum()),
        capped_nll=float(capped.sum()),
        long_nll=float(long.nll.sum()),
        relief_low=relief_low,
        relief_high=relief_high,
        beyond_low=beyond_low,
        beyond_high=beyond_high,
        resampled=documents.description,
    )
