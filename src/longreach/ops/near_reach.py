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
    num_heads, key_length = q.shape[1], k.shape[2]
    left, right = lowered_slopes(q, slopes)
    log_mass = log_tolerance(tolerance, left.dtype, key_length) - (0.0 if visibility.causal else math.log(2.0))
    q = q.to(left.dtype)
    norm = torch.linalg.vector_norm(q, dim=-1) * scale  # [B, H, Tq]
    keys = k.to(left.dtype)
    centre = keys.mean(dim=2, keepdim=True)
    keys = keys - centre
    radius = torch.linalg.vector_norm(keys, dim=-1).amax(dim=-1, keepdim=True)  # [B, Hkv, 1]
    longest = radius + torch.linalg.vector_norm(centre, dim=-1)
    radius, longest = (per_query_head(x, num_heads) for x in (radius * (1 + (q.shape[3] + 16) * ROUNDING), longest))
    bound = norm * radius
    nearest = per_query_head(keys[:, :, key_length - q.shape[2] :], num_heads)
    lse = (q * nearest).sum(dim=-1) * scale - norm * longest * LSE_ROUNDING - 2.0**-12
    excess = block_max(bound - lse + ROUNDING * (bound + lse.abs()), block_m, float("-inf"))  # [B, H, NQ]
    first = torch.arange(0, q.shape[2], block_m, device=q.device)
    last = (first + (block_m - 1)).clamp(max=q.shape[2] - 1)

    def needed(slope: Tensor) -> Tensor:
        """At how many positions before or after those of a block the last key lies that it needs: (B, H, NQ)."""
        log_weight = log_geometric_sum(slope, key_length) - log_mass
        distance = ((excess + log_weight[..., None]) / slope[..., None]).ceil() - 1
        # What is not a number, or no finite one, is not below anything.
        return torch.where(distance < key_length, distance.clamp(min=0), key_length).to(torch.int64)

    offset = key_length - q.shape[2]
    starts = (first + offset - needed(left)).clamp_(min=0).div_(block_n, rounding_mode="floor").to(torch.int32)
    if visibility.causal:
        return starts, torch.full_like(starts, -(-key_length // block_n))
    past = (last + (offset + 1) + needed(right)).clamp_(max=key_length)
    return starts, past.add_(block_n - 1).div_(block_n, rounding_mode="floor").to(torch.int32)
