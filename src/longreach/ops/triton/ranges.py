"""`key_ranges` of `longreach.ops.reach` in few kernels, instead of some 200 launches of tensor operations.

The theorem is the one of docs/reach.md, with the largest |k_j - c| of each block for R_J, and for L_i the LSE over the
keys of the query's own block and the NEAR keys on each side that it sees, whose scores matrix units make: a tile or two
of what the forward pass computes. Sums run in one fixed order, so that two runs give the same ranges.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters of kernels are Triton values or constants, which Python types do not tell apart.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longreach.ops.lse_bound import ROUNDING
from longreach.ops.reach import SAMPLE, log_tolerance
from longreach.ops.triton.kernels import _interval, _log2_sum, _logits, _softmax_step, _tile
from longreach.ops.triton.plans import Tiles

NEAR = 64
"""Keys before a block of queries, and after it where they are seen, whose scores bound the LSE of its rows."""

SPAN = 128
"""Key blocks whose bounds are summed at a time."""

_LN2 = tl.constexpr(math.log(2.0))
_LOG2E = tl.constexpr(math.log2(math.e))
_ROUNDING = tl.constexpr(ROUNDING)
# Error of a score, relative to |q_i| max |k_j|: inputs of float32 are cut off to TF32, each by less than 2^-10.
_SCORE_ROUNDING = tl.constexpr(2.0**-8)
_TOO_MUCH = tl.constexpr(64.0)
_UNBOUNDED = tl.constexpr(1e30)  # a logarithm beyond which all is kept
_NEAR = tl.constexpr(NEAR)
_SPAN = tl.constexpr(SPAN)


def key_ranges(
    q: Tensor,
    k: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    cu_seqlens: Tensor | None,
    key_norms: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window_size: int | None,
    tolerance: float,
    block_m: int,
    block_n: int,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """As `longreach.ops.reach.key_ranges`, with slopes (B, H) float32, or None for no bias, where no key is padding.

    tiles: of the scores that bound the LSE; its block_m divides block_m.
    """
    batch, num_heads, query_length, head_dim = q.shape
    num_kv_heads, key_length = k.shape[1:3]
    num_blocks = triton.cdiv(query_length, block_m)
    starts, ends = (torch.empty(batch, num_heads, num_blocks, dtype=torch.int32, device=q.device) for _ in range(2))
    if not (q.numel() and k.numel()):
        return starts.zero_(), ends.zero_()
    q, k = unit_stride(q), unit_stride(k)
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": block_d(q)}
    with torch.cuda.device_of(q):
        if key_norms is None:
            centre = k[:, :, :: max(1, key_length // SAMPLE)].mean(dim=2, dtype=torch.float32)  # [B, Hkv, D]
            radii = torch.empty(
                batch, num_kv_heads, triton.cdiv(key_length, block_n), dtype=torch.float32, device=k.device
            )
            key_radius_kernel[(radii.numel(),)](
                k, centre, radii, *k.stride()[:3], num_kv_heads, key_length, BLOCK_N=block_n, num_warps=4, **shape
            )
        else:
            centre, radii = None, key_norms.to(torch.float32).contiguous()
        key_ranges_kernel[(starts.numel(),)](
            q,
            k,
            centre,
            radii,
            *radii.aminmax(dim=-1),
            starts,
            ends,
            left,
            right,
            int32_window(window_size),
            *documents(cu_seqlens, key_length),
            *q.stride()[:3],
            *k.stride()[:3],
            num_heads,
            num_heads // num_kv_heads,
            query_length,
            key_length,
            scale,
            log_tolerance(tolerance, torch.float32, key_length),
            CAUSAL=causal,
            REACH_M=block_m if query_length > 16 else 16,  # one block of few queries
            REACH_N=block_n,
            BLOCK_M=tiles.block_m if query_length > 16 else 16,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **shape,
        )
    return starts, ends


def unit_stride(x: Tensor) -> Tensor:
    """x as the kernels read it, with stride 1 in D."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_d(x: Tensor) -> int:
    """The width of tiles of x."""
    return max(16, triton.next_power_of_2(x.shape[-1]))


def int32_window(window_size: int | None) -> int | None:
    """A window whose sum with a position is an int32: one beyond all distances is none."""
    return None if window_size is None else min(window_size, 2**30)


def documents(cu_seqlens: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """For each token the first of its document, and one past the last: (T,) int32."""
    if cu_seqlens is None:
        return None, None
    borders = cu_seqlens.to(torch.int32)
    document = torch.bucketize(torch.arange(length, device=borders.device), cu_seqlens, right=True)
    document = document.clamp(1, len(borders) - 1)  # borders on a GPU are not checked: no wrong index from them
    return borders[document - 1], borders[document]


@triton.jit(do_not_specialize=["key_length"])
def key_radius_kernel(
    k, centre, radii, stride_kb, stride_kh, stride_kt, num_kv_heads, key_length,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest |k_j - c| of a block of keys, infinite where one is not a number."""
    num_blocks = tl.cdiv(key_length, BLOCK_N)
    pair = tl.cast(tl.program_id(0) // num_blocks, tl.int64)
    block = tl.program_id(0) % num_blocks
    k += pair // num_kv_heads * stride_kb + pair % num_kv_heads * stride_kh
    exists = block * BLOCK_N + tl.arange(0, BLOCK_N) < key_length
    columns = tl.arange(0, BLOCK_D)
    centre_row = tl.load(centre + pair * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    difference = _tile(k, block * BLOCK_N, stride_kt, exists, BLOCK_N, HEAD_DIM, BLOCK_D, True) - centre_row[None, :]
    length = tl.sqrt(tl.sum(difference * difference, 1))
    length = tl.where(length == length, length, float("inf"))
    tl.store(radii + tl.program_id(0), tl.max(tl.where(exists, length, 0.0), 0))


@triton.jit
def _log_geometric_sum(slope, COUNT: tl.constexpr):
    """Log of the sum of e^(-slope t) over t = 0, 1, ..., COUNT - 1."""
    plain = slope == 0
    slope = tl.where(plain, 1.0, slope)
    return tl.where(plain, tl.log(slope * 0.0 + COUNT), tl.log(_decayed(slope * COUNT) / _decayed(slope)))


@triton.jit
def _decayed(x):
    """1 - e^-x for x > 0, where the difference would lose digits by its series up to x^5."""
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5))))
    return tl.where(x < 0.125, series, 1 - tl.exp(-x))


@triton.jit
def _count_dropped(
    low, high, lowest, highest, slope, log_tolerance, edge, radii, first, last, key_length,
    PAST: tl.constexpr, BLOCK_N: tl.constexpr, RAISE: tl.constexpr,
):  # fmt: skip
    """How many of the key blocks [first, last), from the far end of one side, a block of queries can do without."""
    log_weight = _log_geometric_sum(slope, BLOCK_N) - log_tolerance
    low = tl.where(high < _UNBOUNDED, low, _UNBOUNDED)  # between an end without a bound and another there is no chord
    count = 0
    carried = 0.0
    for step in tl.range(0, last - first, _SPAN):
        index = step + tl.arange(0, _SPAN)
        number = first + index if PAST else last - 1 - index
        inside = index < last - first
        radius = tl.load(radii + number, mask=inside, other=0.0) * RAISE
        share = (radius - lowest) / tl.maximum(highest - lowest, 1e-30)
        if PAST:
            gap = edge - tl.minimum(number * BLOCK_N + (BLOCK_N - 1), key_length - 1)
        else:
            gap = number * BLOCK_N - edge
        log_mass = low + log_weight + (high - low) * share - slope * gap.to(tl.float32)
        # More than 1 is too much however large.
        mass = tl.where(inside & (gap >= 1), tl.exp2(tl.minimum(log_mass * _LOG2E, _TOO_MUCH)), 2.0)
        count += tl.sum((carried + tl.cumsum(mass, 0) <= 1).to(tl.int32), 0)
        carried += tl.sum(mass, 0)
    return count


@triton.jit
def _row_excess(bound, lse, inner, counts):
    """Largest log of a row's weight on a key at the edge of its block, were the bias 0 there."""
    excess = bound - lse - inner + _ROUNDING * (tl.abs(bound) + tl.abs(lse) + inner)
    excess = tl.where(excess < _UNBOUNDED, excess, _UNBOUNDED)  # as what is not a number is
    return tl.max(tl.where(counts, excess, float("-inf")), 0)


@triton.jit
def _near_lse(
    q, k, stride_k, query, lo, hi, left, right, key_length, scale, first, last,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """LSE of each row over the key tiles [first, last), in units of log2."""
    peak = tl.full(query.shape, float("-inf"), tl.float32)
    total = tl.zeros(query.shape, tl.float32)
    for tile in tl.range(first, last):
        origin = tile * BLOCK_N
        key = origin + tl.arange(0, BLOCK_N)
        k_tile = _tile(k, origin, stride_k, key < key_length, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        dots = tl.dot(q, tl.trans(k_tile), input_precision="tf32")
        x, shift = _logits(dots, query, key, lo, hi, None, origin, left, right, scale, True, True, False, False)
        _, _, peak, total = _softmax_step(x, shift, peak, total)
    return _log2_sum(peak, total)


@triton.jit(do_not_specialize=["query_length", "key_length"])
def key_ranges_kernel(
    q, k, centre, radii, radii_min, radii_max, starts, ends, left, right, window_size, document_start, document_end,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, num_heads, group, query_length, key_length,
    scale, log_tolerance,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REACH_M: tl.constexpr, REACH_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The range of one block of REACH_M queries, whose scores are made BLOCK_M rows by BLOCK_N keys at a time."""
    RAISE: tl.constexpr = 1 + (HEAD_DIM + 16) * _ROUNDING
    num_blocks = tl.cdiv(query_length, REACH_M)
    pair = tl.cast(tl.program_id(0) // num_blocks, tl.int64)
    block = tl.program_id(0) % num_blocks
    kv_pair = pair // group
    q += pair // num_heads * stride_qb + pair % num_heads * stride_qh
    k += pair // num_heads * stride_kb + pair % num_heads // group * stride_kh
    radii += kv_pair * tl.cdiv(key_length, REACH_N)
    lowest = tl.load(radii_min + kv_pair) * RAISE
    highest = tl.load(radii_max + kv_pair) * RAISE
    left_slope = scale * 0.0
    right_slope = scale * 0.0
    if left is not None:
        left_slope = tl.load(left + pair)
        right_slope = tl.load(right + pair)
    columns = tl.arange(0, BLOCK_D)
    longest = highest
    if centre is not None:
        centre_row = tl.load(centre + kv_pair * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        longest += tl.sqrt(tl.sum(centre_row * centre_row, 0)) * RAISE

    offset = key_length - query_length
    first_query = block * REACH_M + offset
    last_query = tl.minimum(block * REACH_M + REACH_M, query_length) - 1 + offset
    position = tl.minimum(first_query + tl.arange(0, REACH_M), last_query)
    lo, hi = _interval(position, key_length, window_size, document_start, document_end, True, not CAUSAL)
    first_key = tl.min(tl.where(lo < hi, lo, key_length))
    past_key = tl.max(tl.where(lo < hi, hi, 0))

    past_low = float("-inf")
    past_high = float("-inf")
    future_low = float("-inf")
    future_high = float("-inf")
    for part in tl.static_range(REACH_M // BLOCK_M):
        row = block * REACH_M + part * BLOCK_M + tl.arange(0, BLOCK_M)
        query = tl.minimum(row, query_length - 1) + offset
        lo, hi = _interval(query, key_length, window_size, document_start, document_end, True, not CAUSAL)
        counts = (row < query_length) & (lo < hi)
        q_tile = _tile(
            q, block * REACH_M + part * BLOCK_M, stride_qt, row < query_length, BLOCK_M, HEAD_DIM, BLOCK_D, True
        )
        near_first = tl.maximum(first_key, first_query + part * BLOCK_M - _NEAR) // BLOCK_N
        near_last = tl.cdiv(tl.minimum(past_key, first_query + part * BLOCK_M + BLOCK_M + _NEAR), BLOCK_N)
        if CAUSAL:
            near_last = tl.cdiv(tl.minimum(past_key, first_query + part * BLOCK_M + BLOCK_M), BLOCK_N)
        near_last = tl.maximum(near_last, first_key // BLOCK_N + 1)  # queries before all keys see the first best
        lse = _LN2 * _near_lse(
            q_tile, k, stride_kt, query, lo, hi, left_slope * ((1 + 4 * _ROUNDING) * _LOG2E),
            right_slope * ((1 + 4 * _ROUNDING) * _LOG2E), key_length, scale * _LOG2E, near_first, near_last,
            HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        wide = q_tile.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide * wide, 1)) * scale
        if centre is not None:
            lse -= tl.sum(wide * centre_row[None, :], 1) * scale
        lse -= norm * longest * _SCORE_ROUNDING + 2.0**-12
        inner = left_slope * (1 - _ROUNDING) * (query - first_query).to(tl.float32)
        past_low = tl.maximum(past_low, _row_excess(norm * lowest, lse, inner, counts))
        past_high = tl.maximum(past_high, _row_excess(norm * highest, lse, inner, counts))
        if not CAUSAL:
            inner = right_slope * (1 - _ROUNDING) * (last_query - query).to(tl.float32)
            future_low = tl.maximum(future_low, _row_excess(norm * lowest, lse, inner, counts))
            future_high = tl.maximum(future_high, _row_excess(norm * highest, lse, inner, counts))

    first = first_key // REACH_N
    last = tl.maximum(tl.cdiv(past_key, REACH_N), first)
    if not CAUSAL:
        log_tolerance -= _LN2  # half for each side
    start = first + _count_dropped(
        past_low, past_high, lowest, highest, left_slope * (1 - _ROUNDING), log_tolerance, first_query, radii, first,
        last, key_length, True, REACH_N, RAISE,
    )  # fmt: skip
    end = last
    if not CAUSAL:
        end -= _count_dropped(
            future_low, future_high, lowest, highest, right_slope * (1 - _ROUNDING), log_tolerance, last_query, radii,
            first, last, key_length, False, REACH_N, RAISE,
        )  # fmt: skip
    tl.store(starts + tl.program_id(0), tl.minimum(start, end))
    tl.store(ends + tl.program_id(0), end)
