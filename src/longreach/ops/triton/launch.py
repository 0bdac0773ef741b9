"""Attention with ALiBi on the GPU in Triton: forward, backward and decode over the keys within reach.

Four decisions shape every kernel here.

Each query sees one interval of keys: the causal rule, the window, the borders of its document and the ends of the
sequence are all bounds of it. A tile inside the intervals of all its rows needs no mask, so a program walks its
tiles in at most five zones,

    edge | before | edge | after | edge

where the columns of `before` stand at or before all rows of the tile, and those of `after` at or after all of them:
one sign of the distance, one slope, no mask. Key padding is a -inf in a vector over the keys.

The first and the last tile are known before the loop, from the key ranges of `reach` and from the intervals, so
every loop is a counted one, which Triton can pipeline.

The work per block differs by 100x between heads: their programs start in decreasing order of it.

Nothing is summed by atomics: two runs give the same bits.

The kernels themselves stand in `kernels`, the sizes of their tiles in `plans`; this file decides what they run on, and
`operators` hands it to PyTorch.
"""

import math

import torch
import triton
from torch import Tensor

from longreach.ops.triton.kernels import (
    combine_kernel,
    decode_kernel,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    work_order_kernel,
)
from longreach.ops.triton.plans import PLANS, REACH_M, REACH_N, Plan, Tiles, empty_output
from longreach.ops.triton.ranges import block_d, documents, int32_window, unit_stride

_MAX_SPLITS = 128
_LOG2E = math.log2(math.e)


def plan(q: Tensor) -> Plan:
    """Tiles for the dtype and head_dim of q; ValueError where it is on no GPU, nor Triton in its interpreter."""
    if not (q.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f'q is on {q.device} with impl="triton": move it to a GPU, or choose another impl')
    return PLANS[q.dtype.itemsize, max(64, block_d(q))]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    order: Tensor,
    *,
    causal: bool,
    scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the given key ranges: out = softmax(scale q k^T - m |i - j|) v, and each row's LSE by base 2.

    Online softmax as in FlashAttention (Dao et al., arXiv 2205.14135), in float32.

    Args:
        q: (B, H, Tq, D) float32, bfloat16 or float16, D at most MAX_HEAD_DIM.
        k: (B, Hkv, Tk, D); Hkv divides H.
        v: (B, Hkv, Tk, D).
        left: (B, H) float32 slopes of past keys, or None for no bias.
        right: (B, H) float32 slopes of future keys; None where left is.
        key_padding_mask: (B, Tk) bool, True where a key is padding; what k and v hold there is never read.
        cu_seqlens: (N + 1,) int borders of packed documents; Tq = Tk.
        starts: (B, H, ceil(Tq / REACH_M)) int32, the first key block of REACH_N keys that a query block needs.
        ends: likewise, one past the last.
        order: `work_order(starts, ends)`.
        causal: whether a query sees only keys at or before its position i = r + Tk - Tq.
        scale: factor of q . k.
        window_size: see only keys with |i - j| < window_size.

    Returns:
        out (B, H, Tq, D) in the dtype of q, and the LSE by base 2, (B, H, Tq) in float32. `backward` takes it so: made
        from a natural one it would be rounded twice more, by as much as an exponent changes where scores are large.
    """
    batch, num_heads, query_length = q.shape[:3]
    num_kv_heads, key_length = k.shape[1:3]
    out = empty_output(q)
    log2_lse = torch.empty(batch, num_heads, query_length, dtype=torch.float32, device=q.device)
    if not (q.numel() and k.numel()):
        return out.zero_(), log2_lse.fill_(-math.inf)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    tiles = plan(q).forward
    with torch.cuda.device_of(q):
        forward_kernel[(order.numel() * triton.cdiv(query_length, tiles.block_m),)](
            q,
            k,
            v,
            out,
            log2_lse,
            order,
            starts,
            ends,
            *_masks(left, right, key_padding_mask, cu_seqlens, key_length, window_size),
            *_strides(q, k, v, out),
            num_heads,
            num_heads // num_kv_heads,
            query_length,
            key_length,
            scale * _LOG2E,
            CAUSAL=causal,
            ZONES=_query_major_zones(causal, left, window_size, cu_seqlens),
            **_constants(q, tiles),
        )
    return out, log2_lse


def backward(
    grad_out: Tensor,
    grad_log2_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    order: Tensor,
    out: Tensor,
    log2_lse: Tensor,
    *,
    causal: bool,
    scale: float,
    window_size: int | None,
    slopes_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` in q, k, v and, where asked for, the slopes.

    With P the attention weights: dV = P^T dO, dS = P * (dO V^T - delta) for delta_i = dO_i . O_i - dLSE_i,
    dQ = scale dS K, dK = scale dS^T Q, and dm = -sum dS |i - j|. The query heads of one key head are summed in one
    program, the slopes over blocks by torch.sum: no atomics, the same bits on every run.

    Args are those of `forward`, what it returned, and the gradients of that, alike in shape and dtype.

    Returns:
        dq, dk, dv, shaped and typed as q, k, v, and dleft, dright, (B, H) float32, or (0,) without slopes_gradient.
    """
    batch, num_heads, query_length, _ = q.shape
    num_kv_heads, key_length = k.shape[1:3]
    dq, dk, dv = (empty_output(x) for x in (q, k, v))
    slopes_shape = (batch, num_heads) if slopes_gradient else (0,)
    dleft, dright = (torch.zeros(slopes_shape, dtype=torch.float32, device=q.device) for _ in range(2))
    if not (q.numel() and k.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_(), dleft, dright
    q, k, v, out, grad_out = (unit_stride(x) for x in (q, k, v, out, grad_out))
    masks = _masks(left, right, key_padding_mask, cu_seqlens, key_length, window_size)
    sizes = (num_heads, num_heads // num_kv_heads, query_length, key_length, scale, scale * _LOG2E)
    # The LSE and delta: what the second kernel needs of each query, in rows that its tiles do not pass.
    padded_length = triton.cdiv(query_length, REACH_M) * REACH_M
    statistics = torch.empty(2, batch, num_heads, padded_length, dtype=torch.float32, device=q.device)

    tiles = plan(q).query_gradient
    num_blocks = triton.cdiv(query_length, tiles.block_m)
    partial: Tensor | tuple[None, None] = (None, None)
    if slopes_gradient:
        partial = torch.empty(2, batch, num_heads, num_blocks, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        query_gradient_kernel[(order.numel() * num_blocks,)](
            q,
            k,
            v,
            out,
            grad_out,
            dq,
            log2_lse,
            grad_log2_lse.contiguous(),
            *statistics,
            *partial,
            order,
            starts,
            ends,
            *masks,
            *_strides(q, k, v, out, grad_out, dq),
            *sizes,
            CAUSAL=causal,
            ZONES=_query_major_zones(causal, left, window_size, cu_seqlens),
            **_constants(q, tiles),
        )

    tiles = plan(q).key_gradient
    if num_heads != num_kv_heads:
        order = work_order(starts, ends, num_heads // num_kv_heads)
    with torch.cuda.device_of(q):
        key_gradient_kernel[(order.numel() * triton.cdiv(key_length, tiles.block_n),)](
            q,
            k,
            v,
            grad_out,
            dk,
            dv,
            *statistics,
            order,
            starts,
            ends,
            *masks,
            *_strides(q, k, v, grad_out, dk, dv),
            *sizes,
            CAUSAL=causal,
            ZONES=_key_major_zones(causal, left, window_size, cu_seqlens),
            **_constants(q, tiles),
        )
    if isinstance(partial, Tensor):
        dleft, dright = (side.sum(dim=-1) for side in partial)
    return dq, dk, dv, dleft, dright


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    *,
    causal: bool,
    scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor]:
    """`forward` for few queries and many keys: the keys within reach are split among programs, then combined by LSE.

    One program computes all queries of one key head over one stretch of keys, so that each key is read once. Split
    s of a head holds the keys [first + s C, first + (s + 1) C) of its range, C the same for all heads: a head with a
    short reach occupies few programs, and the rest of its programs return at once.

    Args are those of `forward`, with (H / Hkv) Tq at most DECODE_ROWS, which makes starts and ends (B, H, 1).

    Returns:
        out as in `forward`, and the natural LSE.
    """
    batch, num_heads, query_length, head_dim = q.shape
    num_kv_heads, key_length = k.shape[1:3]
    out = empty_output(q)
    lse = torch.empty(batch, num_heads, query_length, dtype=torch.float32, device=q.device)
    if not (q.numel() and k.numel()):
        return out.zero_(), lse.fill_(-math.inf)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    group = num_heads // num_kv_heads
    rows = group * query_length
    tiles = plan(q).decode if rows <= plan(q).decode.block_m else plan(q).decode_rows
    # A power of two, at least 4 tiles: few enough values that a growing cache does not compile anew at each step.
    split = max(4 * tiles.block_n, triton.next_power_of_2(triton.cdiv(key_length, _MAX_SPLITS)))
    num_splits = triton.cdiv(key_length, split)
    ranges = (starts.contiguous(), ends.contiguous())
    partial_out = torch.empty(batch, num_kv_heads, num_splits, rows, head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(batch, num_kv_heads, rows, num_splits, dtype=torch.float32, device=q.device)
    masks = _masks(left, right, key_padding_mask, None, key_length, window_size)
    with torch.cuda.device_of(q):
        decode_kernel[(batch * num_kv_heads, num_splits)](
            q,
            k,
            v,
            partial_out,
            partial_lse,
            *ranges,
            *masks[:4],
            *_strides(q, k, v),
            num_kv_heads,
            group,
            query_length,
            key_length,
            scale * _LOG2E,
            SPLIT=split,
            REACH_N=REACH_N,
            BLOCK_G=triton.next_power_of_2(group),
            BLOCK_R=tiles.block_m,
            BLOCK_N=tiles.block_n,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(q),
            CAUSAL=causal,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        combine_kernel[(batch * num_kv_heads, rows)](
            partial_out,
            partial_lse,
            out,
            lse,
            *ranges,
            *_strides(out),
            num_kv_heads,
            group,
            query_length,
            key_length,
            num_splits,
            SPLIT=split,
            REACH_N=REACH_N,
            BLOCK_G=triton.next_power_of_2(group),
            BLOCK_S=16,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(q),
            num_warps=4,
        )
    return out, lse


def work_order(starts: Tensor, ends: Tensor, group: int = 1) -> Tensor:
    """In which order the pairs of a batch row and a head start: those with the most key blocks first.

    The GPU starts programs in the order of their number, each on the first free multiprocessor. The heads that see far
    come first, and what is left for the end are the small pieces of the steepest.

    Returns:
        (B H / group,) int32, numbers of pairs, or of groups of so many heads, for starts and ends (B, H, NQ) int32.
    """
    counts = (ends - starts).sum(dim=-1, dtype=torch.int32).flatten()
    if group > 1:
        counts = counts.view(-1, group).sum(dim=1, dtype=torch.int32)
    order = torch.empty_like(counts)
    with torch.cuda.device_of(counts):
        work_order_kernel[(triton.cdiv(counts.numel(), 64),)](counts, order, counts.numel(), num_warps=4)
    return order


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of B, H and T; that of D is 1."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _masks(
    left: Tensor | None,
    right: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_length: int,
    window_size: int | None,
) -> tuple[Tensor | int | None, ...]:
    """What the kernels take of slopes and masks: left, right, padding, window_size, document_start, document_end."""
    if left is not None and right is not None:
        left, right = left.contiguous(), right.contiguous()
    padding = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    return left, right, padding, int32_window(window_size), *documents(cu_seqlens, key_length)


def _constants(q: Tensor, tiles: Tiles) -> dict[str, int | bool]:
    return {
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": block_d(q),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "REACH_M": REACH_M,
        "REACH_N": REACH_N,
        "SPLIT_BIAS": q.dtype.itemsize == 2,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _query_major_zones(causal: bool, left: Tensor | None, window_size: int | None, cu_seqlens: Tensor | None) -> int:
    """Which of the five zones can hold tiles where rows are queries, as bits."""
    signed = left is not None and not causal
    bounded = window_size is not None or cu_seqlens is not None
    return bounded | 1 << 1 | signed << 2 | signed << 3 | 1 << 4


def _key_major_zones(causal: bool, left: Tensor | None, window_size: int | None, cu_seqlens: Tensor | None) -> int:
    """Which of the five zones can hold tiles where rows are keys, as bits."""
    signed = left is not None
    bounded = causal or window_size is not None or cu_seqlens is not None
    return bounded | (not (causal and signed)) << 1 | (signed and not causal) << 2 | signed << 3 | 1 << 4
