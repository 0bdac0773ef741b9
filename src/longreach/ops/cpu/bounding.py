"""Which heads' reach is bounded before their tiles are planned, and by what: where that saves more than it takes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longreach.ops.cpu import onednn
from longreach.ops.cpu.plan import BLOCK_M, BLOCK_N, HostVisibility, Ranges
from longreach.ops.lse_bound import FEW_QUERIES
from longreach.ops.reach import key_ranges

BOUND_COST = 120
"""Work of finding a head's ranges, in keys per query."""

BOUND_READS = 25_000
"""Work of finding any ranges of few queries at all, in keys that could be read instead: some fifty small operations."""

NEAR_KEYS = 0 if onednn.IS_FAST else 4096
"""Keys up to which `near_ranges` does: more precise bounds take longer than they save. Where oneDNN is fast that was
not measured."""


def heads_worth_bounding(
    q: Tensor,
    k: Tensor,
    left: Tensor,
    right: Tensor,
    visibility: HostVisibility,
    tolerance: float,
    key_norms: Tensor | None,
    per_call: int,
    price: int,
) -> slice:
    """The heads, in whole groups, whose reach can be expected to save more work than bounding it costs.

    Of many queries that is `per_call`, in pairs, beside what grows with them, and all of it `price` times.
    """
    query_length, key_length, group = visibility.query_length, visibility.key_length, q.shape[1] // k.shape[1]
    dense = key_length - query_length / 2 if visibility.causal else float(key_length)
    if visibility.window_size is not None:
        dense = min(dense, visibility.window_size)
    # Every key that is read costs as much as 40 more queries; the bound reads k alone, and that not given its norms.
    per_key, per_head = query_length + 40, BOUND_COST * query_length
    per_head, per_call = price * per_head, price * per_call
    if query_length < FEW_QUERIES:  # reading is all that counts, and to find the norms is half of it
        per_key, per_head, per_call = 1, key_length if key_norms is None else 0, BOUND_READS
    elif key_norms is None:
        per_head += price * 20 * key_length
    worth, saved = [], 0.0
    if query_length and key_length and q.shape[0]:
        for head, slope in enumerate(_least_slopes(left, right, q.shape[1])):
            if slope > 0 and (gain := (dense - expected_reach(slope, tolerance)) * per_key - per_head) > 0:
                worth.append(head // group)
                saved += q.shape[0] * gain
    if saved < per_call:
        return slice(0, 0)
    return slice(min(worth) * group, (max(worth) + 1) * group)


def _least_slopes(left: Tensor, right: Tensor, num_heads: int) -> list[float]:
    """Of each head, over both sides and all sequences."""
    if left is right and left.dim() == 1:
        least: list[float] = left.tolist()  # operations would take longer
        return least
    least = torch.minimum(left, right).detach().view(-1, num_heads).amin(dim=0).tolist()
    return least


def is_near(visibility: HostVisibility, key_norms: Tensor | None) -> bool:
    """Whether reach is bounded by the few operations of `near_ranges`."""
    many = visibility.sees_own_keys and visibility.query_length >= FEW_QUERIES
    return many and key_norms is None and visibility.key_length <= NEAR_KEYS


def bounded_ranges(
    q: Tensor,
    k: Tensor,
    slopes: tuple[Tensor, Tensor],
    visibility: HostVisibility,
    key_norms: Tensor | None,
    scale: float,
    tolerance: float,
    heads: slice,
    find_near: Callable[..., tuple[Tensor, Tensor]],
) -> Ranges:
    """The keys within reach of some heads; `find_near` is `near_ranges`, or does as that does."""
    if heads.stop == heads.start:
        return {}
    left, right = slopes
    group = q.shape[1] // k.shape[1]
    kv_heads = slice(heads.start // group, heads.stop // group)
    inputs = q[:, heads], k[:, kv_heads], (left[..., heads], right[..., heads]), visibility
    options: dict[str, Any] = {"scale": scale, "tolerance": tolerance, "block_m": BLOCK_M, "block_n": BLOCK_N}
    if is_near(visibility, key_norms):
        starts, ends = find_near(*inputs, **options)
    else:
        norms = None if key_norms is None else key_norms[:, kv_heads]
        starts, ends = key_ranges(*inputs, **options, key_norms=norms)
    ends_of_head = (x.transpose(0, 1).mul(BLOCK_N).tolist() for x in (starts, ends))
    return dict(zip(range(heads.start, heads.stop), zip(*ends_of_head, strict=True), strict=True))


def expected_reach(slope: float, tolerance: float) -> float:
    """How many keys back a head is expected to need: as far as it does with queries and keys of std 1."""
    exponent = -math.log(tolerance) if tolerance else 104.0
    return 1.7 * exponent / slope if slope > 0 else math.inf


def ends_to_leave_out(tolerance: float, visibility: HostVisibility) -> float:
    """The share of a row's weights that the backward pass leaves out at either end, less what their sums round by."""
    return tolerance * (1 - 2**-8) / (1 if visibility.causal else 2)
