"""Reach: which key blocks can matter to which query blocks. The theorem and its proof are in docs/reach.md.

P_ij = exp(scale q_i . k_j - m |i - j| - lse_i) is small when the bias is large against what the scores can make up
for. `key_ranges` bounds the scores from above (Cauchy-Schwarz, by norms of centred keys) and each row's lse_i from
below (by the nearest key and a mean of those before), sums the bounds of the blocks from the far end, and drops
blocks while that sum stays within the tolerated probability mass. It reads q and k once and costs O(T D) plus one
number for each pair of a query block and a key block; nothing is read back to the host, so a GPU need not wait.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.arguments import (
    validate_integer,
    validate_slopes,
    validate_tensors,
    validate_types,
    validated_scale,
    validated_tolerance,
    validated_visibility,
)
from longreach.ops.lse_bound import FEW_QUERIES, ROUNDING, chunks, last_lse, lse_lower_bound, per_query_head
from longreach.ops.visibility import Visibility

KEY_BLOCK = 64
"""Keys per block in what a KV cache keeps of their norms, and in the ranges of all implementations here."""

SAMPLE = 1024
"""Keys whose mean is taken from all of them, about so many: no proof depends on which."""

LSE_ROUNDING = 2.0**-9
"""Error of a score in the bound on the LSE, relative to |q_i| max |k_j|: covers products in float32 or TF32."""

LOG2_E = math.log2(math.e)
"""To exponentiate by base 2: on the CPU exp is a hundred times slower where its result underflows."""


@dataclass(frozen=True)
class Reach:
    """Which key blocks each query block needs, as half-open ranges of block numbers."""

    starts: Tensor
    """(B, H, ceil(Tq / block_m)) int32: the first key block that each query block needs."""
    ends: Tensor
    """(B, H, ceil(Tq / block_m)) int32: one past the last key block that each query block needs."""
    block_m: int
    """Queries per block, counted from query 0."""
    block_n: int
    """Keys per block, counted from key 0."""
    kept: Tensor
    """(B, H) float32: needed blocks as a share of the blocks that dense attention with this `causal` computes."""


def default_tolerance(dtype: torch.dtype) -> float:
    """Probability mass per row that may be dropped unless the caller says otherwise.

    The unit roundoff u of the dtype, for float32 (2^-24) and float64 (2^-53): the dropped mass changes the output by
    at most 2u max|v|, as much as rounding each weight and each sum. For half types u / 64 (2^-14 for bfloat16, 2^-17
    for float16): there the weights are rounded to u and summed in float32, and the mass dropped is to stay far below.
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    return unit_roundoff / 64 if dtype.itemsize == 2 else unit_roundoff


def reach(
    q: Tensor,
    k: Tensor,
    slopes: Tensor | tuple[Tensor, Tensor] | None,
    *,
    scale: float | None = None,
    causal: bool = True,
    tolerance: float | None = None,
    block_m: int = 128,
    block_n: int = 128,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Reach:
    """Find the key blocks that ALiBi attention needs, and the share of the dense work that they are.

    A query block needs the key blocks that cover all but `tolerance` of each of its rows' probability mass (provably:
    docs/reach.md). To drive another kernel, hand it `starts` and `ends`.

    Args:
        q: (B, H, Tq, D) floating point.
        k: (B, Hkv, Tk, D), the dtype and device of q; Hkv divides H.
        slopes: (H,) or (B, H), not negative, or a pair (left, right) of them; None for heads without ALiBi.
        scale: factor of q . k; D**-0.5 when None.
        causal: whether a query sees only keys at or before its position.
        tolerance: probability mass per row that may be dropped; `default_tolerance` of the dtype when None. 0 drops
            only what is exactly zero: masked, or an exponential that underflows.
        block_m: queries per block.
        block_n: keys per block.
        window_size: as in `longreach.attention`.
        key_padding_mask: as in `longreach.attention`.
        cu_seqlens: as in `longreach.attention`.

    Raises:
        ValueError: a wrong shape, dtype, device or value, as in `longreach.attention`, or a block size below 1.
    """
    validate_types(q=q, k=k)
    validate_tensors(q, k, k)  # keys stand in for the values, which do not matter here
    validate_slopes(slopes, q)
    scale = validated_scale(scale)
    visibility = validated_visibility(q, k, causal, window_size, key_padding_mask, cu_seqlens)
    tolerance = validated_tolerance(tolerance)
    for name, size in (("block_m", block_m), ("block_n", block_n)):
        validate_integer(name, size, 1)
    sizes = {  # no memory is taken for a block that is longer than all
        "block_m": min(block_m, max(1, visibility.query_length)),
        "block_n": min(block_n, max(1, visibility.key_length)),
    }
    found = find_reach(q, k, slopes, visibility, scale=scale, tolerance=tolerance, **sizes)
    return replace(found, block_m=block_m, block_n=block_n)


def find_reach(
    q: Tensor,
    k: Tensor,
    slopes: Tensor | tuple[Tensor, Tensor] | None,
    visibility: Visibility,
    *,
    scale: float | None = None,
    tolerance: float | None = None,
    block_m: int = 128,
    block_n: int = 128,
) -> Reach:
    """`reach` of valid arguments."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tolerance = default_tolerance(q.dtype) if tolerance is None else tolerance
    starts, ends = key_ranges(
        q, k, slopes, visibility, scale=scale, tolerance=tolerance, block_m=block_m, block_n=block_n
    )
    blocks = _Blocks(Visibility(q.shape[2], k.shape[2], visibility.causal), block_m, block_n, q.device)
    dense = (blocks.last - blocks.first).sum()
    kept = (ends - starts).sum(dim=-1) / dense.clamp(min=1)  # [B, H]
    return Reach(starts, ends, block_m, block_n, kept)


def key_block_norms(k: Tensor, block_n: int, key_padding_mask: Tensor | None = None) -> Tensor:
    """Largest norm of the keys of each block, for `key_ranges`: what a cache keeps so that decoding need not read it.

    Args:
        k: (B, Hkv, Tk, D) floating point.
        block_n: keys per block.
        key_padding_mask: (B, Tk) bool, True where a key is padding, to be left out.

    Returns:
        (B, Hkv, ceil(Tk / block_n)) float32, or float64 if k is; 0 for a block of padding alone.
    """
    norms = row_norms(k)  # [B, Hkv, Tk]
    if key_padding_mask is not None:
        norms = norms.masked_fill(key_padding_mask[:, None], 0.0)
    return block_max(norms, block_n, 0.0)


def key_ranges(
    q: Tensor,
    k: Tensor,
    slopes: Tensor | tuple[Tensor, Tensor] | None,
    visibility: Visibility,
    *,
    scale: float,
    tolerance: float,
    block_m: int,
    block_n: int,
    key_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Half-open range of key blocks that covers all but `tolerance` of the probability mass of each query's row.

    Arguments as in `reach`, which validates them and returns the same ranges with the share of work kept. Outside the
    range lie only keys that the masks hide, and keys whose weights sum to at most `tolerance` in each row of the query
    block. With key_norms, `key_block_norms(k, block_n)` or any upper bounds on it, of k only the keys nearest to the
    queries are read; without it, all keys are read and centred, which is tighter.

    Returns:
        starts, ends: int32 (B, H, ceil(Tq / block_m)), starts <= ends. A block that needs no keys has starts == ends.
    """
    batch, num_heads, query_length, _ = q.shape
    key_length = k.shape[2]
    causal, key_padding_mask = visibility.causal, visibility.key_padding_mask
    left, right = lowered_slopes(q, slopes)
    few = 0 < query_length < FEW_QUERIES and query_length <= block_m
    if few and causal and visibility.cu_seqlens is None and key_length and key_norms is not None:
        return _decoding_ranges(q, k, left, key_norms, visibility, scale=scale, tolerance=tolerance, block_n=block_n)
    blocks = _Blocks(visibility, block_m, block_n, q.device)
    num_query_blocks, num_key_blocks = len(blocks.first), len(blocks.key_first)
    if not (num_query_blocks and num_key_blocks):
        nothing = torch.zeros(batch, num_heads, num_query_blocks, dtype=torch.int32, device=q.device)
        return nothing, nothing.clone()

    key_hidden = None if key_padding_mask is None else ~_block_any(~key_padding_mask, block_n)  # [B, NK]
    norm = row_norms(q) * scale  # [B, H, Tq]
    log_mass = log_tolerance(tolerance, norm.dtype, key_length)
    sides = [Side(left, 1, log_mass)]
    if not causal:
        half = log_mass - math.log(2.0)
        sides = [Side(left, 1, half), Side(right, -1, half)]
    if key_norms is None:
        centre, lengths = _centred_lengths(k, key_padding_mask)
        longest = lengths.amax(dim=-1, keepdim=True).clamp(min=0.0) + torch.linalg.vector_norm(centre, dim=-1)
        lengths = per_query_head(lengths, num_heads)  # [B, H, Tk]
        radii = [soft_radius(lengths, norm, side, block_n) for side in sides]  # each [B, H, NK]
    else:
        centre, longest = None, key_norms.amax(dim=-1, keepdim=True)
        radii = [per_query_head(key_norms, num_heads)] * len(sides)
    lse, sees = lse_lower_bound(q, k, left, right, centre, scale, visibility)
    lse = lse - norm * per_query_head(longest, num_heads) * LSE_ROUNDING - 2.0**-12

    dropped = []
    for side, bound in zip(sides, radii, strict=True):
        inner = side.slope[..., None] * blocks.distance_within(side.sign)  # [B, H, Tq]
        chord = chord_of(norm, lse, sees, inner, bound * (1 + (q.shape[3] + 16) * ROUNDING), block_m)
        counts = []
        for chunk in chunks(num_query_blocks, chord.share.numel(), q.device):
            hidden = blocks.outside(chunk) if key_hidden is None else blocks.outside(chunk) | key_hidden[:, None, None]
            counts.append(count_dropped(chord, side, blocks.gap(side.sign, chunk), hidden, block_n, chunk))
        dropped.append(torch.cat(counts, dim=-1))
    starts = torch.maximum(dropped[0], blocks.first)
    ends = blocks.last.expand_as(starts)
    if not causal:
        ends = torch.minimum(num_key_blocks - dropped[1], ends)
    nobody = ~_block_any(sees, block_m)  # [B or 1, 1, NQ]
    starts = torch.where(nobody, ends, torch.minimum(starts, ends))
    return starts.to(torch.int32), ends.to(torch.int32).contiguous()


def visible_ranges(
    visibility: Visibility, *, block_m: int, block_n: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Half-open range of key blocks that causality, window and documents leave each query block: int64 (NQ,) each."""
    blocks = _Blocks(visibility, block_m, block_n, device)
    return blocks.first, blocks.last


def _decoding_ranges(
    q: Tensor,
    k: Tensor,
    slope: Tensor,
    key_norms: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    tolerance: float,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    """`key_ranges` of few causal queries whose keys have known norms: the same bound, of each row by itself.

    What takes time here is the number of operations. Slopes (B, H) are lowered.
    """
    num_heads, query_length, key_length = q.shape[1], q.shape[2], k.shape[2]
    norm = (row_norms(q) * scale)[..., None]  # [B, H, Tq, 1]
    norms = per_query_head(key_norms, num_heads)[:, :, None]  # [B, H, 1, NK]
    lse = last_lse(q, k, slope, slope, None, scale, visibility)[..., None]
    lse = lse - norm * norms.amax(dim=-1, keepdim=True) * LSE_ROUNDING - 2.0**-12
    log_weight = log_geometric_sum(slope, block_n) - log_tolerance(tolerance, norm.dtype, key_length)
    row_terms = log_weight[..., None, None] - lse + ROUNDING * lse.abs()  # [B, H, Tq, 1]
    first_key = torch.arange(0, key_length, block_n, device=q.device)  # of each block
    position = torch.arange(query_length, device=q.device)[:, None] + (key_length - query_length)
    last_key = (first_key + (block_n - 1)).clamp(max=key_length - 1)
    gap = position - last_key  # [Tq, NK], < 1 where queries and keys overlap
    bound = norm * norms * (1 + (q.shape[3] + 18) * ROUNDING)
    log_mass = bound + row_terms - slope[..., None, None] * gap  # [B, H, Tq, NK]
    mass = log_mass.mul_(LOG2_E).exp2_().masked_fill_(gap < 1, float("inf"))
    if visibility.window_size is not None:
        mass.masked_fill_(gap >= visibility.window_size, 0.0)
    if visibility.key_padding_mask is not None:
        mass.masked_fill_(~_block_any(~visibility.key_padding_mask, block_n)[:, None, None], 0.0)
    within = mass.cumsum(dim=-1) <= 1 if mass.is_cpu else _sums_within_one(mass)
    starts = within.sum(dim=-1).amin(dim=-1, keepdim=True).to(torch.int32)  # [B, H, 1]
    return starts, torch.full_like(starts, len(first_key))


def log_geometric_sum(slope: Tensor, count: int) -> Tensor:
    """Log of the sum of e^(-slope t) over t = 0, 1, ..., count - 1."""
    plain = slope == 0
    slope = slope.masked_fill(plain, 1.0)
    return (torch.expm1(-slope * count) / torch.expm1(-slope)).masked_fill(plain, count).log()


@dataclass(frozen=True)
class Side:
    """The keys on one side of a query block, and how their weights fall off."""

    slope: Tensor
    """(B, H) slopes, lowered by the rounding of their products with distances."""
    sign: int
    """1 for keys in the past, -1 for keys in the future."""
    log_tolerance: float
    """Log of the mass that may be dropped on this side."""


class _Blocks:
    """Positions of query and key blocks, and what the causal mask, the window and the documents leave of them."""

    def __init__(self, visibility: Visibility, block_m: int, block_n: int, device: torch.device) -> None:
        query_length, key_length, offset = visibility.query_length, visibility.key_length, visibility.offset
        self.block_n, self.key_length = block_n, key_length
        first_row = torch.arange(0, query_length, block_m, device=device)
        last_row = (first_row + (block_m - 1)).clamp(max=query_length - 1)
        self.positions = torch.arange(query_length, device=device) + offset  # [Tq]
        self.query_first, self.query_last = first_row + offset, last_row + offset  # [NQ] positions
        self.row_block = torch.div(self.positions - offset, block_m, rounding_mode="floor")  # [Tq]
        self.key_first = torch.arange(0, key_length, block_n, device=device)  # [NK] positions
        self.key_last = (self.key_first + (block_n - 1)).clamp(max=key_length - 1)
        first_key = torch.zeros_like(self.query_first)
        past_key = torch.full_like(self.query_last, key_length)  # one past the last visible key
        if visibility.causal:
            past_key = self.query_last + 1
        if visibility.window_size is not None:
            first_key = torch.maximum(first_key, self.query_first - (visibility.window_size - 1))
            past_key = torch.minimum(past_key, self.query_last + visibility.window_size)
        if visibility.cu_seqlens is not None:
            borders = visibility.cu_seqlens.to(first_key.dtype)
            # Clamped, because borders on a GPU are not checked: wrong ones may give wrong ranges, but no wrong index.
            document = torch.bucketize(self.query_first, borders, right=True) - 1
            first_key = torch.maximum(first_key, borders[document.clamp(min=0)])
            document = torch.bucketize(self.query_last, borders, right=True)
            past_key = torch.minimum(past_key, borders[document.clamp(max=len(borders) - 1)])
        past_key = past_key.clamp(0, key_length)
        self.first = torch.div(first_key.clamp(0, key_length), block_n, rounding_mode="floor")  # [NQ] key blocks
        self.last = torch.div(past_key + (block_n - 1), block_n, rounding_mode="floor")
        self.first = torch.minimum(self.first, self.last)

    def distance_within(self, sign: int) -> Tensor:
        """Distance of each query from the edge of its block that faces the keys of that side: (Tq,) >= 0."""
        edge = self.query_first if sign == 1 else self.query_last
        return (self.positions - edge[self.row_block]) * sign

    def gap(self, sign: int, chunk: slice) -> Tensor:
        """Distance between the nearest edges of query blocks and key blocks: (chunk, NK); < 1 where they overlap."""
        if sign == 1:
            return self.query_first[chunk, None] - self.key_last
        return self.key_first - self.query_last[chunk, None]

    def outside(self, chunk: slice) -> Tensor:
        """Where a key block is hidden from a whole query block by causality, window or documents: (chunk, NK)."""
        number = torch.arange(len(self.key_first), device=self.key_first.device)
        return (number < self.first[chunk, None]) | (number >= self.last[chunk, None])


def lowered_slopes(q: Tensor, slopes: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Left and right slopes as (B, H), at least in float32, lowered by the rounding of their products."""
    batch, num_heads = q.shape[:2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if slopes is None:
        slopes = torch.zeros(num_heads, dtype=dtype, device=q.device)
    pair = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    left, right = (side.detach().to(dtype).expand(batch, num_heads) * (1 - ROUNDING) for side in pair)
    return left, right


def log_tolerance(tolerance: float, dtype: torch.dtype, key_length: int) -> float:
    """Log of the mass that may go, less the rounding of the sums that are compared with it."""
    if tolerance > 0.0:
        return math.log(tolerance) - 2.0**-8
    # Below this mass, exp(s_ij - max_j s_ij) <= Tk P_ij is under half of the smallest positive number: it rounds to 0.
    info = torch.finfo(dtype)
    return math.log(info.tiny) + math.log(info.eps) - math.log(2.0 * key_length) - 2.0**-8


def _centred_lengths(k: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of some keys (B, Hkv, 1, D), and each key's distance from it (B, Hkv, Tk), -inf for padding.

    Softmax does not change when one vector is taken from all keys, and without their mean their norms are smaller.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    every = max(1, k.shape[2] // SAMPLE)
    sample = k[:, :, ::every].to(dtype)
    if key_padding_mask is None:
        centre = sample.mean(dim=2, keepdim=True)
        return centre, row_norms(k, centre)
    hidden = key_padding_mask[:, None, ::every, None]  # [B, 1, keys of the sample, 1]
    centre = sample.masked_fill(hidden, 0.0).sum(dim=2, keepdim=True) / (~hidden).sum(dim=2, keepdim=True).clamp(min=1)
    return centre, row_norms(k, centre).masked_fill(key_padding_mask[:, None], float("-inf"))


def row_norms(x: Tensor, centre: Tensor | None = None) -> Tensor:
    """|x - centre| of each row of x (B, H, T, D), at least in float32: (B, H, T)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for rows in chunks(x.shape[2], x.shape[0] * x.shape[1] * x.shape[3], x.device):
        part = x[:, :, rows].to(dtype)
        parts.append(torch.linalg.vector_norm(part if centre is None else part - centre, dim=-1))
    return parts[0] if len(parts) == 1 else torch.cat([x.new_empty(*x.shape[:2], 0, dtype=dtype), *parts], dim=2)


def soft_radius(lengths: Tensor, norm: Tensor, side: Side, block_n: int) -> Tensor:
    """Power mean of exp(length) over each key block, weighted as the bias weighs it: (B, H, NK), at least 0.

    With the head's largest norm as its exponent it bounds the block's sum for every query, and lies below the maximum.
    """
    exponent = norm.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny ** 0.5)  # [B, H, 1]
    lengths = F.pad(lengths, (0, -lengths.shape[-1] % block_n), value=float("-inf")).unflatten(-1, (-1, block_n))
    from_edge = torch.arange(block_n, device=lengths.device)
    if side.sign == 1:
        from_edge = from_edge.flip(0)  # the near edge of a past block is its last key
    log_terms = exponent[..., None] * lengths - side.slope[..., None, None] * from_edge
    log_mean = log_terms.logsumexp(dim=-1) - log_geometric_sum(side.slope, block_n)[..., None]
    return (log_mean / exponent).clamp(min=0.0)


def block_max(x: Tensor, block: int, fill: float) -> Tensor:
    """Maximum of x (..., T) over each block of T, the last one filled up: (..., ceil(T / block))."""
    missing = -x.shape[-1] % block
    if missing:
        x = F.pad(x, (0, missing), value=fill)
    return x.unflatten(-1, (-1, block)).amax(dim=-1)


def _block_any(x: Tensor, block: int) -> Tensor:
    """Whether any of x (..., T) holds in each block of T: (..., ceil(T / block))."""
    return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).any(dim=-1)


@dataclass(frozen=True)
class Chord:
    """How far the rows of query blocks can exceed the bias, by the radius of a key block: an upper bound of it."""

    low: Tensor
    """(B, H, NQ): at the smallest radius of the head."""
    high: Tensor
    """(B, H, NQ): at the largest. Between the two it is convex, a maximum of lines, so that the chord is above it."""
    share: Tensor
    """(B, H, NK): where each key block's radius lies between the two, from 0 to 1."""


def chord_of(norm: Tensor, lse: Tensor, sees: Tensor, inner: Tensor, radius: Tensor, block_m: int) -> Chord:
    """The chord of query blocks of block_m rows.

    Args:
        norm: (B, H, Tq) scale |q_i|.
        lse: (B, H, Tq) lower bounds of the LSE over centred keys.
        sees: (B or 1, 1, Tq) bool, whether a row sees any key.
        inner: (B, H, Tq) slope times the distance of each row from the edge of its block.
        radius: (B, H, NK) of each key block, raised by its rounding.
        block_m: queries per block.
    """
    lowest, highest = radius.amin(dim=-1, keepdim=True), radius.amax(dim=-1, keepdim=True)  # [B, H, 1]
    low, high = (_row_excess(norm * edge, lse, inner, sees, block_m) for edge in (lowest, highest))
    return Chord(low, high, (radius - lowest) / (highest - lowest).clamp(min=torch.finfo(lse.dtype).tiny))


def _row_excess(bound: Tensor, lse: Tensor, inner: Tensor, sees: Tensor, block_m: int) -> Tensor:
    """Largest log of a row's weight on a key at the edge of its query block, were the bias 0 there: (B, H, NQ)."""
    excess = bound - lse - inner + ROUNDING * (bound.abs() + lse.abs() + inner)  # [B, H, Tq]
    return block_max(excess.masked_fill(~sees, float("-inf")), block_m, float("-inf"))


def count_dropped(
    chord: Chord, side: Side, gap: Tensor, hidden: Tensor, block_n: int, rows: slice = slice(None)
) -> Tensor:
    """How many key blocks, from the far end of that side, some query blocks can do without: (B, H, NQ of `rows`).

    Args:
        chord: of all query blocks.
        side: which.
        gap: (NQ of `rows`, NK) distance between the nearest edges of both blocks; below 1 where they overlap.
        hidden: (..., NQ of `rows`, NK) bool, which key blocks a query block does not see.
        block_n: keys per block.
        rows: which query blocks.
    """
    num_key_blocks = chord.share.shape[-1]
    weight = log_geometric_sum(side.slope, block_n)  # [B, H]
    # Rows that see nothing have an excess of -inf, for which the chord is not a number: they need no keys.
    least = torch.finfo(chord.low.dtype).min / 8
    low = (chord.low[..., rows] + weight[..., None] - side.log_tolerance).clamp(min=least)
    rise = (chord.high[..., rows] + weight[..., None] - side.log_tolerance).clamp(min=least) - low
    log_mass = low[..., None] + rise[..., None] * chord.share[:, :, None] - side.slope[..., None, None] * gap
    mass = log_mass.mul_(LOG2_E).exp2_().masked_fill_(gap < 1, float("inf")).masked_fill_(hidden, 0.0)
    if side.sign == -1:
        mass = mass.flip(-1)
    within = mass.cumsum(dim=-1) <= 1 if mass.is_cpu else _sums_within_one(mass)
    return within.sum(dim=-1).clamp(max=num_key_blocks)


def _sums_within_one(mass: Tensor) -> Tensor:
    """Where mass (..., n), not negative, sums to at most 1 up to and with that place; what is NaN sums to more.

    Summed in integers, which have one result whatever the order: a GPU promises none for the running sum of floats.
    Each term is rounded up by less than 2^-40, and the sum is exact.
    """
    units = torch.where(mass <= 1, mass * 2.0**40, 2.0**41).ceil_().to(torch.int64)
    return units.cumsum(dim=-1) <= 2**40
