"""Reach by few operations, for inputs so short that those of `key_ranges` would take longer than they save.

It is the theorem of docs/reach.md with blocks of one key, all as far from the mean as the farthest: what lies beyond a
distance is then a geometric sum, and need not be added up.
"""

import math

import torch
from torch import Tensor

from longreach.ops.lse_bound import ROUNDING, per_query_head
from longreach.ops.reach import LSE_ROUNDING, block_max, log_geometric_sum, log_tolerance, lowered_slopes
from longreach.ops.visibility import Visibility

SCORE_SLACK = 2.0**-12
"""What a lower bound of an LSE is lowered by, beside what grows with scores."""


def largest_excess(q: Tensor, k: Tensor, scale: float, block_m: int) -> Tensor:
    """By how much scores may exceed the LSE: the largest max_j s_ij - lse_i of each block of queries, (B, H, NQ).

    Scores are bounded by scale |q_i| max_j |k_j - c| with c the mean of the keys, and lse_i by the score of the key at
    the position of the query, Tq <= Tk. It is rounded up, and NaN where anything is.
    """
    num_heads, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    q, keys = q.to(dtype), k.to(dtype)
    norm = torch.linalg.vector_norm(q, dim=-1) * scale  # [B, H, Tq]
    centre = keys.mean(dim=2, keepdim=True)
    keys = keys - centre
    radius = torch.linalg.vector_norm(keys, dim=-1).amax(dim=-1, keepdim=True)  # [B, Hkv, 1]
    longest = radius + torch.linalg.vector_norm(centre, dim=-1)
    radius, longest = (per_query_head(x, num_heads) for x in (radius * (1 + radius_rounding(q)), longest))
    bound = norm * radius
    nearest = per_query_head(keys[:, :, k.shape[2] - q.shape[2] :], num_heads)
    lse = (q * nearest).sum(dim=-1) * scale - norm * longest * LSE_ROUNDING - SCORE_SLACK
    return block_max(bound - lse + ROUNDING * (bound + lse.abs()), block_m, float("-inf"))


def radius_rounding(q: Tensor) -> float:
    """What the largest distance of a key from the centre, and its product with the norm of a query, may be off by."""
    return (q.shape[3] + 16) * ROUNDING


def log_mass(tolerance: float, key_length: int, causal: bool, dtype: torch.dtype = torch.float32) -> float:
    """Log of the mass that may be dropped at either end, where weights are computed in a dtype."""
    return log_tolerance(tolerance, dtype, key_length) - (0.0 if causal else math.log(2.0))


def near_ranges(
    q: Tensor,
    k: Tensor,
    slopes: Tensor | tuple[Tensor, Tensor],
    visibility: Visibility,
    *,
    scale: float,
    tolerance: float,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    """Ranges like those of `key_ranges`, wider but by an eighth of the operations, where each query sees its own key.

    They hold what is within reach and leave it to the caller what masks hide. There is no padding, and no query
    without a key at its position.
    """
    key_length = k.shape[2]
    left, right = lowered_slopes(q, slopes)
    log_dropped = log_mass(tolerance, key_length, visibility.causal, left.dtype)
    excess = largest_excess(q, k, scale, block_m)
    first = torch.arange(0, q.shape[2], block_m, device=q.device)
    last = (first + (block_m - 1)).clamp(max=q.shape[2] - 1)

    def needed(slope: Tensor) -> Tensor:
        """At how many positions before or after those of a block the last key lies that it needs: (B, H, NQ)."""
        log_weight = log_geometric_sum(slope, key_length) - log_dropped
        distance = ((excess + log_weight[..., None]) / slope[..., None]).ceil() - 1
        # What is not a number, or no finite one, is not below anything.
        return torch.where(distance < key_length, distance.clamp(min=0), key_length).to(torch.int64)

    offset = key_length - q.shape[2]
    starts = (first + offset - needed(left)).clamp_(min=0).div_(block_n, rounding_mode="floor").to(torch.int32)
    if visibility.causal:
        return starts, torch.full_like(starts, -(-key_length // block_n))
    past = (last + (offset + 1) + needed(right)).clamp_(max=key_length)
    return starts, past.add_(block_n - 1).div_(block_n, rounding_mode="floor").to(torch.int32)
