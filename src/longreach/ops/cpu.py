"""Fast ALiBi attention on the CPU: PyTorch's own kernels, run on the key ranges that `reach` leaves.

The bias of a tile depends on distances alone, and distances are constant along diagonals. With the query rows of a
tile in reverse order they are constant along antidiagonals: entry (a, c) of the bias is number a + c of one vector per
head. So the bias of any tile is a view of that vector, with strides (1, 1): it costs no memory and stays in the first
level of cache. Query blocks whose ranges are alike become one batch, their keys overlapping windows of k and v.

The forward pass runs each such batch through the flash attention that `scaled_dot_product_attention` uses on the CPU,
called directly because only that returns the LSE. The backward pass recomputes the weights from the LSE, by that
kernel's own backward pass or, where the slopes or the LSE take part or it would be slower, by matrix products. Either
way gradients are added up in one fixed order, so that two runs agree to the last bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reach import default_tolerance, key_ranges

Item = TypeVar("Item")

BLOCK_M = 128
"""Queries per block in the ranges."""

BLOCK_N = 64
"""Keys per block in the ranges."""

WIDE = 512
"""Mean number of keys from which two blocks of queries are computed as one: the kernel is faster, the tile wider."""

CALL_COST = 2**15
"""Work, in pairs of a query and a key, that is worth an additional call of the kernel."""

BACKWARD_PAIRS = 2**19
"""Pairs of a query and a key in one step of a backward pass in parts, whose weights are to stay in the cache."""

BACKWARD_KEYS = 2**15
"""Keys, those of overlapping windows counted each, in one step of a backward pass by the fused kernel."""

BOUND_COST = 320
"""Work of finding a head's ranges, in keys per query; twice as many for half types, whose kernel is faster."""

Ranges = list[list[int]] | None
"""One end of the ranges of a head, for each sequence and each block; None where they were not worth finding."""


@dataclass(frozen=True)
class _Tile:
    """One call: either some heads of one block of queries, or many blocks of one head with equally wide windows."""

    batch: slice
    """Which sequences."""
    heads: slice
    """Which query heads; one alone where there are several windows."""
    row: int
    """First query."""
    rows: int
    """Queries in a window."""
    count: int
    """Number of windows; each begins `rows` queries and as many keys after the one before."""
    key: int
    """First key of the first window."""
    width: int
    """Keys in a window."""


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Tensor | tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    tolerance: float | None = None,
    key_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T - m |i - j|) v over the visible keys within reach; arguments as in `longreach.attention`.

    Differentiable in q, k, v and the slopes. Reads only the keys that `longreach.reach` says each block of queries
    needs, so that time grows linearly with length once length passes the reach.

    Args:
        q: (B, H, Tq, D) float64, float32, bfloat16 or float16.
        k: (B, Hkv, Tk, D).
        v: (B, Hkv, Tk, D).
        slopes: (H,) or (B, H), a pair (left, right) of them, or None.
        bias: refused.
        causal: whether a query sees only keys at or before its position.
        scale: factor of q . k; D**-0.5 when None.
        window_size: see only keys with |i - j| < window_size.
        key_padding_mask: (B, Tk) bool, True where a key is padding. Padding at the ends costs nothing.
        cu_seqlens: (N + 1,) borders of packed documents, each computed by itself.
        dropout_p: refused unless 0.
        tolerance: probability mass per row that may be dropped; `default_tolerance` of the dtype when None.
        key_norms: `key_block_norms(k, BLOCK_N)`, kept by a cache so that decoding need not read all of k.

    Returns:
        The output (B, H, Tq, D) in the dtype of q, and the LSE (B, H, Tq) in float32, or float64 if q is.

    Raises:
        ValueError: a dense bias, or dropout.
    """
    if bias is not None:
        raise ValueError('bias with impl="cpu": a dense bias has no reach; use impl="sdpa" or "auto"')
    if dropout_p:
        raise ValueError(f'dropout_p={dropout_p} with impl="cpu": only 0 is supported; use impl="sdpa" or "auto"')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tolerance = default_tolerance(q.dtype) if tolerance is None else tolerance
    if slopes is None:
        slopes = torch.zeros(q.shape[1], dtype=torch.float32)
    left, right = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    masks = _Masks.of(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens)
    worth = _heads_worth_bounding(q, k, left, right, masks, tolerance, key_norms)
    low: list[Ranges] = [None] * q.shape[1]
    high = low.copy()
    if worth.stop > worth.start:
        with torch.no_grad():
            group = q.shape[1] // k.shape[1]
            kv_heads = slice(worth.start // group, worth.stop // group)
            starts, ends = key_ranges(
                q[:, worth],
                k[:, kv_heads],
                (left[..., worth], right[..., worth]),
                scale=scale,
                causal=causal,
                tolerance=tolerance,
                block_m=BLOCK_M,
                block_n=BLOCK_N,
                window_size=window_size,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
                key_norms=None if key_norms is None else key_norms[:, kv_heads],
            )
            low[worth] = starts.transpose(0, 1).mul(BLOCK_N).tolist()
            high[worth] = ends.transpose(0, 1).mul(BLOCK_N).tolist()
    tiles = list(_plan(q.shape, k.shape, masks, low, high))
    return _TiledAttention.apply(q, k, v, left, right, scale, masks, tiles)


@dataclass(frozen=True)
class _Masks:
    """What hides keys from queries, as numbers on the host."""

    query_length: int
    """Tq."""
    key_length: int
    """Tk."""
    causal: bool
    """Whether keys after the query are hidden."""
    window_size: int | None
    """Keys at this distance and beyond are hidden."""
    documents: tuple[int, ...]
    """Borders of documents, (0, Tk) when there is but one."""
    spans: tuple[tuple[int, int], ...] | None
    """For each sequence the range of keys outside of which all is padding; None without padding."""
    holes: Tensor | None
    """(B, Tk) bool, True where a key is padding; None when the spans say it all."""

    @staticmethod
    def of(
        query_length: int,
        key_length: int,
        causal: bool,
        window_size: int | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> "_Masks":
        documents = (0, key_length) if cu_seqlens is None else tuple(cu_seqlens.tolist())
        spans, holes = None, None
        if key_padding_mask is not None and key_length:
            visible = ~key_padding_mask
            count = visible.sum(dim=-1)
            first = visible.byte().argmax(dim=-1)
            past = torch.where(count > 0, key_length - visible.flip(-1).byte().argmax(dim=-1), first)
            spans = tuple(zip(first.tolist(), past.tolist(), strict=True))
            holes = key_padding_mask if bool((past - first != count).any()) else None
        return _Masks(query_length, key_length, causal, window_size, documents, spans, holes)

    @property
    def offset(self) -> int:
        """Position of query 0."""
        return self.key_length - self.query_length

    @property
    def may_leave_rows_empty(self) -> bool:
        """Whether a tile may hold a query that sees none of its keys."""
        cut_short = self.spans is not None or self.query_length > self.key_length
        return self.holes is not None or (self.window_size is not None and cut_short)


def _heads_worth_bounding(
    q: Tensor, k: Tensor, left: Tensor, right: Tensor, masks: _Masks, tolerance: float, key_norms: Tensor | None
) -> slice:
    """The heads, in whole groups, whose reach can be expected to save more work than bounding it costs."""
    query_length, key_length, group = masks.query_length, masks.key_length, q.shape[1] // k.shape[1]
    dense = key_length - query_length / 2 if masks.causal else float(key_length)
    if masks.window_size is not None:
        dense = min(dense, masks.window_size)
    exponent = -math.log(tolerance) if tolerance else 104.0
    # Every key that is read costs as much as 40 more queries; the bound reads k alone, and that not given its norms.
    half = 2 if q.dtype.itemsize == 2 else 1
    cost = half * BOUND_COST * query_length + (20 * key_length if key_norms is None else 0)
    worth = []
    if query_length and key_length and q.shape[0]:
        slopes = torch.minimum(left, right).detach().view(-1, q.shape[1]).amin(dim=0).tolist()
        for head, slope in enumerate(slopes):
            if slope > 0 and (dense - BLOCK_M - 1.7 * exponent / slope) * (query_length + 40) > cost:
                worth.append(head // group)
    return slice(min(worth) * group, (max(worth) + 1) * group) if worth else slice(0, 0)


@dataclass(frozen=True)
class _Block:
    """Some queries of one head and the keys they need."""

    row: int
    """First query."""
    rows: int
    """Number of queries."""
    low: int
    """First key."""
    high: int
    """One past the last key."""


def _plan(
    q_shape: Sequence[int], k_shape: Sequence[int], masks: _Masks, low: list[Ranges], high: list[Ranges]
) -> Iterator[_Tile]:
    """Cover by few tiles all keys from low to high; for a head without ranges, all that the masks leave."""
    batch, num_heads = q_shape[:2]
    group = num_heads // k_shape[1]
    whole = [(slice(0, batch), (0, masks.key_length))]
    spans = whole if masks.spans is None else [(slice(b, b + 1), span) for b, span in enumerate(masks.spans)]
    for sequences, span in spans:
        lowest = [_over_sequences(min, ranges, sequences) for ranges in low]  # [H][blocks]
        highest = [_over_sequences(max, ranges, sequences) for ranges in high]
        for document in zip(masks.documents[:-1], masks.documents[1:], strict=True):
            keys = max(span[0], document[0]), min(span[1], document[1])
            rows = (0, masks.query_length) if len(masks.documents) == 2 else document
            if masks.causal:
                rows = max(rows[0], keys[0] - masks.offset), rows[1]
            if keys[0] >= keys[1] or rows[0] >= rows[1]:
                continue
            blocks = [_blocks(rows, keys, masks, lowest[head], highest[head]) for head in range(num_heads)]
            yield from _tiles(sequences, blocks, group, keys, masks.offset)


def _over_sequences(extreme: Callable[..., int], ranges: Ranges, sequences: slice) -> list[int] | None:
    """The least or the greatest end of each block's range among some sequences."""
    return None if ranges is None else [extreme(ends) for ends in zip(*ranges[sequences], strict=True)]


def _blocks(
    rows: tuple[int, int], keys: tuple[int, int], masks: _Masks, starts: list[int] | None, ends: list[int] | None
) -> list[_Block]:
    """Cut queries [rows) of one head into blocks of BLOCK_M, or of 2 BLOCK_M if they need many of the keys [keys)."""
    blocks = [_block(row, min(row + BLOCK_M, rows[1]), keys, masks, starts, ends) for row in range(*rows, BLOCK_M)]
    if sum(block.high - block.low for block in blocks) > WIDE * len(blocks):
        step = 2 * BLOCK_M
        blocks = [_block(row, min(row + step, rows[1]), keys, masks, starts, ends) for row in range(*rows, step)]
    return [block for block in blocks if block.low < block.high]


def _block(
    row: int, past_row: int, keys: tuple[int, int], masks: _Masks, starts: list[int] | None, ends: list[int] | None
) -> _Block:
    low, high = keys
    first, last = row + masks.offset, past_row - 1 + masks.offset
    if masks.causal:
        high = min(high, last + 1)
    if masks.window_size is not None:
        low, high = max(low, first - masks.window_size + 1), min(high, last + masks.window_size)
    if starts is not None and ends is not None:
        within = slice(row // BLOCK_M, (past_row - 1) // BLOCK_M + 1)
        low, high = max(low, min(starts[within])), min(high, max(ends[within]))
    return _Block(row, past_row - row, low, high)


def _tiles(batch: slice, blocks: list[list[_Block]], group: int, keys: tuple[int, int], offset: int) -> Iterator[_Tile]:
    """Batch consecutive blocks of a head whose windows are alike, and heads whose blocks are."""
    alone: dict[tuple[int, int], list[tuple[int, _Block]]] = {}
    for head, head_blocks in enumerate(blocks):
        for run in _cut(head_blocks, lambda run: _run_cost(run, keys, offset)):
            if len(run) == 1:
                alone.setdefault((run[0].row, run[0].rows), []).append((head, run[0]))
                continue
            before, width = _window(run, offset)
            row = run[0].row
            key = row + offset - before
            yield _Tile(batch, slice(head, head + 1), row, run[0].rows, len(run), key, width)
    for (row, rows), members in alone.items():
        for some in _cut(members, lambda some: _heads_cost(some, group)):
            low = min(block.low for _, block in some)
            high = max(block.high for _, block in some)
            yield _Tile(batch, slice(some[0][0], some[-1][0] + 1), row, rows, 1, low, high - low)


def _cut(items: list[Item], cost: Callable[[list[Item]], float]) -> Iterator[list[Item]]:
    """Halve a list as long as that lowers the cost; a list of infinite cost is always halved."""
    if len(items) > 1:
        halves = items[: len(items) // 2], items[len(items) // 2 :]
        whole = cost(items)
        if whole == math.inf or whole > sum(map(cost, halves)):
            for half in halves:
                yield from _cut(half, cost)
            return
    if items:
        yield items


def _window(run: list[_Block], offset: int) -> tuple[int, int]:
    """How far before its first query's position the window of each block must begin, and how wide it must be."""
    before = max(block.row + offset - block.low for block in run)
    after = max(block.high - block.row - offset for block in run)
    return before, before + after


def _run_cost(run: list[_Block], keys: tuple[int, int], offset: int) -> float:
    """Work of one call for these blocks of one head; infinite where their windows cannot be a batch."""
    rows = run[0].rows
    before, width = _window(run, offset)
    if len(run) > 1:
        first, last = run[0].row, run[-1].row
        regular = run[-1].rows == rows and last - first == rows * (len(run) - 1)
        inside = first + offset - before >= keys[0] and last + offset - before + width <= keys[1]
        if not (regular and inside):
            return math.inf
    return CALL_COST + len(run) * rows * width


def _heads_cost(members: list[tuple[int, _Block]], group: int) -> float:
    """Work of one call for one block of queries of these heads; infinite where they are not evenly spaced."""
    (first, block), (last, _) = members[0], members[-1]
    adjacent = last - first == len(members) - 1
    if len(members) > 1 and not (adjacent and (group == 1 or first // group == last // group)):
        return math.inf
    low, high = min(block.low for _, block in members), max(block.high for _, block in members)
    return CALL_COST + len(members) * block.rows * (high - low)


class _TiledAttention(torch.autograd.Function):
    """Attention over a list of tiles, and its gradients with respect to q, k, v and both slopes."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: Tensor,
        right: Tensor,
        scale: float,
        masks: _Masks,
        tiles: list[_Tile],
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if masks.holes is not None:  # so that what lies in padding, NaN maybe, meets weights of 0 as 0
            k, v = (x.masked_fill(masks.holes[:, None, :, None], 0.0) for x in (k, v))
        falloff = _falloff(left, right, masks, dtype)
        out = torch.zeros(q.shape, dtype=q.dtype)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype)
        for tile in tiles:
            rows, keys, values = _rows(q, tile).flip(-2), _keys(k, q, tile), _keys(v, q, tile)
            bias = _bias(falloff, tile, masks).expand(*rows.shape[:3], tile.width)
            tile_out, tile_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows, keys, values, 0.0, False, attn_mask=bias, scale=scale
            )
            if masks.may_leave_rows_empty:
                tile_lse = tile_lse.masked_fill((bias == float("-inf")).all(dim=-1), float("-inf"))
            _rows(out, tile).copy_(tile_out.flip(-2))
            _rows(lse, tile).copy_(tile_lse.flip(-1))
        ctx.save_for_backward(q, k, v, left, right, out, lse)
        ctx.scale, ctx.masks, ctx.tiles = scale, masks, tiles
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, left, right, out, lse = ctx.saved_tensors
        gradients = _Gradients(q, k, v, left, right, out, lse, grad_out, grad_lse, ctx.scale, ctx.masks)
        in_parts = grad_lse is not None or ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        for tile in ctx.tiles:
            if in_parts or not _kernel_is_faster(tile, q.dtype):
                for piece in _pieces(tile, BACKWARD_PAIRS // (tile.rows * tile.width)):
                    gradients.add_in_parts(piece)
            else:
                for piece in _pieces(tile, BACKWARD_KEYS // tile.width):
                    gradients.add_by_kernel(piece)
        return *gradients.of_inputs(), None, None, None


def _kernel_is_faster(tile: _Tile, dtype: torch.dtype) -> bool:
    """Whether the fused backward kernel beats matrix products for a tile.

    It gives each lane to one thread, and cuts less than 192 queries into strips too narrow for half types.
    """
    lanes = max(tile.count, tile.heads.stop - tile.heads.start)
    return lanes >= torch.get_num_threads() and (dtype.itemsize > 2 or tile.rows > BLOCK_M)


class _Gradients:
    """Sums of the gradients of q, k, v and both slopes over tiles."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        scale: float,
        masks: _Masks,
    ) -> None:
        self.q, self.k, self.v, self.left, self.right, self.out = q, k, v, left, right, out
        self.dtype, self.scale, self.masks = lse.dtype, scale, masks
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        self.grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        self.grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse.isneginf(), 0.0)
        self.lse = lse.masked_fill(lse.isneginf(), float("inf"))  # rows without keys: exp(-inf) is 0, not NaN
        self.falloff = _falloff(left, right, masks, lse.dtype)
        self.of_q = torch.zeros(q.shape, dtype=q.dtype)
        self.of_k, self.of_v = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
        self.of_left, self.of_right = (torch.zeros(q.shape[:2], dtype=lse.dtype) for _ in range(2))

    def of_inputs(self) -> tuple[Tensor, ...]:
        """The gradients of q, k, v, left and right in their shapes and dtypes."""
        slopes = [
            (total.sum(dim=0) if slope.dim() == 1 else total).to(slope.dtype)
            for total, slope in ((self.of_left, self.left), (self.of_right, self.right))
        ]
        return self.of_q, self.of_k.to(self.k.dtype), self.of_v.to(self.v.dtype), *slopes

    def add_by_kernel(self, tile: _Tile) -> None:
        """Add a tile's gradients of q, k and v, by the kernel that belongs to the forward pass."""
        grad, q, out = (_rows(x, tile).flip(-2) for x in (self.grad_out, self.q, self.out))  # [1, lanes, rows, D]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            q,
            _keys(self.k, self.q, tile),
            _keys(self.v, self.q, tile),
            out,
            _rows(self.lse, tile).flip(-1),
            0.0,
            False,
            attn_mask=self._bias(tile),
            scale=self.scale,
        )
        _rows(self.of_q, tile).copy_(grads[0].flip(-2))
        self._add_to_keys(tile, grads[1][0], grads[2][0])

    def add_in_parts(self, tile: _Tile) -> None:
        """Add a tile's gradients, those of the slopes too, by matrix products in float32 or float64."""
        rows, grad, out = (self._lanes(x, tile) for x in (self.q, self.grad_out, self.out))  # [lanes, rows, D]
        lse, grad_lse = (self._lanes(x[..., None], tile) for x in (self.lse, self.grad_lse))  # [lanes, rows, 1]
        rows *= self.scale
        keys, values = (_keys(x, self.q, tile)[0].to(self.dtype) for x in (self.k, self.v))  # [lanes, width, D]
        weights = torch.baddbmm(self._bias(tile)[0], rows, keys.transpose(1, 2))  # [lanes, rows, width]
        weights.sub_(lse).exp_()
        offset = grad_lse - (grad * out).sum(dim=-1, keepdim=True)
        grad_scores = torch.baddbmm(offset, grad, values.transpose(1, 2)).mul_(weights)
        _rows(self.of_q, tile).copy_((grad_scores @ keys).mul_(self.scale).flip(-2)[None])
        self._add_to_keys(tile, grad_scores.transpose(1, 2) @ rows, weights.transpose(1, 2) @ grad)
        if self.left.requires_grad or self.right.requires_grad:
            # Each row of grad_scores sums to grad_lse, but for rounding in `out`, which distances would magnify.
            excess = grad_scores.sum(dim=-1, keepdim=True) - grad_lse
            grad_scores.addcmul_(weights, excess, value=-1)
            distances = _distances(tile, self.masks, self.dtype)
            for total, distance in zip((self.of_left, self.of_right), distances, strict=True):
                by_lane = (grad_scores * distance).sum(dim=(-2, -1))
                total[tile.batch, tile.heads] -= by_lane.sum() if tile.count > 1 else by_lane

    def _bias(self, tile: _Tile) -> Tensor:
        return _bias(self.falloff, tile, self.masks).expand(*_rows(self.lse, tile).shape, tile.width)

    def _lanes(self, x: Tensor, tile: _Tile) -> Tensor:
        """Copy the queries of a tile of one sequence to (lanes, rows, n), rows in reverse."""
        return _rows(x, tile)[0].to(self.dtype).flip(-2)

    def _add_to_keys(self, tile: _Tile, of_k: Tensor, of_v: Tensor) -> None:
        """Add the gradients (lanes, width, D) of a tile's keys and values to the totals."""
        for total, grad in ((self.of_k, of_k), (self.of_v, of_v)):
            target = total[tile.batch, _kv_heads(total, self.q, tile)][0]  # [kv heads, Tk, D]
            if tile.count == 1:
                target = target[:, tile.key : tile.key + tile.width]
                target += grad.sum(dim=0) if len(target) < len(grad) else grad
                continue
            # Windows overlap, but pieces of them that are `rows` wide or less do not.
            for start in range(0, tile.width, tile.rows):
                piece = grad[:, start : start + tile.rows]
                first = tile.key + start
                past = first + (tile.count - 1) * tile.rows + piece.shape[1]
                target[0, first:past].unfold(0, piece.shape[1], tile.rows).transpose(-2, -1).add_(piece)


def _all_distances(masks: _Masks, dtype: torch.dtype) -> Tensor:
    """Every distance from a query to a key: Tk - 1, Tk - 2, ..., 1 - Tq."""
    return masks.key_length - 1 - torch.arange(max(0, masks.key_length + masks.query_length - 1), dtype=dtype)


def _falloff(left: Tensor, right: Tensor, masks: _Masks, dtype: torch.dtype) -> Tensor:
    """The bias at each distance of `_all_distances`, -inf where causality or the window hide: (1 or B, H, n)."""
    distance = _all_distances(masks, dtype)
    left, right = (m.detach().to(dtype)[..., None] for m in (left, right))
    bias = -(left * distance.clamp(min=0) + right * (-distance).clamp(min=0))  # [(B,) H, n]
    if masks.causal:
        bias.masked_fill_(distance < 0, float("-inf"))
    if masks.window_size is not None:
        bias.masked_fill_(distance.abs() >= masks.window_size, float("-inf"))
    return bias if bias.dim() == 3 else bias[None]


def _diagonals(vector: Tensor, tile: _Tile, masks: _Masks) -> Tensor:
    """View a vector over `_all_distances` as a tile with its rows in reverse: (..., rows, width)."""
    last_position = tile.row + tile.rows - 1 + masks.offset
    start = masks.key_length - 1 - (last_position - tile.key)
    return vector[..., start : start + tile.rows + tile.width - 1].unfold(-1, tile.width, 1)


def _bias(falloff: Tensor, tile: _Tile, masks: _Masks) -> Tensor:
    """The bias of a tile, (1 or B, 1 or lanes, rows, width), its rows in reverse; a view unless padding has holes."""
    by_batch = falloff[tile.batch] if falloff.shape[0] > 1 else falloff
    bias = _diagonals(by_batch[:, tile.heads], tile, masks)
    if masks.holes is None:
        return bias
    past = tile.key + tile.width + (tile.count - 1) * tile.rows
    hidden = masks.holes[tile.batch, tile.key : past].unfold(-1, tile.width, tile.rows)  # [B, count, width]
    return bias.masked_fill(hidden[:, :, None], float("-inf"))


def _distances(tile: _Tile, masks: _Masks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Distances to past and to future keys in a tile, rows in reverse, 0 for the other kind: 2 x (rows, width)."""
    tile_distance = _diagonals(_all_distances(masks, dtype), tile, masks)
    return tile_distance.clamp(min=0), (-tile_distance).clamp(min=0)


def _rows(x: Tensor, tile: _Tile) -> Tensor:
    """View the queries of a tile in x (B, H, Tq, ...): (B, lanes, rows, ...), lanes being its windows or its heads."""
    x = x[tile.batch, tile.heads, tile.row : tile.row + tile.count * tile.rows]
    return x[:, 0].unflatten(1, (tile.count, tile.rows)) if tile.count > 1 else x


def _kv_heads(x: Tensor, q: Tensor, tile: _Tile) -> slice:
    """The heads of k that the query heads of a tile read: as many, or one for all."""
    group = q.shape[1] // x.shape[1]
    return slice(tile.heads.start // group, (tile.heads.stop - 1) // group + 1)


def _keys(x: Tensor, q: Tensor, tile: _Tile) -> Tensor:
    """View the keys of a tile in x (B, Hkv, Tk, D): (B, lanes, width, D)."""
    past = tile.key + tile.width + (tile.count - 1) * tile.rows
    x = x[tile.batch, _kv_heads(x, q, tile), tile.key : past]
    if tile.count > 1:
        return x[:, 0].unfold(1, tile.width, tile.rows).transpose(-2, -1)
    return x.expand(-1, tile.heads.stop - tile.heads.start, -1, -1)


def _pieces(tile: _Tile, lanes: int) -> Iterator[_Tile]:
    """Cut a tile into ones of one sequence and at most so many lanes, but at least one."""
    lanes = max(lanes, 1)
    for sequence in range(tile.batch.start, tile.batch.stop):
        one = replace(tile, batch=slice(sequence, sequence + 1))
        if tile.count == 1:
            for head in range(tile.heads.start, tile.heads.stop, lanes):
                yield replace(one, heads=slice(head, min(head + lanes, tile.heads.stop)))
        else:
            for first in range(0, tile.count, lanes):
                step = first * tile.rows
                yield replace(one, row=tile.row + step, key=tile.key + step, count=min(lanes, tile.count - first))
