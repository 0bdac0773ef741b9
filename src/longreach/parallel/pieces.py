"""Where to cut a sequence so that ranks finish together."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longreach.ops.arguments import (
    is_number,
    shown,
    validate_integer,
    validate_types,
    validate_values,
    validated_tolerance,
)
from longreach.ops.cpu.bounding import expected_reach
from longreach.ops.reach import KEY_BLOCK


def balanced_pieces(
    length: int,
    size: int,
    slopes: Tensor,
    *,
    tolerance: float = 2.0**-24,
    window_size: int | None = None,
    per_token: float = 0.0,
    most: float | None = None,
) -> tuple[int, ...]:
    """Lengths of the pieces of a sequence that give each rank as much causal attention, or work per token besides.

    A query of a head reads min(i + 1, reach, window) keys, with the reach that scores of std 1 have at its slope. So
    early tokens cost less than late ones until the position passes the reach of the shallowest head, and a plain head's
    cost grows to the end. Bidirectional attention costs as much everywhere: cut it evenly.

    Args:
        length: T, in tokens.
        size: number of ranks.
        slopes: (H,), zero for a plain head.
        tolerance: as in `longreach.attention`.
        window_size: likewise.
        per_token: what every token costs besides, in keys of one head: 6 C^2 / D for a block of the decoder.
        most: how many times the tokens of an even share, T / size, a piece may have, at least 1; None for any number.
            What a piece takes of memory goes with its tokens. The ranks after one that is cut short share the rest.

    Returns:
        As many lengths as ranks, which sum to `length`. Borders are multiples of KEY_BLOCK where there are enough, to
        which `most` is rounded up. The last ones are 0 where there are fewer tokens than ranks.

    Raises:
        ValueError: a value out of range.
    """
    size = validate_integer("size", size, 1)
    length = validate_integer("length", length, 0)
    validate_types(slopes=slopes)
    validate_values("slopes", slopes, 0.0)
    validated_tolerance(tolerance)
    if window_size is not None:
        validate_integer("window_size", window_size, 1)
    if not (is_number(per_token) and per_token >= 0):
        raise ValueError(f"per_token={shown(per_token)}: give at least 0")
    if not (most is None or (is_number(most) and most >= 1)):
        raise ValueError(f"most={shown(most)}: give at least 1, or None for no limit")
    if length < size:
        return (1,) * length + (0,) * (size - length)
    block = KEY_BLOCK if length >= KEY_BLOCK * size else 1
    ends = torch.arange(block, length + block, block).clamp(max=length)
    reach = torch.tensor(
        [expected_reach(slope, tolerance) for slope in slopes.flatten().tolist()], dtype=torch.float64
    ).clamp(max=length if window_size is None else min(length, window_size))
    # The sum of min(i + 1, d) over the first n tokens is n (n + 1) / 2 up to d, and d more for each token from there.
    within = torch.minimum(ends[:, None].double(), reach)
    work = (within * (within + 1) / 2 + (ends[:, None] - within) * reach).sum(dim=1) + per_token * ends
    largest = len(ends) if most is None else math.ceil(most * length / size / block)
    return _cut([0, *ends.tolist()], [0.0, *work.tolist()], size, largest)


def _cut(ends: Sequence[int], work: Sequence[float], size: int, largest: int) -> tuple[int, ...]:
    """Lengths of pieces that end where work is nearest to an equal share of what is left, of 1 to `largest` ends."""
    cuts = [0]
    for left in range(size, 1, -1):
        share = work[cuts[-1]] + (work[-1] - work[cuts[-1]]) / left
        after = bisect_left(work, share)
        nearest = after if work[after] - share <= share - work[after - 1] else after - 1
        least = max(cuts[-1] + 1, len(ends) - 1 - largest * (left - 1))
        cuts.append(min(max(nearest, least), cuts[-1] + largest, len(ends) - left))
    return tuple(ends[past] - ends[first] for first, past in pairwise([*cuts, len(ends) - 1]))
