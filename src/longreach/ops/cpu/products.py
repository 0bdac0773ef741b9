"""Fast ALiBi attention on the CPU: matrix products over the key ranges that `reach` leaves.

Query blocks whose ranges are alike become one batch, their keys overlapping windows of k and v; `plan` decides on that
and `views` finds the bias of each tile at no cost. Weights are exponentials by base 2 of scores that hold log2 e from
the start. The backward pass recomputes them from the LSE, on the narrower ranges that the forward pass found to matter,
and adds gradients up in one fixed order, so that two runs agree to the last bit. Half types are computed in float32, or
by `kernel` where that is faster, as few queries are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.cpu import onednn
from longreach.ops.cpu.kernel import FewQueries, ManyQueries
from longreach.ops.cpu.memory import keep_memory_of_tiles
from longreach.ops.cpu.plan import (
    ALIGNED,
    BLOCK_M,
    BLOCK_N,
    Cost,
    HostVisibility,
    Ranges,
    Tile,
    bounded_ranges,
    by_key_head,
    heads_worth_bounding,
    kernel_cost,
    pieces,
    plan,
    product_cost,
    reading_cost,
    strips,
)
from longreach.ops.cpu.views import bias_of, distances, falloff, keys_of, kv_heads_of, lanes_of, rows_of
from longreach.ops.cpu.workers import Job, can_share_out, share_out
from longreach.ops.lse_bound import FEW_QUERIES
from longreach.ops.visibility import Visibility

LOG2_E = math.log2(math.e)
"""To exponentiate by base 2: exp is a hundred times slower where its result underflows."""

ALIKE_ROWS = 16
"""Rows and columns from which on MKL adds up each element of a product in one order."""

ALIKE_DIM = 192
"""Longest rows whose dot products MKL adds up in one go, as oneDNN does."""

PRODUCTS_PAIRS = 2**20
"""Pairs of a query and a key of a head from which on products are faster than the flash kernel: at 512 tokens and D 64
they take 1.03 to 1.10 times as long, at 1,024 0.93 to 1.10 and at 2,048 0.76."""

PRODUCTS_DIM = 64
"""D from which on they are, as what they take beside multiplying is the same for any: with 32 at 512 to 8,192 tokens
they take 1.07 to 1.33 times as long."""

SHARED_PAIRS = 2**20
"""Pairs of a query and a key of a head and document from which on heads are shared out among threads, at 1,024 tokens.
Beside one busy process on two cores that takes a third to three quarters off both passes, and nothing is lost where
nothing else runs. For 512 tokens a pass would take up to twice as long, as threads wait for Python's lock."""

BOUND_BY_KERNEL = 2**18
"""Work of finding any ranges at all, some hundred small operations, in pairs of a query and a key that the flash kernel
would compute instead: it gains 6 to 9% at 1,024 tokens and 20% at 1,536 on AVX2."""

BOUND_BY_PRODUCTS = 8 * 2**20 if onednn.IS_FAST else 2**20
"""That work in pairs of matrix products, which oneDNN's are done with sooner, and which lose speed where tiles are
narrow: on AVX-512, to bound what the kernel would takes 20 to 40% more time at 1,024 tokens, up to 8% at 2,048."""

FOUND_ALONE = 4096
"""Queries up to which one thread finds the ranges of heads that are shared out, in the same region: some hundred small
operations, which are no faster by several threads, and beside a busy process many times as slow."""


class Attended(NamedTuple):
    """What the forward pass returns, and all but its LSE to the backward pass."""

    out: Tensor
    """(B, H, Tq, D) in the dtype of q."""
    lse: Tensor
    """(B, H, Tq) float32, or float64 where q is."""
    peak: Tensor
    """Likewise: each row's largest score by base 2, inf for rows that see no key; empty where no gradient is wanted."""
    total: Tensor
    """Likewise: the sum of weights relative to that, 0 for rows that see no key."""
    low: Tensor
    """(B, H, ceil(Tq / BLOCK_M)) int32: the first key that the backward pass needs; empty likewise."""
    high: Tensor
    """Likewise: one past the last."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: tuple[Tensor, Tensor],
    visibility: Visibility,
    key_norms: Tensor | None,
    *,
    scale: float,
    tolerance: float,
    learns: bool,
) -> Attended:
    """The forward pass, arguments as in `longreach.attention`; `learns` is whether a backward pass may come."""
    keep_memory_of_tiles()
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    # Results lie in memory as inputs do, so that what a model's projections made need not be put in order again.
    out = torch.empty_like(q)
    nothing = lse.new_empty(0), lse.new_empty(0), *(q.new_empty(0, dtype=torch.int32) for _ in range(2))
    seen = HostVisibility.read(visibility)
    few = seen.query_length < FEW_QUERIES
    by_products = learns or (not few and _products_are_faster(q, k))
    per_call = BOUND_BY_PRODUCTS if by_products else BOUND_BY_KERNEL
    worth = heads_worth_bounding(q, k, *slopes, seen, tolerance, key_norms, per_call)
    bound = partial(bounded_ranges, q, k, slopes, seen, key_norms, scale, tolerance, worth)
    q, k, v = _readable(q, k, v, seen)
    if seen.may_hide_all_keys:
        out.zero_()
        lse.fill_(float("-inf"))
    if not by_products:
        tiles = (FewQueries if few else ManyQueries)(q, k, v, *slopes, out, lse, scale, seen)
        _compute(tiles.attend, q, k, seen, worth, bound, reading_cost if few else kernel_cost)
        return Attended(out, lse, *nothing)
    peak, total = torch.full_like(lse, float("inf")), torch.zeros_like(lse)
    products = _Products(q, k, v, *slopes, scale, seen)
    found = _FoundRanges(q, seen, tolerance) if learns else None

    def compute(tile: Tile) -> None:
        for piece in pieces(tile):
            products.attend(piece, out, peak, total, found)

    _compute(compute, q, k, seen, worth, bound, product_cost)
    torch.add(total.log2(), peak.masked_fill(total == 0, 0.0), out=lse).mul_(1 / LOG2_E)
    return Attended(out, lse, *nothing) if found is None else Attended(out, lse, peak, total, *found.by_block())


def _compute(
    compute: Callable[[Tile], None],
    q: Tensor,
    k: Tensor,
    visibility: HostVisibility,
    bounded: slice,
    bound: Callable[[], Ranges],
    cost: Cost,
    *,
    adds_to_keys: bool = False,
) -> None:
    """Compute all tiles that cover what is needed, in their order or, where sequences are long, by several threads.

    What bounded heads need is what `bound` says, of others all that is visible: threads begin with these while one of
    them finds the former. Tiles that add to the gradients of one key head are one thread's, in their order.
    """
    group = q.shape[1] // k.shape[1]
    pairs = q.shape[2] * k.shape[2] // (len(visibility.documents) - 1) ** 2  # of a document of the mean length
    count = q.shape[0] * k.shape[1]
    apart = q.shape[2] >= FEW_QUERIES and pairs >= SHARED_PAIRS and can_share_out(count)
    heads = range(q.shape[1])

    def tiles(heads: Sequence[int], ranges: Ranges) -> Iterator[Tile]:
        return plan(q.shape, k.shape, heads, visibility, ranges, cost, apart=apart)

    def each(some: Iterable[Tile]) -> None:
        for tile in some:
            compute(tile)

    def jobs(heads: Sequence[int], ranges: Ranges) -> list[Job]:
        parts = by_key_head(tiles(heads, ranges), group) if adds_to_keys else [[tile] for tile in tiles(heads, ranges)]
        parts.sort(key=lambda part: -sum(tile.pairs for tile in part))  # the most work first
        return [partial(each, part) for part in parts]

    if not apart:
        each(tiles(heads, bound()))
    elif q.shape[2] > FOUND_ALONE:
        share_out(jobs(heads, bound()), list, count)
    else:
        others = [*heads[: bounded.start], *heads[bounded.stop :]]
        share_out(jobs(others, {}), lambda: jobs(heads[bounded], bound()), count)


def _products_are_faster(q: Tensor, k: Tensor) -> bool:
    """Than PyTorch's flash kernel, where both would do."""
    return onednn.IS_FAST and q.shape[2] * k.shape[2] >= PRODUCTS_PAIRS and q.shape[3] >= PRODUCTS_DIM


def differentiate(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: tuple[Tensor, Tensor],
    visibility: Visibility,
    attended: Attended,
    *,
    scale: float,
    slopes_learn: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and both slopes, of those zeros unless `slopes_learn`."""
    seen = HostVisibility.read(visibility)
    products = _Products(*_readable(q, k, v, seen), *slopes, scale, seen)
    gradients = _Gradients(products, (q, k, v), attended, grad_out, grad_lse, slopes_learn)

    def compute(tile: Tile) -> None:
        for piece in pieces(tile):
            gradients.add(piece)

    heads = slice(0, q.shape[1])
    ends_of_head = (x.transpose(0, 1).tolist() for x in (attended.low, attended.high))
    ranges = dict(enumerate(zip(*ends_of_head, strict=True)))
    _compute(compute, q, k, seen, heads, lambda: ranges, product_cost, adds_to_keys=True)
    of_slopes = (
        (sums.sum(dim=0) if slope.dim() == 1 else sums).to(slope.dtype)
        for sums, slope in zip((gradients.of_left, gradients.of_right), slopes, strict=True)
    )
    return (*(sums.to(q.dtype) for sums in (gradients.of_q, gradients.of_k, gradients.of_v)), *of_slopes)


def _readable(q: Tensor, k: Tensor, v: Tensor, visibility: HostVisibility) -> tuple[Tensor, Tensor, Tensor]:
    """As tiles read them: rows dense in memory, and zeros in holes, so that NaN there meets weights of 0 as 0."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if visibility.holes is not None:
        k, v = (x.masked_fill(visibility.holes[:, None, :, None], 0.0) for x in (k, v))
    return q, k, v


def _dots(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a b^T + added, of a (lanes, M, D), b (lanes, N, D) and `added` (lanes, 1, N), each dot product rounded alike.

    Whatever rows are beside them, and whether a or b comes first: what is subtracted from a score or from dP is another
    one of these, and what is equal is to cancel. MKL adds up otherwise where there are few rows or columns, and with
    what is added, or than oneDNN, where rows are long.
    """
    rows, columns = a.shape[1], b.shape[1]
    if min(rows, columns) < ALIKE_ROWS:
        a, b = (F.pad(x, (0, 0, 0, max(0, ALIKE_ROWS - x.shape[1]))) for x in (a, b))
        added = None if added is None else F.pad(added, (0, b.shape[1] - columns))
    if a.shape[2] <= ALIKE_DIM:
        return _product(a, b, added)[:, :rows, :columns]
    product = torch.bmm(a, b.transpose(1, 2))
    return (product if added is None else product.add_(added))[:, :rows, :columns]


def _own_dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row of a and the same row of b, (lanes, 1, rows), rounded as `_dots` rounds it."""
    lanes, rows = a.shape[:2]
    a, b = (F.pad(x, (0, 0, 0, -rows % ALIKE_ROWS)).unflatten(1, (-1, ALIKE_ROWS)).flatten(0, 1) for x in (a, b))
    return torch.bmm(a, b.transpose(1, 2)).diagonal(dim1=1, dim2=2).reshape(lanes, 1, -1)[..., :rows]


def _product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a b^T + added for each lane, of a (lanes, M, K), b (lanes, N, K) and `added` (lanes, 1, N).

    b, or its transpose, is dense in memory.
    """
    aligned = a.shape[1] % ALIGNED == 0 and b.shape[1] % ALIGNED == 0
    if onednn.IS_FAST and aligned and len(a) == 1 and a.dtype == torch.float32:
        return onednn.product(a[0], b[0], None if added is None else added[0, 0])[None]
    b = b.transpose(1, 2)
    return torch.bmm(a, b) if added is None else torch.baddbmm(added, a, b)


class _Products:
    """Attention over tiles of one sequence by matrix products, in float32 or, for float64 inputs, in float64."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, left: Tensor, right: Tensor, scale: float, visibility: HostVisibility
    ) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = (x.to(self.dtype) for x in (q, k, v))  # once, for tiles overlap
        self.scale, self.visibility, self.left, self.right = scale, visibility, left, right
        self.falloff = falloff(left, right, visibility, self.dtype) * LOG2_E

    def attend(self, tile: Tile, out: Tensor, peak: Tensor, total: Tensor, found: "_FoundRanges | None") -> None:
        """Write the output of the queries of a tile, their largest scores by base 2, and the sums of weights.

        These are relative to the power of the largest score. A strip of keys is computed at a time.
        """
        rows = self.rows(self.q, tile).mul_(self.scale * LOG2_E)
        sums = [self._attend_strip(rows, strip, found is not None) for strip in strips(tile)]
        highest, by_block, weighted = sums[0] if len(sums) == 1 else _joined(sums)
        sum_of_weights = by_block.sum(dim=-1, keepdim=True)
        for whole, part in ((peak, highest), (total, sum_of_weights)):
            rows_of(whole, tile).copy_(part.flip(1)[None, ..., 0])
        weighted.div_(sum_of_weights.clamp_(min=torch.finfo(self.dtype).tiny))  # a row that sees no key has a sum of 0
        rows_of(out, tile).copy_(weighted.flip(1)[None])
        if found is not None:
            found.note(tile, by_block, sum_of_weights)

    def _attend_strip(self, rows: Tensor, strip: Tile, in_blocks: bool) -> tuple[Tensor, ...]:
        """Largest score of each row by base 2; relative to its power, sums of weights and the sum of weighted values.

        The sums of weights are those of each block of BLOCK_N keys or, unless these are wanted, of the strip.
        """
        weights = _dots(rows, self.keys(self.k, strip)).add_(self.bias(strip))  # [lanes, rows, width]
        peak = weights.amax(dim=-1, keepdim=True)
        peak.clamp_(min=torch.finfo(self.dtype).min)  # where all keys are hidden: -inf - -inf is no number
        weights.sub_(peak).exp2_()
        weighted = _product(weights, self.keys(self.v, strip).transpose(1, 2))
        by_block = _block_sums(weights) if in_blocks else weights.sum(dim=-1, keepdim=True)
        return peak, by_block, weighted

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """The queries of a tile in x (B, H, Tq, n), copied and in reverse: (lanes, rows, n)."""
        return lanes_of(x, tile, self.dtype)

    def keys(self, x: Tensor, tile: Tile) -> Tensor:
        """The keys of a tile in x (B, Hkv, Tk, D), dense in memory: (lanes, width, D)."""
        return keys_of(x, self.q.shape[1], tile)[0].contiguous()

    def bias(self, tile: Tile) -> Tensor:
        """The bias of a tile by base 2, rows in reverse: (1 or lanes, rows, width)."""
        return bias_of(self.falloff, tile, self.visibility)[0]


def _block_sums(weights: Tensor) -> Tensor:
    """Sums (..., blocks) over blocks of BLOCK_N keys, the last of which may have fewer."""
    whole = weights.shape[-1] // BLOCK_N * BLOCK_N
    sums = weights[..., :whole].unflatten(-1, (-1, BLOCK_N)).sum(dim=-1)
    if whole == weights.shape[-1]:
        return sums
    return torch.cat((sums, weights[..., whole:].sum(dim=-1, keepdim=True)), dim=-1)


def _joined(sums: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `_attend_strip` says of several strips, as if they were one."""
    peaks, blocks, weighted = zip(*sums, strict=True)
    peak = torch.stack(peaks).amax(dim=0)
    shares = [block_peak.sub_(peak).exp2_() for block_peak in peaks]
    by_block = torch.cat([block.mul_(share) for block, share in zip(blocks, shares, strict=True)], dim=-1)
    return peak, by_block, torch.stack([x.mul_(share) for x, share in zip(weighted, shares, strict=True)]).sum(dim=0)


class _FoundRanges:
    """The keys that the backward pass needs: narrower ranges than bounds can prove, from the weights themselves.

    What the forward pass found to weigh `tolerance` at most, in blocks of keys at the far ends of each row, is left
    out (docs/reach.md).
    """

    def __init__(self, q: Tensor, visibility: HostVisibility, tolerance: float) -> None:
        self.causal = visibility.causal
        self.limit = tolerance * (1 - 2**-8) / (1 if visibility.causal else 2)  # less what sums of weights round by
        batch, num_heads, query_length = q.shape[:3]
        rows = -(-query_length // BLOCK_M) * BLOCK_M
        # Rows that no tile holds need no keys; visibility alone says where causal rows end.
        self.low = q.new_full((batch, num_heads, rows), visibility.key_length, dtype=torch.int32)
        self.high = torch.full_like(self.low, visibility.key_length if visibility.causal else 0)

    def note(self, tile: Tile, by_block: Tensor, total: Tensor) -> None:
        """Keep what the rows of a tile, in reverse, need by their weights in each block of keys and in total."""
        first: Any = tile.key
        if tile.windows > 1:
            first = tile.key + tile.rows * torch.arange(tile.windows, device=total.device)[:, None]
        limit = total * self.limit  # [lanes, rows, 1]
        below = (by_block.cumsum(dim=-1) <= limit).sum(dim=-1)  # [lanes, rows]
        rows_of(self.low, tile).copy_(below.mul_(BLOCK_N).add_(first).flip(1)[None])
        if not self.causal:
            above = (by_block.flip(-1).cumsum(dim=-1) <= limit).sum(dim=-1)
            past = (by_block.shape[-1] - above).mul_(BLOCK_N).add_(first)
            rows_of(self.high, tile).copy_(past.flip(1)[None])

    def by_block(self) -> tuple[Tensor, Tensor]:
        """First key and one past the last that any query of a block needs: each (B, H, blocks)."""
        low, high = (ends.unflatten(2, (-1, BLOCK_M)) for ends in (self.low, self.high))
        return low.amin(dim=-1), high.amax(dim=-1)


class _Gradients:
    """Sums of the gradients of q, k, v and both slopes over tiles."""

    def __init__(
        self,
        products: _Products,
        inputs: tuple[Tensor, Tensor, Tensor],
        attended: Attended,
        grad_out: Tensor,
        grad_lse: Tensor,
        slopes_learn: bool,
    ) -> None:
        self.products, self.out, self.grad_out, self.slopes_learn = products, attended.out, grad_out, slopes_learn
        self.peak, self.dtype = attended.peak, attended.peak.dtype
        empty = attended.total == 0  # rows that see no key
        self.grad_lse = grad_lse.masked_fill(empty, 0.0)
        self.share = attended.total.reciprocal().masked_fill_(empty, 0.0)
        # In memory as inputs lie, as for results of the forward pass; no tile holds rows that need no keys.
        self.of_q, self.of_k, self.of_v = (torch.zeros_like(x, dtype=self.dtype) for x in inputs)
        self.of_left, self.of_right = (self.peak.new_zeros(self.peak.shape[:2]) for _ in range(2))

    def add(self, tile: Tile) -> None:
        """Add the gradients of a tile, a strip of its keys at a time.

        Scores are held with keys as rows, so that the gradients of k and v are products of what lies in memory as
        it is needed.
        """
        products = self.products
        rows, grad, out = (products.rows(x, tile) for x in (products.q, self.grad_out, self.out))  # [lanes, rows, D]
        vectors = (self.peak, self.share, self.grad_lse)
        peak, share, grad_lse = (products.rows(x, tile)[:, None] for x in vectors)  # [lanes, 1, rows]
        # Weights are relative to the largest one: what they multiply is divided by their sum instead.
        grad.mul_(share.transpose(1, 2))
        offset = grad_lse * share - _own_dots(out, grad)
        scaled, scaled2 = rows * products.scale, rows * (products.scale * LOG2_E)
        of_rows = torch.zeros_like(rows).transpose(1, 2)  # [lanes, D, rows]
        moments = rows.new_zeros(5, *rows.shape[:2])
        for strip in strips(tile):
            keys = products.keys(products.k, strip)  # [lanes, width, D]
            weights = _dots(keys, scaled2)  # [lanes, width, rows]
            weights.add_(products.bias(strip).transpose(-2, -1)).sub_(peak).exp2_()
            grad_scores = _dots(products.keys(products.v, strip), grad, offset).mul_(weights)
            of_keys = _product(grad_scores, scaled.transpose(1, 2))
            self._add_to_keys(strip, of_keys, _product(weights, grad.transpose(1, 2)))
            of_rows += _product(keys.transpose(1, 2).contiguous(), grad_scores.transpose(1, 2))
            if self.slopes_learn:
                past, future = (x.T for x in distances(strip, products.visibility, self.dtype, rows.device))
                moments += _moments(weights, grad_scores, past, future)
        if self.slopes_learn:
            moments[3:].mul_(share[:, 0])
            self._add_to_slopes(tile, moments, grad_lse[:, 0])
        rows_of(self.of_q, tile).copy_(of_rows.mul_(products.scale).transpose(1, 2).flip(1)[None])

    def _add_to_slopes(self, tile: Tile, moments: Tensor, grad_lse: Tensor) -> None:
        """Add the gradients of the slopes, -sum_ij dS_ij d_ij over past or over future distances d.

        Each row of dS sums to the gradient of its LSE, but for rounding in `out`, which distances would magnify. So the
        excess of the sum, times P, is taken from dS.
        """
        row_sum, past, future, mean_past, mean_future = moments  # each [lanes, rows]
        excess = row_sum - grad_lse
        for total, rows in ((self.of_left, excess * mean_past - past), (self.of_right, excess * mean_future - future)):
            total[tile.batch, tile.heads] += rows.sum() if tile.windows > 1 else rows.sum(dim=-1)

    def _add_to_keys(self, tile: Tile, of_k: Tensor, of_v: Tensor) -> None:
        """Add the gradients (lanes, width, D) of a tile's keys and values to the totals."""
        for total, grad in ((self.of_k, of_k), (self.of_v, of_v)):
            target = total[tile.batch, kv_heads_of(total, self.out.shape[1], tile)][0]  # [kv heads, Tk, D]
            if tile.windows == 1:
                target = target[:, tile.key : tile.key + tile.width]
                target += grad.sum(dim=0) if len(target) < len(grad) else grad
                continue
            # Windows overlap, but pieces of them that are `rows` wide or less do not.
            for start in range(0, tile.width, tile.rows):
                piece = grad[:, start : start + tile.rows]
                first = tile.key + start
                past = first + (tile.windows - 1) * tile.rows + piece.shape[1]
                target[0, first:past].unfold(0, piece.shape[1], tile.rows).transpose(-2, -1).add_(piece)


def _moments(weights: Tensor, grad_scores: Tensor, past: Tensor, future: Tensor) -> Tensor:
    """Sums over keys, for each query, of dS, dS d and P d, with past and with future distances d: (5, lanes, rows)."""
    terms = (grad_scores, grad_scores * past, grad_scores * future, weights * past, weights * future)
    return torch.stack([x.sum(dim=1) for x in terms])
