"""Fast ALiBi attention on the CPU: PyTorch's own kernels, run on the key ranges that `reach` leaves.

The bias of a tile depends on distances alone, and distances are constant along diagonals. With the query rows of a
tile in reverse order they are constant along antidiagonals: entry (a, c) of the bias is number a + c of one vector per
head. So the bias of any tile is a view of that vector, with strides (1, 1): it costs no memory and stays in the first
level of cache. Query blocks whose ranges are alike become one batch, their keys overlapping windows of k and v.

The forward pass runs each such batch through the flash attention that `scaled_dot_product_attention` uses on the CPU,
called directly because only that returns the LSE. The backward pass recomputes the weights from the LSE, by that
kernel's own backward pass or, where the slopes or the LSE take part or it would be slower, by matrix products. Either
way gradients are added up in one fixed order, so that two runs agree to the last bit.

Heads of half precision that need all keys are computed whole: there the bias may be made from key positions, and then
the kernel can skip what causality hides.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reach import default_tolerance, key_ranges
from .tiles import (
    BACKWARD,
    BLOCK_M,
    BLOCK_N,
    FORWARD,
    IN_PARTS,
    Masks,
    Ranges,
    Tile,
    heads_worth_bounding,
    pieces,
    plan,
)

LOG2_E = math.log2(math.e)
"""To exponentiate by base 2: exp is a hundred times slower where its result underflows."""

BACKWARD_PAIRS = 2**19
"""Pairs of a query and a key in one step of a backward pass in parts, whose weights are to stay in the cache."""

BACKWARD_KEYS = 2**15
"""Keys, those of overlapping windows counted each, in one step of a backward pass by the fused kernel."""

SQUARE_KEYS = 2**14
"""Largest square tile: up to here the half types hold 256 a + b exactly."""

SQUARE_BIAS = 2.0**10
"""Largest bias in a square tile, where float32 errs by 2^-14, little against half precision."""


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
    masks = Masks.of(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens)
    worth = heads_worth_bounding(q, k, left, right, masks, tolerance, key_norms)
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
    return _TiledAttention.apply(q, k, v, left, right, scale, masks, low, high)


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
        masks: Masks,
        low: list[Ranges],
        high: list[Ranges],
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if masks.holes is not None:  # so that what lies in padding, NaN maybe, meets weights of 0 as 0
            k, v = (x.masked_fill(masks.holes[:, None, :, None], 0.0) for x in (k, v))
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3], dtype=dtype)
        if masks.may_hide_all_keys:
            out.zero_()
            lse.fill_(float("-inf"))
        half = q.dtype.itemsize == 2
        square = half and k.shape[2] <= SQUARE_KEYS and bool((left * k.shape[2] <= SQUARE_BIAS).all())
        falloff = None
        for tile in plan(q.shape, k.shape, masks, low, high, FORWARD[half], square=square):
            if tile.square:
                _attend_square(q, k, v, left, scale, tile, out, lse)
                continue
            if falloff is None:
                falloff = _falloff(left, right, masks, dtype)
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
        ctx.scale, ctx.masks, ctx.low, ctx.high = scale, masks, low, high
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, left, right, out, lse = ctx.saved_tensors
        gradients = _Gradients(q, k, v, left, right, out, lse, grad_out, grad_lse, ctx.scale, ctx.masks)
        in_parts = grad_lse is not None or ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        costs = IN_PARTS if in_parts else BACKWARD[q.dtype.itemsize == 2]
        for tile in plan(q.shape, k.shape, ctx.masks, ctx.low, ctx.high, costs):
            if in_parts or not _kernel_is_faster(tile, q.dtype):
                for piece in pieces(tile, BACKWARD_PAIRS // (tile.rows * tile.width)):
                    gradients.add_in_parts(piece)
            else:
                threads = torch.get_num_threads()
                for piece in pieces(tile, max(1, BACKWARD_KEYS // (tile.width * threads)) * threads):
                    gradients.add_by_kernel(piece)
        return *gradients.of_inputs(), None, None, None, None


def _attend_square(
    q: Tensor, k: Tensor, v: Tensor, left: Tensor, scale: float, tile: Tile, out: Tensor, lse: Tensor
) -> None:
    """Attend within a square tile of half precision, p being its first position.

    The bias is -m (i - p) + m (j - p). The first term alters the LSE alone. The second becomes products of 8 more
    entries of q and k: (j - p) is split into 256 a + b and m into three parts, all exact in half precision.
    """
    position, dtype = torch.arange(tile.width), q.dtype
    slope = left.detach().to(torch.float32).expand(lse.shape[:2])[tile.batch, tile.heads, None]  # [B, heads, 1]
    parts: list[Tensor] = []
    for _ in range(3):
        parts.append((slope / scale - sum(parts)).to(dtype).float())
    of_q = F.pad(torch.cat(parts, dim=-1).repeat_interleave(2, dim=-1), (0, 2)).to(dtype)  # [B, heads, 8]
    of_k = F.pad(torch.stack([position // 256 * 256, position % 256], dim=-1).repeat(1, 3), (0, 2)).to(dtype)
    rows, keys, values = _rows(q, tile), _keys(k, q, tile), _keys(v, q, tile)
    tile_out, tile_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        torch.cat([rows, of_q[:, :, None].expand(*rows.shape[:3], -1)], dim=-1),
        torch.cat([keys, of_k.expand(*keys.shape[:3], -1)], dim=-1),
        F.pad(values, (0, 8)),
        0.0,
        True,
        scale=scale,
    )
    _rows(out, tile).copy_(tile_out[..., : q.shape[3]])
    _rows(lse, tile).copy_(tile_lse - slope * position)


def _kernel_is_faster(tile: Tile, dtype: torch.dtype) -> bool:
    """Whether the fused backward kernel beats matrix products for a tile; it gives each lane to one thread."""
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
        masks: Masks,
    ) -> None:
        self.q, self.k, self.v, self.left, self.right, self.out = q, k, v, left, right, out
        self.dtype, self.scale, self.masks = lse.dtype, scale, masks
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        self.grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        self.grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse.isneginf(), 0.0)
        self.lse = lse.masked_fill(lse.isneginf(), float("inf"))  # rows without keys: exp(-inf) is 0, not NaN
        self.falloff = _falloff(left, right, masks, lse.dtype)
        self.of_q = (torch.zeros if masks.may_hide_all_keys else torch.empty)(q.shape, dtype=q.dtype)
        self.of_k, self.of_v = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
        self.of_left, self.of_right = (torch.zeros(q.shape[:2], dtype=lse.dtype) for _ in range(2))

    def of_inputs(self) -> tuple[Tensor, ...]:
        """The gradients of q, k, v, left and right in their shapes and dtypes."""
        slopes = [
            (total.sum(dim=0) if slope.dim() == 1 else total).to(slope.dtype)
            for total, slope in ((self.of_left, self.left), (self.of_right, self.right))
        ]
        return self.of_q, self.of_k.to(self.k.dtype), self.of_v.to(self.v.dtype), *slopes

    def add_by_kernel(self, tile: Tile) -> None:
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

    def add_in_parts(self, tile: Tile) -> None:
        """Add a tile's gradients, those of the slopes too, by matrix products in float32 or float64."""
        rows, grad, out = (self._lanes(x, tile) for x in (self.q, self.grad_out, self.out))  # [lanes, rows, D]
        lse, grad_lse = (self._lanes(x[..., None], tile) for x in (self.lse, self.grad_lse))  # [lanes, rows, 1]
        rows *= self.scale
        keys, values = (_keys(x, self.q, tile)[0].to(self.dtype) for x in (self.k, self.v))  # [lanes, width, D]
        weights = torch.baddbmm(self._bias(tile)[0], rows, keys.transpose(1, 2))  # [lanes, rows, width]
        weights.sub_(lse).mul_(LOG2_E).exp2_()
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

    def _bias(self, tile: Tile) -> Tensor:
        return _bias(self.falloff, tile, self.masks).expand(*_rows(self.lse, tile).shape, tile.width)

    def _lanes(self, x: Tensor, tile: Tile) -> Tensor:
        """Copy the queries of a tile of one sequence to (lanes, rows, n), rows in reverse."""
        return _rows(x, tile)[0].to(self.dtype).flip(-2)

    def _add_to_keys(self, tile: Tile, of_k: Tensor, of_v: Tensor) -> None:
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


def _all_distances(masks: Masks, dtype: torch.dtype) -> Tensor:
    """Every distance from a query to a key: Tk - 1, Tk - 2, ..., 1 - Tq."""
    return masks.key_length - 1 - torch.arange(max(0, masks.key_length + masks.query_length - 1), dtype=dtype)


def _falloff(left: Tensor, right: Tensor, masks: Masks, dtype: torch.dtype) -> Tensor:
    """The bias at each distance of `_all_distances`, -inf where causality or the window hide: (1 or B, H, n)."""
    distance = _all_distances(masks, dtype)
    left, right = (m.detach().to(dtype)[..., None] for m in (left, right))
    bias = -(left * distance.clamp(min=0) + right * (-distance).clamp(min=0))  # [(B,) H, n]
    if masks.causal:
        bias.masked_fill_(distance < 0, float("-inf"))
    if masks.window_size is not None:
        bias.masked_fill_(distance.abs() >= masks.window_size, float("-inf"))
    return bias if bias.dim() == 3 else bias[None]


def _diagonals(vector: Tensor, tile: Tile, masks: Masks) -> Tensor:
    """View a vector over `_all_distances` as a tile with its rows in reverse: (..., rows, width)."""
    last_position = tile.row + tile.rows - 1 + masks.offset
    start = masks.key_length - 1 - (last_position - tile.key)
    return vector[..., start : start + tile.rows + tile.width - 1].unfold(-1, tile.width, 1)


def _bias(falloff: Tensor, tile: Tile, masks: Masks) -> Tensor:
    """The bias of a tile, (1 or B, 1 or lanes, rows, width), its rows in reverse; a view unless padding has holes."""
    by_batch = falloff[tile.batch] if falloff.shape[0] > 1 else falloff
    bias = _diagonals(by_batch[:, tile.heads], tile, masks)
    if masks.holes is None:
        return bias
    past = tile.key + tile.width + (tile.count - 1) * tile.rows
    hidden = masks.holes[tile.batch, tile.key : past].unfold(-1, tile.width, tile.rows)  # [B, count, width]
    return bias.masked_fill(hidden[:, :, None], float("-inf"))


def _distances(tile: Tile, masks: Masks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Distances to past and to future keys in a tile, rows in reverse, 0 for the other kind: 2 x (rows, width)."""
    tile_distance = _diagonals(_all_distances(masks, dtype), tile, masks)
    return tile_distance.clamp(min=0), (-tile_distance).clamp(min=0)


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """View the queries of a tile in x (B, H, Tq, ...): (B, lanes, rows, ...), lanes being its windows or its heads."""
    x = x[tile.batch, tile.heads, tile.row : tile.row + tile.count * tile.rows]
    return x[:, 0].unflatten(1, (tile.count, tile.rows)) if tile.count > 1 else x


def _kv_heads(x: Tensor, q: Tensor, tile: Tile) -> slice:
    """The heads of k that the query heads of a tile read: as many, or one for all."""
    group = q.shape[1] // x.shape[1]
    return slice(tile.heads.start // group, (tile.heads.stop - 1) // group + 1)


def _keys(x: Tensor, q: Tensor, tile: Tile) -> Tensor:
    """View the keys of a tile in x (B, Hkv, Tk, D): (B, lanes, width, D)."""
    past = tile.key + tile.width + (tile.count - 1) * tile.rows
    x = x[tile.batch, _kv_heads(x, q, tile), tile.key : past]
    if tile.count > 1:
        return x[:, 0].unfold(1, tile.width, tile.rows).transpose(-2, -1)
    return x.expand(-1, tile.heads.stop - tile.heads.start, -1, -1)
