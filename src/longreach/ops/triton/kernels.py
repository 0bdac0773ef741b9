"""Kernels of `launch`, which starts them: read its docstring first.

Arguments named as tensors are pointers, which the first lines move to the batch row and head of the program; None
stands for what is absent, and the code for it is not compiled. Logits are kept in units of log2, so that exp2 serves:
`scale` comes multiplied by log2(e), and slopes are, as they are loaded.

One file, though a long one: forward, backward and decode are made of the same tiles, zones and logits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Parameters are Triton values or constants, which Python types do not tell apart.

import math

import triton
import triton.language as tl

_LN2 = tl.constexpr(math.log(2.0))
_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _tile(
    base, first, stride, ok, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows [first, first + BLOCK) of a matrix with column stride 1; zeros past HEAD_DIM, and where MASKED, not ok."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    # T times the row stride of a [B, T, H, D] layout can pass 2^31 elements; BLOCK times it does not.
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED and HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=ok[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=ok[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store(base, first, stride, ok, tile, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=ok[:, None] & (columns < HEAD_DIM)[None, :])


@triton.jit
def _interval(row, length, window_size, document_start, document_end, PAST: tl.constexpr, FUTURE: tl.constexpr):
    """Half-open interval of the `length` columns that each row sees, or is seen by, on the sides that are asked for."""
    lo = tl.zeros_like(row)
    hi = tl.zeros_like(row) + length
    if not PAST:
        lo = tl.maximum(lo, row)
    if not FUTURE:
        hi = tl.minimum(hi, row + 1)
    if window_size is not None:
        lo = tl.maximum(lo, row - window_size + 1)
        hi = tl.minimum(hi, row + window_size)
    if document_start is not None:
        lo = tl.maximum(lo, tl.load(document_start + row))
        hi = tl.minimum(hi, tl.load(document_end + row))
    return lo, tl.maximum(hi, 0)


@triton.jit
def _zones(first, last, row, lo, hi, BLOCK: tl.constexpr, SIGNED: tl.constexpr):
    """Borders of the five zones of tiles for rows whose intervals are [lo, hi), within the columns [first, last)."""
    first = tl.maximum(first, tl.min(lo)) // BLOCK
    last = tl.maximum(first, tl.cdiv(tl.minimum(last, tl.max(hi)), BLOCK))
    full_first = tl.minimum(tl.maximum(tl.cdiv(tl.max(lo), BLOCK), first), last)
    full_last = tl.minimum(tl.maximum(tl.min(hi) // BLOCK, full_first), last)
    before = full_last
    after = full_last
    if SIGNED:
        before = tl.minimum(tl.maximum((tl.min(row) + 1) // BLOCK, full_first), full_last)
        after = tl.minimum(tl.maximum(tl.cdiv(tl.max(row), BLOCK), before), full_last)
    return first, full_first, before, after, full_last, last


@triton.jit
def _logits(
    dots,
    query,
    key,
    lo,
    hi,
    shown,
    origin,
    left,
    right,
    scale,
    QUERY_MAJOR: tl.constexpr,
    EDGE: tl.constexpr,
    PAST: tl.constexpr,
    SPLIT_BIAS: tl.constexpr,
):
    """Logits of a tile as a sum of x, shaped as dots, and a shift for each query.

    In a tile without an edge the bias -m (i - j) splits into m (j - origin) - m (i - origin), which costs one
    addition per element and one product per row. Its rounding, below 2^-24 m BLOCK, lies far below that of half
    weights; for float32 it does not, and there, as in edge tiles, the bias is made from each element's distance.
    """
    i = tl.expand_dims(query, 1 if QUERY_MAJOR else 0)
    j = tl.expand_dims(key, 0 if QUERY_MAJOR else 1)
    shift = tl.zeros_like(query).to(tl.float32)
    if left is None:
        x = dots * scale
    elif SPLIT_BIAS and not EDGE:
        slope = left if PAST else -right
        x = dots * scale + slope * (j - origin).to(tl.float32)
        shift = slope * (origin - query).to(tl.float32)
    else:
        distance = (i - j).to(tl.float32)
        x = dots * scale - tl.where(distance >= 0, left, -right) * distance
    if EDGE:
        column = j if QUERY_MAJOR else i
        x = tl.where((column >= lo[:, None]) & (column < hi[:, None]), x, float("-inf"))
    if shown is not None:
        x += tl.where(tl.expand_dims(shown, 0 if QUERY_MAJOR else 1), 0.0, float("-inf"))
    return x, shift


@triton.jit
def _work_item(order, num_blocks, num_heads):
    """Batch row, head and block of this program; int64 where it is to be multiplied by a stride."""
    pair = tl.load(order + tl.program_id(0) // num_blocks)
    return tl.cast(pair // num_heads, tl.int64), tl.cast(pair % num_heads, tl.int64), tl.program_id(0) % num_blocks


@triton.jit
def _softmax_step(x, shift, peak, total):
    """Weights of a tile, the factor of what was summed before it, and the new peak and total of each row."""
    new_peak = tl.maximum(peak, tl.max(x, 1) + shift)
    # A row that has seen no key has a peak of -inf, and -inf - -inf is NaN.
    safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(x + (shift - safe_peak)[:, None])
    decay = tl.exp2(peak - safe_peak)
    return weights, decay, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def _log2_sum(peak, total):
    """LSE in units of log2; -inf for rows that saw no key."""
    return tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def _forward_tiles(
    acc, peak, total, q, k, v, stride_k, stride_v, query, lo, hi, left, right, padding, key_length, scale, first, last,
    EDGE: tl.constexpr, PAST: tl.constexpr, SPLIT_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [first, last) of one zone."""
    for tile in tl.range(first, last):
        origin = tile * BLOCK_N
        key = origin + tl.arange(0, BLOCK_N)
        within = key < key_length
        shown = None
        if padding is not None:
            shown = tl.load(padding + key, mask=within, other=1) == 0
            within = shown
        k_tile = _tile(k, origin, stride_k, within, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE or padding is not None)
        dots = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        x, shift = _logits(dots, query, key, lo, hi, shown, origin, left, right, scale, True, EDGE, PAST, SPLIT_BIAS)
        weights, decay, peak, total = _softmax_step(x, shift, peak, total)
        v_tile = _tile(v, origin, stride_v, within, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE or padding is not None)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit(do_not_specialize=["query_length", "key_length"])
def forward_kernel(
    q, k, v, out, log2_lse, order, starts, ends, left, right, padding, window_size, document_start, document_end,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, num_heads, group, query_length, key_length, scale,
    CAUSAL: tl.constexpr, ZONES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, REACH_M: tl.constexpr, REACH_N: tl.constexpr, SPLIT_BIAS: tl.constexpr,
):  # fmt: skip
    """One block of queries against its range of keys."""
    num_blocks = tl.cdiv(query_length, BLOCK_M)
    batch, head, block = _work_item(order, num_blocks, num_heads)
    block = num_blocks - 1 - block  # causal queries at the end see the most keys
    pair = batch * num_heads + head
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // group * stride_kh
    v += batch * stride_vb + head // group * stride_vh
    if left is not None:
        left = tl.load(left + pair) * _LOG2E
        right = tl.load(right + pair) * _LOG2E
    if padding is not None:
        padding += batch * key_length

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < query_length
    # Rows past the end repeat the last query's position, so that they ask for no keys of their own.
    query = tl.minimum(row, query_length - 1) + (key_length - query_length)
    lo, hi = _interval(query, key_length, window_size, document_start, document_end, True, not CAUSAL)
    part = pair * tl.cdiv(query_length, REACH_M) + block * BLOCK_M // REACH_M
    borders = _zones(
        tl.load(starts + part) * REACH_N, tl.load(ends + part) * REACH_N, query, lo, hi, BLOCK_N, left is not None
    )

    q_tile = _tile(q, block * BLOCK_M, stride_qt, exists, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for zone in tl.static_range(5):
        if (ZONES >> zone) & 1:
            acc, peak, total = _forward_tiles(
                acc, peak, total, q_tile, k, v, stride_kt, stride_vt, query, lo, hi, left, right, padding, key_length,
                scale, borders[zone], borders[zone + 1], zone % 2 == 0, zone == 1, SPLIT_BIAS, HEAD_DIM, BLOCK_D,
                BLOCK_N,
            )  # fmt: skip

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out += batch * stride_ob + head * stride_oh
    _store(out, block * BLOCK_M, stride_ot, exists, acc, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(log2_lse + pair * query_length + row, _log2_sum(peak, total), mask=exists)


@triton.jit
def _query_gradient_tiles(
    dq, row_sum, left_moment, right_moment, left_mean, right_mean, q, grad_out, lse, delta, k, v, stride_k, stride_v,
    query, lo, hi, left, right, padding, key_length, scale, first, last,
    EDGE: tl.constexpr, PAST: tl.constexpr, SPLIT_BIAS: tl.constexpr, SLOPES_GRADIENT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ / scale over the key tiles [first, last) of one zone; where slopes learn, sums over each row for them too:
    that of dS, and those of dS and of the weights times the distance to past and to future keys.
    """
    for tile in tl.range(first, last):
        origin = tile * BLOCK_N
        key = origin + tl.arange(0, BLOCK_N)
        within = key < key_length
        shown = None
        if padding is not None:
            shown = tl.load(padding + key, mask=within, other=1) == 0
            within = shown
        k_tile = _tile(k, origin, stride_k, within, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE or padding is not None)
        v_tile = _tile(v, origin, stride_v, within, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE or padding is not None)
        dots = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        x, shift = _logits(dots, query, key, lo, hi, shown, origin, left, right, scale, True, EDGE, PAST, SPLIT_BIAS)
        weights = tl.exp2(x + (shift - lse)[:, None])
        grad_weights = tl.dot(grad_out, tl.trans(v_tile), input_precision="ieee")
        grad_logits = weights * (grad_weights - delta[:, None])
        dq = tl.dot(grad_logits.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
        if SLOPES_GRADIENT:
            distance = (query[:, None] - key[None, :]).to(tl.float32)
            row_sum += tl.sum(grad_logits, 1)
            if EDGE or PAST:
                past = tl.maximum(distance, 0.0)
                left_moment += tl.sum(grad_logits * past, 1)
                left_mean += tl.sum(weights * past, 1)
            if EDGE or not PAST:
                future = tl.maximum(-distance, 0.0)
                right_moment += tl.sum(grad_logits * future, 1)
                right_mean += tl.sum(weights * future, 1)
    return dq, row_sum, left_moment, right_moment, left_mean, right_mean


@triton.jit(do_not_specialize=["query_length", "key_length"])
def query_gradient_kernel(
    q, k, v, out, grad_out, dq, log2_lse, grad_log2_lse, padded_lse, delta, dleft, dright, order, starts, ends,
    left, right, padding, window_size, document_start, document_end,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    num_heads, group, query_length, key_length, natural_scale, scale,
    CAUSAL: tl.constexpr, ZONES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, REACH_M: tl.constexpr, REACH_N: tl.constexpr, SPLIT_BIAS: tl.constexpr,
):  # fmt: skip
    """One block of queries against its range of keys. Stores LSE and delta for the kernel of dK and dV."""
    num_blocks = tl.cdiv(query_length, BLOCK_M)
    batch, head, block = _work_item(order, num_blocks, num_heads)
    block = num_blocks - 1 - block  # causal queries at the end see the most keys
    pair = batch * num_heads + head
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // group * stride_kh
    v += batch * stride_vb + head // group * stride_vh
    out += batch * stride_ob + head * stride_oh
    grad_out += batch * stride_gb + head * stride_gh
    if left is not None:
        left = tl.load(left + pair) * _LOG2E
        right = tl.load(right + pair) * _LOG2E
    if padding is not None:
        padding += batch * key_length

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < query_length
    query = tl.minimum(row, query_length - 1) + (key_length - query_length)
    lo, hi = _interval(query, key_length, window_size, document_start, document_end, True, not CAUSAL)
    part = pair * tl.cdiv(query_length, REACH_M) + block * BLOCK_M // REACH_M
    borders = _zones(
        tl.load(starts + part) * REACH_N, tl.load(ends + part) * REACH_N, query, lo, hi, BLOCK_N, left is not None
    )

    grad_tile = _tile(grad_out, block * BLOCK_M, stride_gt, exists, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out_tile = _tile(out, block * BLOCK_M, stride_ot, exists, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row_grad_lse = tl.load(grad_log2_lse + pair * query_length + row, mask=exists, other=0.0) / _LN2
    row_delta -= row_grad_lse
    row_lse = tl.load(log2_lse + pair * query_length + row, mask=exists, other=float("-inf"))
    # An LSE of inf makes the weights of rows 0 that do not exist or see no key.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    padded = pair * tl.cdiv(query_length, REACH_M) * REACH_M
    tl.store(padded_lse + padded + row, row_lse)
    tl.store(delta + padded + row, row_delta)

    q_tile = _tile(q, block * BLOCK_M, stride_qt, exists, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    left_moment = tl.zeros([BLOCK_M], tl.float32)
    right_moment = tl.zeros([BLOCK_M], tl.float32)
    left_mean = tl.zeros([BLOCK_M], tl.float32)
    right_mean = tl.zeros([BLOCK_M], tl.float32)
    for zone in tl.static_range(5):
        if (ZONES >> zone) & 1:
            acc, row_sum, left_moment, right_moment, left_mean, right_mean = _query_gradient_tiles(
                acc, row_sum, left_moment, right_moment, left_mean, right_mean, q_tile, grad_tile, row_lse, row_delta,
                k, v, stride_kt, stride_vt, query, lo, hi, left, right, padding, key_length, scale, borders[zone],
                borders[zone + 1], zone % 2 == 0, zone == 1, SPLIT_BIAS, dleft is not None, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip

    dq += batch * stride_dqb + head * stride_dqh
    _store(dq, block * BLOCK_M, stride_dqt, exists, acc * natural_scale, BLOCK_M, HEAD_DIM, BLOCK_D)
    if dleft is not None:
        partial = pair * tl.cdiv(query_length, BLOCK_M) + block
        # A row of dS sums to dLSE but for the error of delta, which carries the rounding of the output. That error
        # reaches each dS times its weight: the sum tells it, and it is taken out before distances multiply it.
        error = row_grad_lse - row_sum
        tl.store(dleft + partial, -tl.sum(left_moment + error * left_mean))
        tl.store(dright + partial, -tl.sum(right_moment + error * right_mean))


@triton.jit
def _key_gradient_tiles(
    dk, dv, k, v, q, grad_out, padded_lse, delta, stride_q, stride_g, key, lo, hi, shown, left, right, query_length,
    scale, first, last,
    EDGE: tl.constexpr, PAST: tl.constexpr, SPLIT_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV over the query tiles [first, last) of one zone, with tiles transposed: rows are keys."""
    for tile in tl.range(first, last):
        origin = tile * BLOCK_M
        query = origin + tl.arange(0, BLOCK_M)
        exists = query < query_length
        q_tile = _tile(q, origin, stride_q, exists, BLOCK_M, HEAD_DIM, BLOCK_D, EDGE)
        grad_tile = _tile(grad_out, origin, stride_g, exists, BLOCK_M, HEAD_DIM, BLOCK_D, EDGE)
        dots = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        x, shift = _logits(dots, query, key, lo, hi, shown, origin, left, right, scale, False, EDGE, PAST, SPLIT_BIAS)
        weights = tl.exp2(x + (shift - tl.load(padded_lse + query))[None, :])
        dv = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv, input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(grad_tile), input_precision="ieee")
        grad_logits = weights * (grad_weights - tl.load(delta + query)[None, :])
        dk = tl.dot(grad_logits.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _queries_that_need(
    starts, ends, pair, query_length, first_key, BLOCK_N: tl.constexpr, REACH_M: tl.constexpr, REACH_N: tl.constexpr
):
    """The range of queries from the first to the last block whose range holds any of BLOCK_N keys."""
    num_blocks = tl.cdiv(query_length, REACH_M)
    first = num_blocks
    last = 0
    for step in tl.range(0, num_blocks, 128):
        block = step + tl.arange(0, 128)
        inside = block < num_blocks
        start = tl.load(starts + pair * num_blocks + block, mask=inside, other=0) * REACH_N
        end = tl.load(ends + pair * num_blocks + block, mask=inside, other=0) * REACH_N
        needs = (start < end) & (start < first_key + BLOCK_N) & (end > first_key)
        first = tl.minimum(first, tl.min(tl.where(needs, block, num_blocks)))
        last = tl.maximum(last, tl.max(tl.where(needs, block + 1, 0)))
    return first * REACH_M, tl.maximum(first, last) * REACH_M


@triton.jit(do_not_specialize=["query_length", "key_length"])
def key_gradient_kernel(
    q, k, v, grad_out, dk, dv, padded_lse, delta, order, starts, ends,
    left, right, padding, window_size, document_start, document_end,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    num_heads, group, query_length, key_length, natural_scale, scale,
    CAUSAL: tl.constexpr, ZONES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, REACH_M: tl.constexpr, REACH_N: tl.constexpr, SPLIT_BIAS: tl.constexpr,
):  # fmt: skip
    """One block of keys against the ranges of queries that need it, of all query heads that share its key head."""
    num_blocks = tl.cdiv(key_length, BLOCK_N)
    batch, kv_head, block = _work_item(order, num_blocks, num_heads // group)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    key_row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = key_row < key_length
    within = exists
    shown = None
    if padding is not None:
        shown = tl.load(padding + batch * key_length + key_row, mask=exists, other=1) == 0
        within = shown
    k_tile = _tile(k, block * BLOCK_N, stride_kt, within, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v_tile = _tile(v, block * BLOCK_N, stride_vt, within, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    # Positions count from the first query here: columns are queries.
    key = tl.minimum(key_row, key_length - 1) - (key_length - query_length)
    lo, hi = _interval(key, query_length, window_size, document_start, document_end, not CAUSAL, True)

    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        pair = batch * num_heads + head
        left_slope = None
        right_slope = None
        if left is not None:
            left_slope = tl.load(left + pair) * _LOG2E
            right_slope = tl.load(right + pair) * _LOG2E
        padded = pair * tl.cdiv(query_length, REACH_M) * REACH_M
        first, last = _queries_that_need(starts, ends, pair, query_length, block * BLOCK_N, BLOCK_N, REACH_M, REACH_N)
        borders = _zones(first, last, key, lo, hi, BLOCK_M, left is not None)
        for zone in tl.static_range(5):
            if (ZONES >> zone) & 1:
                dk_tile, dv_tile = _key_gradient_tiles(
                    dk_tile, dv_tile, k_tile, v_tile, q + batch * stride_qb + head * stride_qh,
                    grad_out + batch * stride_gb + head * stride_gh, padded_lse + padded, delta + padded, stride_qt,
                    stride_gt, key, lo, hi, shown, left_slope, right_slope,
                    query_length, scale, borders[zone], borders[zone + 1], zone % 2 == 0, zone == 3, SPLIT_BIAS,
                    HEAD_DIM, BLOCK_D, BLOCK_M,
                )  # fmt: skip

    dk += batch * stride_dkb + kv_head * stride_dkh
    dv += batch * stride_dvb + kv_head * stride_dvh
    _store(dk, block * BLOCK_N, stride_dkt, exists, dk_tile * natural_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store(dv, block * BLOCK_N, stride_dvt, exists, dv_tile, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _range_of_group(starts, ends, pair, group, key_length, REACH_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """The keys [first, last) that any query head of one key head needs; first is a multiple of REACH_N."""
    member = tl.arange(0, BLOCK_G)
    first = tl.min(tl.load(starts + pair * group + member, mask=member < group, other=2**30))
    last = tl.max(tl.load(ends + pair * group + member, mask=member < group, other=0))
    return first * REACH_N, tl.minimum(last * REACH_N, key_length)


@triton.jit(do_not_specialize=["query_length", "key_length"])
def decode_kernel(
    q, k, v, partial_out, partial_lse, starts, ends, left, right, padding, window_size,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    num_kv_heads, group, query_length, key_length, scale,
    SPLIT: tl.constexpr, REACH_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """All queries of one key head against one split of its range of keys. Rows are (head of the group, query)."""
    pair = tl.cast(tl.program_id(0), tl.int64)
    first, last = _range_of_group(starts, ends, pair, group, key_length, REACH_N, BLOCK_G)
    first += tl.program_id(1) * SPLIT
    last = tl.minimum(first + SPLIT, last)
    if first >= last:
        return
    batch = pair // num_kv_heads
    kv_head = pair % num_kv_heads
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    if padding is not None:
        padding += batch * key_length

    row = tl.arange(0, BLOCK_R)
    exists = row < group * query_length
    head = kv_head * group + tl.minimum(row // query_length, group - 1)
    step = row % query_length
    columns = tl.arange(0, BLOCK_D)
    pointers = q + batch * stride_qb + head * stride_qh + tl.cast(step, tl.int64) * stride_qt
    mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
    q_tile = tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0)
    if left is not None:
        left = tl.load(left + batch * num_kv_heads * group + head)[:, None] * _LOG2E
        right = tl.load(right + batch * num_kv_heads * group + head)[:, None] * _LOG2E
    query = step + (key_length - query_length)
    lo, hi = _interval(query, last, window_size, None, None, True, not CAUSAL)

    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc, peak, total = _forward_tiles(
        acc, peak, total, q_tile, k, v, stride_kt, stride_vt, query, lo, hi, left, right, padding, key_length, scale,
        first // BLOCK_N, tl.cdiv(last, BLOCK_N), True, True, False, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    num_splits = tl.num_programs(1)
    rows = group * query_length
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    partial_out += (pair * num_splits + tl.program_id(1)) * rows * HEAD_DIM
    _store(partial_out, 0, HEAD_DIM, exists, acc, BLOCK_R, HEAD_DIM, BLOCK_D)
    pointers = partial_lse + (pair * rows + row) * num_splits + tl.program_id(1)
    tl.store(pointers, _log2_sum(peak, total), mask=exists)


@triton.jit(do_not_specialize=["query_length", "key_length", "num_splits"])
def combine_kernel(
    partial_out, partial_lse, out, lse, starts, ends, stride_ob, stride_oh, stride_ot,
    num_kv_heads, group, query_length, key_length, num_splits,
    SPLIT: tl.constexpr, REACH_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of one row's partial outputs over the splits that were computed, weighted by exp of their LSE."""
    pair = tl.cast(tl.program_id(0), tl.int64)
    row = tl.program_id(1)
    rows = tl.num_programs(1)
    first, last = _range_of_group(starts, ends, pair, group, key_length, REACH_N, BLOCK_G)
    live = tl.cdiv(tl.maximum(last - first, 0), SPLIT)
    partial_lse += (pair * rows + row) * num_splits
    partial_out += (pair * num_splits * rows + row) * HEAD_DIM
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for split in tl.range(0, live, BLOCK_S):
        computed = split + tl.arange(0, BLOCK_S) < live
        x = tl.load(partial_lse + split + tl.arange(0, BLOCK_S), mask=computed, other=float("-inf"))
        weights, decay, peak, total = _softmax_step(x[None, :], tl.zeros([1], tl.float32), peak, total)
        tile = _tile(partial_out, split, rows * HEAD_DIM, computed, BLOCK_S, HEAD_DIM, BLOCK_D, True)
        acc = acc * decay[:, None] + tl.sum(tl.trans(weights) * tile, 0)[None, :]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    batch = pair // num_kv_heads
    head = pair % num_kv_heads * group + row // query_length
    step = row % query_length
    columns = tl.arange(0, BLOCK_D)
    out += batch * stride_ob + head * stride_oh + tl.cast(step, tl.int64) * stride_ot
    tl.store(out + columns[None, :], acc.to(out.dtype.element_ty), mask=(columns < HEAD_DIM)[None, :])
    position = (batch * num_kv_heads * group + head) * query_length + step
    tl.store(lse + position + tl.arange(0, 1), _log2_sum(peak, total) * _LN2)


@triton.jit(do_not_specialize=["length"])
def work_order_kernel(counts, order, length):
    """Where each of 64 numbers stands among all when they descend, equal ones in their own order."""
    index = tl.program_id(0) * 64 + tl.arange(0, 64)
    count = tl.load(counts + index, mask=index < length, other=0)
    rank = tl.zeros([64], tl.int32)
    for step in tl.range(0, length, 64):
        other_index = step + tl.arange(0, 64)
        other = tl.load(counts + other_index, mask=other_index < length, other=-1)
        before = (other[None, :] > count[:, None]) | (
            (other[None, :] == count[:, None]) & (other_index[None, :] < index[:, None])
        )
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(order + rank, index, mask=index < length)
