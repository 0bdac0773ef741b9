"""Attention by PyTorch's scaled_dot_product_attention: the biases become a dense mask where there are any.

A mask larger than MASK_LIMIT is never made: such calls are cut into tiles of queries and heads, each with a mask over
the keys alone that visibility and, for ALiBi, reach leave it. Tiles are one operator of torch.library, whose backward
pass computes them once more, so that neither training nor a compiled graph holds what grows with the square of length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops import halves
from longreach.ops.alibi import dense_bias
from longreach.ops.reach import KEY_BLOCK, default_tolerance, key_ranges, visible_ranges
from longreach.ops.transforms import by_slices, without_autocast
from longreach.ops.visibility import Visibility, without_padding

TAKES_WIDE_MASKS = ("cpu",)
"""Devices whose kernels add a float32 mask to the scores of half-type queries as it is."""

MASK_LIMIT = 2**25
"""Elements of the largest mask: 128 MiB in float32."""

TILE_ROWS = 512
"""Queries per tile, fewer where so many would see more than MASK_LIMIT keys."""

Slopes = Tensor | tuple[Tensor, Tensor] | None


class Tile(NamedTuple):
    """What one call of PyTorch's function computes."""

    batch: slice
    """Which sequences."""
    heads: slice
    """Which query heads: of one key head, or as many as key heads."""
    rows: slice
    """Numbers of queries."""
    keys: slice
    """Positions of keys."""

    @property
    def mask_size(self) -> int:
        """Elements of a mask that differs between heads."""
        return (
            (self.heads.stop - self.heads.start)
            * (self.rows.stop - self.rows.start)
            * (self.keys.stop - self.keys.start)
        )


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    slopes: Slopes = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    tolerance: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output and, where it is wanted, LSE of `longreach.attention`, which documents and validates the arguments.

    Plain causal or bidirectional attention runs PyTorch's fused kernel without a mask. Everything else pays for
    masks, in float32 unless q is float64, whatever the dtype of q: a mask in bfloat16 would round the biases of distant
    keys. On other devices than TAKES_WIDE_MASKS, such a call is computed in float32. Where it takes tiles, these leave
    out `tolerance` of each row's probability mass. PyTorch's function has no LSE: with it, scores are made outright.
    """
    if not (q.numel() and k.numel()):
        # Nothing to attend with or to. What may be learned stays in the graph, with gradients of 0.
        everything = torch.ones((), dtype=torch.bool, device=q.device)
        others = (k, v, *(slopes if isinstance(slopes, tuple) else (slopes,)), bias)
        zeros = (x.masked_fill(everything, 0.0).sum().to(q.dtype) for x in others if x is not None)
        out = sum(zeros, q.masked_fill(everything, 0.0))
        return out, _wide(out).sum(dim=-1).masked_fill(everything, float("-inf")) if return_lse else None
    plain = slopes is None and bias is None and not visibility.hides_past and not return_lse
    if plain and (not visibility.causal or visibility.query_length in (1, visibility.key_length)):
        # Options are there or not: under torch.compile a comparison of sizes is a symbol, which SDPA does not take.
        options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
        if q.shape[1] != k.shape[1]:
            options["enable_gqa"] = True
        if visibility.causal and visibility.query_length == visibility.key_length:
            options["is_causal"] = True  # but a single query of many keys stands at the last and sees all of them
        elif not dropout_p and halves.converts(q, k, v):
            return halves.attend(q, k, v, None, scale)[0], None
        return F.scaled_dot_product_attention(q, k, v, **options), None
    k, v = without_padding(k, v, visibility.key_padding_mask)
    by_sequence, by_head = _axes_of_masks(visibility, slopes, bias, return_lse)
    size = visibility.query_length * visibility.key_length * (q.shape[1] if by_head else 1)
    if surely(size * (q.shape[0] if by_sequence else 1) <= MASK_LIMIT):
        out, lse = _attend(
            q, k, v, visibility, None, slopes, bias, scale=scale, dropout_p=dropout_p, return_lse=return_lse
        )
        return out, lse
    left, right = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    seed = torch.randint(2**62, ()) if dropout_p else None
    masks = (visibility.key_padding_mask, visibility.cu_seqlens)
    bounds = (visibility.causal, visibility.window_size, scale, dropout_p, tolerance, return_lse)
    tiled = _tiled if torch.compiler.is_compiling() else _Tiled.apply
    out, lse = tiled(q, k, v, left, right, bias, *masks, seed, *bounds)
    return out, lse if return_lse else None


def surely(condition: bool) -> bool:
    """Whether something said of lengths holds: under torch.export of all lengths that it leaves open."""
    if not torch.compiler.is_exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports what eager programs need not

    return statically_known_true(condition)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    tile: Tile | None,
    slopes: Slopes,
    bias: Tensor | None,
    *,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One call of PyTorch's function with its mask; of tensors that are a tile, or whole ones."""
    visible = visibility.dense(q.device) if tile is None else visibility.dense(q.device, *tile[2:], batch=tile.batch)
    # A row that sees no key would be a softmax over nothing: let it see all, then set its output to 0.
    may_be_empty = visibility.key_padding_mask is not None or visibility.query_length > visibility.key_length
    empty = None
    if may_be_empty and visible is not None:
        empty = ~visible.any(dim=-1, keepdim=True)  # [B or 1, 1, Tq, 1] or [Tq, 1]
        visible = visible | empty
    offset = None if tile is None else tile.rows.start + visibility.offset - tile.keys.start
    wide = torch.promote_types(q.dtype, torch.float32)
    mask = dense_bias(slopes, bias, q.shape[2], k.shape[2], wide, offset=offset)
    if mask is None:
        mask = visible
    elif visible is not None:
        mask = mask.masked_fill(~visible, float("-inf"))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]  # SDPA wants at least two axes, and reads three as (B, Tq, Tk)
    dtype = q.dtype
    if return_lse or (mask is not None and mask.is_floating_point() and q.device.type not in TAKES_WIDE_MASKS):
        # Fused kernels of other devices want the mask in the dtype of q: they refuse another, or read its bytes as if
        # it were that. All of them take float32 throughout, and q, k and v lose nothing by it.
        q, k, v = (x.to(wide) for x in (q, k, v))
    lse = None
    if return_lse:
        out, lse = _outright(q, k, v, mask, scale=scale, dropout_p=dropout_p)
    elif not dropout_p and halves.converts(q, k, v, mask):
        out, _ = halves.attend(q, k, v, mask, scale)
    else:
        options = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout_p, **options)
    out = out.to(dtype)
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
        lse = None if lse is None else lse.masked_fill(empty[..., 0], float("-inf"))
    return out, lse


def _outright(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Output and LSE by their definition."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
    # A bias may hide all keys of a row: the gradient of a softmax over nothing is NaN.
    nothing = scores.isneginf().all(dim=-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    weights = F.dropout((scores - lse).exp().masked_fill(nothing, 0.0), dropout_p)
    return weights @ v, lse.masked_fill(nothing, float("-inf"))[..., 0]


def _axes_of_masks(visibility: Visibility, slopes: Slopes, bias: Tensor | None, return_lse: bool) -> tuple[bool, bool]:
    """Whether masks, or with the LSE scores, differ between sequences, and between heads."""
    sides = () if slopes is None else slopes if isinstance(slopes, tuple) else (slopes,)
    shape = () if bias is None else (*(1,) * (4 - bias.dim()), *bias.shape)
    by_sequence = visibility.key_padding_mask is not None or any(x.dim() == 2 for x in sides) or shape[:1] > (1,)
    return by_sequence or return_lse, bool(sides) or shape[1:2] > (1,) or return_lse


def _tiles(
    q: Tensor,
    k: Tensor,
    visibility: Visibility,
    slopes: Slopes,
    bias: Tensor | None,
    scale: float | None,
    tolerance: float | None,
    return_lse: bool,
) -> Iterator[Tile]:
    """Cut attention into tiles with masks of at most MASK_LIMIT elements, which hold all that can matter."""
    batch, num_heads, query_length, head_dim = q.shape
    key_length, group = k.shape[2], num_heads // k.shape[1]
    by_sequence, by_head = _axes_of_masks(visibility, slopes, bias, return_lse)
    rows = max(1, min(TILE_ROWS, MASK_LIMIT // key_length))
    if slopes is not None and bias is None:
        scale = head_dim**-0.5 if scale is None else scale
        tolerance = default_tolerance(q.dtype) if tolerance is None else tolerance
        starts, ends = key_ranges(
            q, k, slopes, visibility, scale=scale, tolerance=tolerance, block_m=rows, block_n=KEY_BLOCK
        )
        if not by_sequence:
            starts, ends = starts.amin(dim=0, keepdim=True), ends.amax(dim=0, keepdim=True)
    else:
        starts, ends = visible_ranges(visibility, block_m=rows, block_n=KEY_BLOCK, device=q.device)
        shape = (batch if by_sequence else 1, num_heads if by_head else 1, -1)
        starts, ends = starts.expand(shape), ends.expand(shape)
    lows, highs = starts.mul(KEY_BLOCK).tolist(), ends.mul(KEY_BLOCK).clamp(max=key_length).tolist()
    for sequence, (low, high) in enumerate(zip(lows, highs, strict=True)):
        sequences = slice(sequence, sequence + 1) if by_sequence else slice(0, batch)
        for block, row in enumerate(range(0, query_length, rows)):
            ranges = [(first[block], past[block]) for first, past in zip(low, high, strict=True)]
            within = slice(row, min(row + rows, query_length))
            if by_head:
                yield from _share(ranges, group, sequences, within)
            elif ranges[0][0] < ranges[0][1]:
                yield Tile(sequences, slice(0, num_heads), within, slice(*ranges[0]))


def _share(ranges: list[tuple[int, int]], group: int, sequences: slice, rows: slice) -> Iterator[Tile]:
    """Tiles of adjacent heads whose ranges of keys are alike, to within a factor of 2."""
    tile, narrowest = None, 0
    for head, (low, high) in enumerate(ranges):
        if low >= high:
            continue
        if tile is not None and tile.heads.stop == head and (group == 1 or tile.heads.start // group == head // group):
            keys = slice(min(tile.keys.start, low), max(tile.keys.stop, high))
            narrowest = min(narrowest, high - low)
            wider = tile._replace(heads=slice(tile.heads.start, head + 1), keys=keys)
            if keys.stop - keys.start <= 2 * narrowest and wider.mask_size <= MASK_LIMIT:
                tile = wider
                continue
        if tile is not None:
            yield tile
        tile, narrowest = Tile(sequences, slice(head, head + 1), rows, slice(low, high)), high - low
    if tile is not None:
        yield tile


class _Parts(NamedTuple):
    """Tensors of a tile."""

    q: Tensor
    k: Tensor
    v: Tensor
    left: Tensor | None
    right: Tensor | None
    bias: Tensor | None


def _parts(whole: _Parts, tile: Tile) -> _Parts:
    """Views of what a tile reads, or of totals in those shapes."""
    group = whole.q.shape[1] // whole.k.shape[1]
    kv_heads = slice(tile.heads.start // group, (tile.heads.stop - 1) // group + 1)
    left, right = (
        None if x is None else x[tile.batch, tile.heads] if x.dim() == 2 else x[tile.heads]
        for x in (whole.left, whole.right)
    )
    bias = None
    if whole.bias is not None:
        axes = zip(tile, whole.bias.shape, strict=True)
        bias = whole.bias[tuple(part if size > 1 else slice(None) for part, size in axes)]
    k, v = (x[tile.batch, kv_heads, tile.keys] for x in (whole.k, whole.v))
    return _Parts(whole.q[tile.batch, tile.heads, tile.rows], k, v, left, right, bias)


def _pair(left: Tensor | None, right: Tensor | None) -> Slopes:
    return None if left is None or right is None else (left, right)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _sown(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers of a seed; the generators of the caller that can be put back are."""
    if seed is None:
        yield
        return
    restored = (device,) if device.type in ("cuda", "xpu") else ()
    with torch.random.fork_rng(restored, device_type=device.type if restored else "cuda"):
        torch.manual_seed(int(seed))
        yield


@contextmanager
def _differentiable() -> Iterator[None]:
    """Autograd inside of an operator, where PyTorch has left it out; autocast stays left out."""
    left_out = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, left_out), torch.enable_grad():
        yield


@torch.library.custom_op("longreach::sdpa_tiled", mutates_args=())
def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window_size: int | None,
    scale: float | None,
    dropout_p: float,
    tolerance: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    visibility = Visibility(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens)
    whole = _Parts(q, k, v, left, right, None if bias is None else bias[(None,) * (4 - bias.dim())])
    out = q.new_zeros(q.shape)  # no tile holds rows that see no key
    lse = _wide(q).new_full(q.shape[:3] if return_lse else (0,), float("-inf"))
    with _sown(seed, q.device):
        for tile in _tiles(q, k, visibility, _pair(left, right), bias, scale, tolerance, return_lse):
            parts = _parts(whole, tile)
            options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "return_lse": return_lse}
            slopes = _pair(parts.left, parts.right)
            mixed, sums = _attend(*parts[:3], visibility, tile, slopes, parts.bias, **options)
            out[tile.batch, tile.heads, tile.rows] = mixed
            if sums is not None:
                lse[tile.batch, tile.heads, tile.rows] = sums
    return out, lse


@_tiled.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return_lse = others[-1]
    return q.new_empty(q.shape), _wide(q).new_empty(q.shape[:3] if return_lse else (0,))


@torch.library.custom_op("longreach::sdpa_tiled_backward", mutates_args=())
def _tiled_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window_size: int | None,
    scale: float | None,
    dropout_p: float,
    tolerance: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    visibility = Visibility(q.shape[2], k.shape[2], causal, window_size, key_padding_mask, cu_seqlens)
    # Gradients of slopes are sums over all tiles: each is not to be rounded to less than scores are.
    wide = torch.promote_types(q.dtype, torch.float32)
    past, future = (None if x is None else x.to(torch.promote_types(x.dtype, wide)) for x in (left, right))
    whole = _Parts(q, k, v, past, future, None if bias is None else bias[(None,) * (4 - bias.dim())])
    totals = _Parts(*(None if x is None else torch.zeros_like(_wide(x.detach())) for x in whole))  # type: ignore[arg-type]
    with _sown(seed, q.device), _differentiable(), without_autocast(q.device):
        for tile in _tiles(q, k, visibility, _pair(left, right), bias, scale, tolerance, return_lse):
            leaves = _Parts(*(None if x is None else x.detach().requires_grad_() for x in _parts(whole, tile)))  # type: ignore[arg-type]
            options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "return_lse": return_lse}
            slopes = _pair(leaves.left, leaves.right)
            outputs = _attend(*leaves[:3], visibility, tile, slopes, leaves.bias, **options)
            rows = (tile.batch, tile.heads, tile.rows)
            grads = (grad_out[rows], grad_lse[rows]) if return_lse else (grad_out[rows],)
            wanted = [x for x in leaves if x is not None]
            found = torch.autograd.grad(outputs[: len(grads)], wanted, grads, allow_unused=True)  # type: ignore[arg-type]
            for total, grad in zip((x for x in _parts(totals, tile) if x is not None), found, strict=True):
                if grad is not None:
                    total += grad
    shaped = zip(totals, (q, k, v, left, right, bias), strict=True)
    return tuple(q.new_empty(0) if x is None else total.view(x.shape).to(x.dtype) for total, x in shaped)  # type: ignore[return-value, union-attr]


@_tiled_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, q: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, *others[:5]))


by_slices(_tiled)
by_slices(_tiled_backward)


class _Tiled(torch.autograd.Function):
    """The operator and its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _tiled(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:9])
        ctx.bounds = inputs[9:]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, left, right, bias, *others = ctx.saved_tensors
        fixed = (*others, *ctx.bounds)
        gradients = _TiledGradients.apply(grad_out, grad_lse, q, k, v, left, right, bias, fixed)
        wanted = (g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, *(None,) * 9


class _TiledGradients(torch.autograd.Function):
    """The backward operator, which has no derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # torch.compile counts its arguments
        grad_out: Tensor,
        grad_lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        bias: Tensor | None,
        fixed: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        return _tiled_backward(grad_out, grad_lse, q, k, v, left, right, bias, *fixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError('second derivatives of attention in tiles: use impl="reference", or shorter inputs')


_tiled.register_autograd(_Tiled.backward, setup_context=_Tiled.setup_context)
