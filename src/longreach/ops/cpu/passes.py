"""The forward and the backward pass of ALiBi attention on the CPU: which heads are bounded, by what tiles are computed.

Query blocks whose ranges are alike become one batch, their keys overlapping windows of k and v; `plan` decides on that
and `views` finds the bias of each tile at no cost. Tiles are computed by PyTorch's `kernel`, by `native` C, or by
matrix `products`, whichever is fastest of what is there and accurate enough. The backward pass works on the ranges that
the forward pass found, and adds gradients up in one fixed order, so that two runs agree to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longreach.ops.cpu import native, onednn
from longreach.ops.cpu.bounding import bounded_ranges, ends_to_leave_out, heads_worth_bounding, is_near
from longreach.ops.cpu.kernel import FewQueries, KernelGradients, ManyQueries
from longreach.ops.cpu.memory import keep_memory_of_tiles
from longreach.ops.cpu.native import NativeForward, NativeGradients
from longreach.ops.cpu.plan import (
    BLOCK_M,
    Cost,
    HostVisibility,
    Ranges,
    Tile,
    by_key_head,
    kernel_cost,
    pieces,
    plan,
    product_cost,
    reading_cost,
)
from longreach.ops.cpu.products import LOG2_E, FoundRanges, ProductGradients, Products
from longreach.ops.cpu.totals import Totals
from longreach.ops.cpu.workers import Job, address_of_region, can_share_out, share_out
from longreach.ops.lse_bound import FEW_QUERIES
from longreach.ops.near_reach import near_ranges
from longreach.ops.processor import CPU
from longreach.ops.visibility import Visibility

PRODUCTS_PAIRS = 2**20
"""Pairs of a query and a key of a head from which on oneDNN's products are faster than the flash kernel: at 512 tokens
and D 64 they take 1.03 to 1.10 times as long, at 1,024 0.93 to 1.10 and at 2,048 0.76."""

PRODUCTS_DIM = 64
"""D from which on they are, as what they take beside multiplying is the same for any: with 32 at 512 to 8,192 tokens
they take 1.07 to 1.33 times as long."""

HAS_UNITS = native.library(torch.bfloat16) is not None
"""Whether native code multiplies bfloat16 by matrix units."""

DIFFERENTIATED = {torch.bfloat16} if CPU == "AMX" and not HAS_UNITS else set[torch.dtype]()
"""What the kernel differentiates faster than all else, and as accurately: it has the LSE in one number. Its rounding
is nothing to that of weights in bfloat16, and too much in float32 where one key outweighs all others
(docs/attention.md, "Rounding")."""

HAS_NATIVE = native.library(torch.float32) is not None
"""Whether there is native code, which decodes, too: no products in it could be done faster by others."""

NATIVE_IS_FASTER = HAS_NATIVE and not onednn.IS_FAST
"""Whether nothing computes tiles as fast as it does: where oneDNN's products are fast, that was not measured."""

SHARED_PAIRS = 2**20
"""Pairs of a query and a key of a head and document from which on heads are shared out among threads, at 1,024 tokens.
Beside one busy process on two cores that takes a third to three quarters off both passes, and nothing is lost where
nothing else runs. For 512 tokens a pass would take up to twice as long, as threads wait for Python's lock."""

SHARED_GRADIENT_PAIRS = 2**18
"""Likewise where the kernel differentiates, in fewer and larger operations."""

SHARED_NATIVE_PAIRS = 2**14
"""Likewise for native code, which leaves Python's lock to others."""

SHARED_TILE = 2**20
"""Pairs up to which a tile of the kernel that is shared out holds several heads: each has its price in Python, while
other threads wait for its lock."""

BOUND_BY_KERNEL = 2**18
"""Work of finding any ranges at all, some small operations, in pairs of a query and a key that the flash kernel would
compute in float32 instead: on a Xeon it gains nothing at 1,024 tokens, 18% at 2,048 and 42% at 4,096."""

BOUND_BY_NATIVE = 2**21
"""That work where native code computes and does not find them itself, as with padding, in pairs that it would compute
meanwhile: of 8 heads and 1,024 tokens, to bound three takes 6.7 ms in float32 instead of 4.6, of two sequences of 2,048
four take 31.8 instead of 34.9."""

BOUND_BY_PRODUCTS = 8 * 2**20 if onednn.IS_FAST else 2**20
"""That work in pairs of matrix products, which oneDNN's are done with sooner, and which lose speed where tiles are
narrow: by oneDNN's, to bound what the kernel would takes 20 to 40% more time at 1,024 tokens, up to 8% at 2,048."""

BOUND_BY_UNITS = 4
"""How many times as many pairs matrix units would compute meanwhile, in bfloat16."""

FOUND_ALONE = 4096
"""Queries up to which one thread finds the ranges of heads that are shared out, in the same region: some hundred small
operations, which are no faster by several threads, and beside a busy process many times as slow."""


class Means(IntEnum):
    """What tiles are computed by."""

    PRODUCTS = 0
    KERNEL = 1
    NATIVE = 2


class Kept(NamedTuple):
    """What the forward pass leaves to the backward pass, beside output and LSE."""

    peak: Tensor
    """(B, H, Tq) in the dtype of the LSE: the score by base 2 that the weights of a row are relative to, its largest
    one or, by the kernel, the LSE; inf for rows that see no key."""
    total: Tensor
    """Likewise: the sum of weights relative to that, 0 for rows that see no key."""
    low: Tensor
    """(B, H, ceil(Tq / BLOCK_M)) int32: the first key that the backward pass needs."""
    high: Tensor
    """Likewise: one past the last."""
    means: Tensor
    """() int8: the `Means` that computed it, and that will differentiate it."""


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
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Kept | None]:
    """The forward pass, arguments as in `longreach.attention`: output, LSE, and what a backward pass needs.

    `learns` is whether one may come. The LSE (B, H, Tq) is float32, or float64 where q is; it may be None unless it was
    asked for.
    """
    q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    seen = HostVisibility.read(visibility)
    few = seen.query_length < FEW_QUERIES
    means = _means(q, k, seen, learns)
    lse = None
    if return_lse or learns or means == Means.KERNEL:
        lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if means == Means.NATIVE and few and not learns:
        hidden: dict[str, Any] = {"window_size": seen.window_size, "key_padding_mask": seen.key_padding_mask}
        out = native.decode(q, k, v, slopes[0], key_norms, **hidden, scale=scale, tolerance=tolerance, lse=lse)
        return out, lse, None
    keep_memory_of_tiles()
    # Results lie in memory as inputs do, so that what a model's projections made need not be put in order again.
    out = torch.empty_like(q)
    per_call = BOUND_BY_PRODUCTS if means == Means.PRODUCTS else BOUND_BY_KERNEL
    if means == Means.NATIVE and not is_near(seen, key_norms):
        per_call = BOUND_BY_NATIVE
    price = BOUND_BY_UNITS if CPU == "AMX" and q.dtype == torch.bfloat16 and means != Means.PRODUCTS else 1
    worth = heads_worth_bounding(q, k, *slopes, seen, tolerance, key_norms, per_call, price)
    ranges: Ranges = {}

    def bound() -> Ranges:
        find_near = native.near_ranges if means == Means.NATIVE else near_ranges
        ranges.update(bounded_ranges(q, k, slopes, seen, key_norms, scale, tolerance, worth, find_near))
        return ranges

    readable = _readable(q, k, v, seen)
    if seen.may_hide_all_keys:
        out.zero_()
    if means == Means.KERNEL:
        assert lse is not None, "it has none of its own"
        if seen.may_hide_all_keys:
            lse.fill_(float("-inf"))
        kernel = (FewQueries if few else ManyQueries)(*readable, *slopes, out, lse, scale, seen)
        cost = reading_cost if few else kernel_cost
        _compute(kernel.attend, q, k, seen, worth, bound, cost, shared_pairs=SHARED_PAIRS)
        said = q.new_tensor(means, dtype=torch.int8)
        return out, lse, Kept(*_weighed_by_lse(lse, ranges, seen), said) if learns else None
    if means == Means.NATIVE:
        limit = ends_to_leave_out(tolerance, seen) if learns else -1.0
        native_tiles = NativeForward(*readable, *slopes, scale, seen, out, limit)
        native_tiles.compute(bound(), _native_threads(q, k, seen))
        out.copy_(native_tiles.out)
        peak, total, needed = native_tiles.peak, native_tiles.total, native_tiles.needed
    else:
        peak = q.new_full(q.shape[:3], float("inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        total = torch.zeros_like(peak)
        products = Products(*readable, *slopes, scale, seen)
        found = FoundRanges(q, seen, tolerance)

        def compute(tile: Tile) -> None:
            for piece in pieces(tile):
                products.attend(piece, out, peak, total, found if learns else None)

        _compute(compute, q, k, seen, worth, bound, product_cost, shared_pairs=SHARED_PAIRS)
        needed = found.by_block
    if lse is not None:
        finite = peak.masked_fill(total == 0, 0.0) if seen.may_hide_all_keys else peak
        torch.log2(total, out=lse).add_(finite).mul_(1 / LOG2_E)
    return out, lse, Kept(peak, total, *needed(), q.new_tensor(means, dtype=torch.int8)) if learns else None


def differentiate(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: tuple[Tensor, Tensor],
    visibility: Visibility,
    attended: tuple[Tensor, Tensor, Kept],
    *,
    scale: float,
    slopes_learn: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and both slopes, of those zeros unless `slopes_learn`; `attend` returned `attended`."""
    out, lse, kept = attended
    seen = HostVisibility.read(visibility)
    ends_of_head = (x.transpose(0, 1).tolist() for x in (kept.low, kept.high))
    ranges = dict(enumerate(zip(*ends_of_head, strict=True)))
    everything = slice(0, q.shape[1])
    options: dict[str, Any] = {"bounded": everything, "bound": lambda: ranges, "adds_to_keys": True}
    compute_all: Callable[..., None] = partial(_compute, q=q, k=k, visibility=seen, **options)
    readable = _readable(q, k, v, seen)
    totals = Totals(*readable)
    of_slopes = [lse.new_zeros(q.shape[:2]) for _ in slopes]
    means = Means(int(kept.means))
    # The kernel knows no gradient of the LSE, nor of the bias.
    if means == Means.KERNEL and not slopes_learn and not grad_lse.any():
        by_kernel = KernelGradients(*readable, *slopes, out, lse, scale, seen, grad_out, totals)
        compute_all(by_kernel.add, cost=kernel_cost, shared_pairs=SHARED_GRADIENT_PAIRS)
    else:
        given = *readable, *slopes, scale, seen
        learned = out, kept.peak, kept.total, grad_out, grad_lse, totals, slopes_learn
        if means == Means.NATIVE:
            native_tiles = NativeGradients(*given, *learned)
            native_tiles.compute(ranges, _native_threads(q, k, seen))
            of_slopes = [native_tiles.of_left, native_tiles.of_right]
        else:
            by_products = ProductGradients(Products(*given), *learned)

            def compute(tile: Tile) -> None:
                for piece in pieces(tile):
                    by_products.add(piece)

            compute_all(compute, cost=product_cost, shared_pairs=SHARED_PAIRS)
            of_slopes = [by_products.of_left, by_products.of_right]
    return (
        *(laid_out_as(x, total) for x, total in ((q, totals.of_q), (k, totals.of_k), (v, totals.of_v))),
        *(
            (sums.sum(dim=0) if slope.dim() == 1 else sums).to(slope.dtype)
            for sums, slope in zip(of_slopes, slopes, strict=True)
        ),
    )


def decodes(q: Tensor, k: Tensor) -> bool:
    """Whether `native.decode` serves for few queries, of which none sees keys after it, and is faster than all else."""
    return can_decode() and q.dtype in native.STEP_DTYPES and q.numel() > 0 and k.numel() > 0


def can_decode() -> bool:
    """Whether it does for tensors that it takes."""
    return HAS_NATIVE and (address_of_region() is not None or torch.get_num_threads() == 1)


def _means(q: Tensor, k: Tensor, visibility: HostVisibility, learns: bool) -> Means:
    """What computes tiles fastest, of what is accurate enough."""
    few = visibility.query_length < FEW_QUERIES
    if learns and _kernel_differentiates(q, k, visibility):
        return Means.KERNEL
    if few and not learns:
        return Means.NATIVE if visibility.are_last and decodes(q, k) else Means.KERNEL
    if NATIVE_IS_FASTER and (learns or q.dtype not in DIFFERENTIATED) and _native_serves(q, k):
        return Means.NATIVE
    return Means.PRODUCTS if learns or _products_are_faster(q, k) else Means.KERNEL


def _native_serves(q: Tensor, k: Tensor) -> bool:
    """Whether native code can have what computes here: it knows float32, and each thread has heads of its own."""
    if q.dtype == torch.float64 or not q.numel():
        return False
    return torch.get_num_threads() == 1 or can_share_out(q.shape[0] * k.shape[1])


def _native_threads(q: Tensor, k: Tensor, visibility: HostVisibility) -> int:
    """How many threads compute, which need no lock of Python's."""
    return torch.get_num_threads() if _can_be_apart(q, k, visibility, SHARED_NATIVE_PAIRS) else 1


def _products_are_faster(q: Tensor, k: Tensor) -> bool:
    """Than PyTorch's flash kernel, where both would do."""
    return onednn.IS_FAST and q.shape[2] * k.shape[2] >= PRODUCTS_PAIRS and q.shape[3] >= PRODUCTS_DIM


def _kernel_differentiates(q: Tensor, k: Tensor, visibility: HostVisibility) -> bool:
    """Whether both passes are PyTorch's kernel to compute: its LSE is large where queries do not see their own key."""
    if q.dtype not in DIFFERENTIATED or not visibility.sees_own_keys or not q.numel():
        return False
    # Threads that PyTorch shares a tile among are not told what to do with denormals.
    return torch.get_num_threads() == 1 or _can_be_apart(q, k, visibility, SHARED_GRADIENT_PAIRS)


def _weighed_by_lse(lse: Tensor, ranges: Ranges, visibility: HostVisibility) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `Kept` has beside the means, by the LSE and the ranges of the forward pass."""
    shape = (*lse.shape[:2], -(-visibility.query_length // BLOCK_M))
    low = lse.new_zeros(shape, dtype=torch.int32)
    high = torch.full_like(low, visibility.key_length)
    for head, ends in ranges.items():
        low[:, head], high[:, head] = (low.new_tensor(x) for x in ends)
    return lse * LOG2_E, torch.ones_like(lse), low, high


def _readable(q: Tensor, k: Tensor, v: Tensor, visibility: HostVisibility) -> tuple[Tensor, Tensor, Tensor]:
    """As tiles read them: rows dense in memory, and zeros in holes, so that NaN there meets weights of 0 as 0."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if visibility.holes is not None:
        k, v = (x.masked_fill(visibility.holes[:, None, :, None], 0.0) for x in (k, v))
    return q, k, v


def laid_out_as(x: Tensor, total: Tensor) -> Tensor:
    """A sum in the dtype of x, and in memory as what is made like x."""
    like = torch.empty_like(x)
    return total if total.dtype == x.dtype and total.stride() == like.stride() else like.copy_(total)


def _can_be_apart(q: Tensor, k: Tensor, visibility: HostVisibility, least: int) -> bool:
    """Whether each thread computes tiles of its own, as from so many pairs of a head and document on."""
    pairs = q.shape[2] * k.shape[2] // (len(visibility.documents) - 1) ** 2  # of a document of the mean length
    return q.shape[2] >= FEW_QUERIES and pairs >= least and can_share_out(q.shape[0] * k.shape[1])


def _compute(
    compute: Callable[[Tile], None],
    q: Tensor,
    k: Tensor,
    visibility: HostVisibility,
    bounded: slice,
    bound: Callable[[], Ranges],
    cost: Cost,
    *,
    shared_pairs: int,
    adds_to_keys: bool = False,
) -> None:
    """Compute all tiles that cover what is needed, in their order or, where sequences are long, by several threads.

    What bounded heads need is what `bound` says, of others all that is visible: threads begin with these while one of
    them finds the former. Tiles that add to the gradients of one key head are one thread's, in their order.
    """
    group = q.shape[1] // k.shape[1]
    apart = _can_be_apart(q, k, visibility, shared_pairs)
    largest = None
    if apart:
        largest = SHARED_TILE if cost is kernel_cost and not adds_to_keys else 0
    heads = range(q.shape[1])

    def tiles(heads: Sequence[int], ranges: Ranges) -> Iterator[Tile]:
        return plan(q.shape, k.shape, heads, visibility, ranges, cost, largest=largest)

    def each(some: Iterable[Tile]) -> None:
        for tile in some:
            compute(tile)

    def jobs(heads: Sequence[int], ranges: Ranges) -> list[Job]:
        parts = by_key_head(tiles(heads, ranges), group) if adds_to_keys else [[tile] for tile in tiles(heads, ranges)]
        parts.sort(key=lambda part: -sum(tile.pairs for tile in part))  # the most work first
        return [partial(each, part) for part in parts]

    count = q.shape[0] * k.shape[1]
    if not apart:
        each(tiles(heads, bound()))
    elif q.shape[2] > FOUND_ALONE:
        share_out(jobs(heads, bound()), list, count)
    else:
        others = [*heads[: bounded.start], *heads[bounded.stop :]]
        share_out(jobs(others, {}), lambda: jobs(heads[bounded], bound()), count)
