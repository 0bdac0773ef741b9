"""Tiles by matrix products: scores, weights and gradients in memory, a strip of keys at a time.

Weights are exponentials by base 2 of scores that hold log2 e from the start, relative to the largest score of their
row. The backward pass makes them again, and rounds scores as the forward pass did (docs/attention.md, "Rounding"). Half
types are computed in float32.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.cpu import onednn
from longreach.ops.cpu.bounding import ends_to_leave_out
from longreach.ops.cpu.plan import ALIGNED, BLOCK_M, BLOCK_N, HostVisibility, Tile, strips
from longreach.ops.cpu.totals import Totals
from longreach.ops.cpu.views import bias_of, distances, falloff, keys_of, lanes_of, rows_of

LOG2_E = math.log2(math.e)
"""To exponentiate by base 2: exp is a hundred times slower where its result underflows."""

ALIKE_ROWS = 16
"""Rows and columns from which on MKL adds up each element of a product in one order."""

ALIKE_DIM = 192
"""Longest rows whose dot products MKL adds up in one go, as oneDNN does."""


def _dots(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a b^T + added, of a (lanes, M, D), b (lanes, N, D) and `added` (lanes, 1, N), each dot product rounded alike.

    Whatever rows are beside them, and whether a or b comes first: what is subtracted from a score or from dP is another
    one of these, and what is equal is to cancel. MKL adds up otherwise where there are few rows or columns, with what
    is added where D is 1, and with that, or than oneDNN, where rows are long. Where it has several orders anyhow,
    products are made in float64 and rounded, which hides them.
    """
    if a.dtype == torch.float32 and not _adds_up_alike():
        rounded = torch.bmm(a.double(), b.double().transpose(1, 2)).float()
        return rounded if added is None else rounded.add_(added)
    rows, columns = a.shape[1], b.shape[1]
    if min(rows, columns) < ALIKE_ROWS:
        a, b = (F.pad(x, (0, 0, 0, max(0, ALIKE_ROWS - x.shape[1]))) for x in (a, b))
        added = None if added is None else F.pad(added, (0, b.shape[1] - columns))
    if 1 < a.shape[2] <= ALIKE_DIM:
        return _product(a, b, added)[:, :rows, :columns]
    product = torch.bmm(a, b.transpose(1, 2))
    return (product if added is None else product.add_(added))[:, :rows, :columns]


def _own_dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row of a and the same row of b, (lanes, 1, rows), rounded as `_dots` rounds it."""
    lanes, rows = a.shape[:2]
    if a.dtype == torch.float32 and not _adds_up_alike():
        return (a.double() * b.double()).sum(dim=-1).float()[:, None]
    a, b = (F.pad(x, (0, 0, 0, -rows % ALIKE_ROWS)).unflatten(1, (-1, ALIKE_ROWS)).flatten(0, 1) for x in (a, b))
    return torch.bmm(a, b.transpose(1, 2)).diagonal(dim1=1, dim2=2).reshape(lanes, 1, -1)[..., :rows]


@cache
def _adds_up_alike() -> bool:
    """Whether this machine's float32 products are rounded alike whatever rows are beside them, and in either order.

    Those of MKL are on AVX-512, and on AMD's AVX2; on Intel's AVX2 they are not.
    """
    numbers = torch.arange(3.0, 64 * 576 + 3, dtype=torch.float32, device="cpu").mul_(0.7).sin_().view(1, 576, 64)
    a, b = numbers.split([256, 320], dim=1)
    whole = torch.bmm(a, b.transpose(1, 2))
    return all(
        torch.equal(product, whole[:, :rows, :columns])
        for rows, columns in ((ALIKE_ROWS, 256), (128, 64), (128, 320), (256, 192))
        for product in (
            torch.bmm(a[:, :rows], b[:, :columns].transpose(1, 2)),
            torch.bmm(b[:, :columns], a[:, :rows].transpose(1, 2)).transpose(1, 2),
        )
    )


def _product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a b^T + added for each lane, of a (lanes, M, K), b (lanes, N, K) and `added` (lanes, 1, N).

    b, or its transpose, is dense in memory.
    """
    aligned = a.shape[1] % ALIGNED == 0 and b.shape[1] % ALIGNED == 0
    if onednn.IS_FAST and aligned and len(a) == 1 and a.dtype == torch.float32:
        return onednn.product(a[0], b[0], None if added is None else added[0, 0])[None]
    b = b.transpose(1, 2)
    return torch.bmm(a, b) if added is None else torch.baddbmm(added, a, b)


class Products:
    """Attention over tiles of one sequence by matrix products, in float32 or, for float64 inputs, in float64."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, left: Tensor, right: Tensor, scale: float, visibility: HostVisibility
    ) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = (x.to(self.dtype) for x in (q, k, v))  # once, for tiles overlap
        self.scale, self.visibility, self.left, self.right = scale, visibility, left, right
        self.falloff = falloff(left, right, visibility, self.dtype) * LOG2_E

    def attend(self, tile: Tile, out: Tensor, peak: Tensor, total: Tensor, found: "FoundRanges | None") -> None:
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


class FoundRanges:
    """The keys that the backward pass needs: narrower ranges than bounds can prove, from the weights themselves.

    What the forward pass found to weigh `tolerance` at most, in blocks of keys at the far ends of each row, is left
    out (docs/reach.md).
    """

    def __init__(self, q: Tensor, visibility: HostVisibility, tolerance: float) -> None:
        self.causal = visibility.causal
        self.limit = ends_to_leave_out(tolerance, visibility)
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


class ProductGradients:
    """The gradients of tiles, with those of both slopes."""

    def __init__(
        self,
        products: Products,
        out: Tensor,
        peak: Tensor,
        total: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor,
        totals: Totals,
        slopes_learn: bool,
    ) -> None:
        self.products, self.out, self.grad_out, self.slopes_learn = products, out, grad_out, slopes_learn
        self.peak, self.dtype, self.totals = peak, peak.dtype, totals
        empty = total == 0  # rows that see no key
        self.grad_lse = grad_lse.masked_fill(empty, 0.0)
        self.share = total.reciprocal().masked_fill_(empty, 0.0)
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
            self.totals.add_to_keys(strip, of_keys[None], _product(weights, grad.transpose(1, 2))[None])
            of_rows += _product(keys.transpose(1, 2).contiguous(), grad_scores.transpose(1, 2))
            if self.slopes_learn:
                past, future = (x.T for x in distances(strip, products.visibility, self.dtype, rows.device))
                moments += _moments(weights, grad_scores, past, future)
        if self.slopes_learn:
            moments[3:].mul_(share[:, 0])
            self._add_to_slopes(tile, moments, grad_lse[:, 0])
        rows_of(self.totals.of_q, tile).copy_(of_rows.mul_(products.scale).transpose(1, 2).flip(1)[None])

    def _add_to_slopes(self, tile: Tile, moments: Tensor, grad_lse: Tensor) -> None:
        """Add the gradients of the slopes, -sum_ij dS_ij d_ij over past or over future distances d.

        Each row of dS sums to the gradient of its LSE, but for rounding in `out`, which distances would magnify. So the
        excess of the sum, times P, is taken from dS.
        """
        row_sum, past, future, mean_past, mean_future = moments  # each [lanes, rows]
        excess = row_sum - grad_lse
        for total, rows in ((self.of_left, excess * mean_past - past), (self.of_right, excess * mean_future - future)):
            total[tile.batch, tile.heads] += rows.sum() if tile.windows > 1 else rows.sum(dim=-1)


def _moments(weights: Tensor, grad_scores: Tensor, past: Tensor, future: Tensor) -> Tensor:
    """Sums over keys, for each query, of dS, dS d and P d, with past and with future distances d: (5, lanes, rows)."""
    terms = (grad_scores, grad_scores * past, grad_scores * future, weights * past, weights * future)
    return torch.stack([x.sum(dim=1) for x in terms])
