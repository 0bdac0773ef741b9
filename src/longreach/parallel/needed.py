"""Which keys of earlier pieces this rank needs: the bound of `longreach.ops.reach` with what others say of their keys.

The theorem of docs/reach.md asks two things of a block of keys: its distance, and its radius about a centre that all
share. Whoever holds the keys knows their radius; whoever holds the queries bounds their LSE by keys of its own. So
radii travel, one number for each head and block, and then the keys.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.lse_bound import ROUNDING, lse_lower_bound, per_query_head
from longreach.ops.reach import (
    KEY_BLOCK,
    LSE_ROUNDING,
    SAMPLE,
    Side,
    chord_of,
    count_dropped,
    log_tolerance,
    lowered_slopes,
    row_norms,
    soft_radius,
)
from longreach.ops.visibility import Visibility
from longreach.parallel.line import Line

UNSEEN = -1.0
"""The radius of a block whose keys are all padding, or that is none."""


@dataclass(frozen=True)
class Looking:
    """What the first rows of a piece may see, along a line, of the pieces before."""

    line: Line
    """The ranks in the order in which rows look back."""
    rows: int
    """How many of the first rows of the piece may see earlier pieces: those of its first document."""
    lowest: int
    """Position of the first key that these rows see, as far as window and documents go."""
    causal: bool
    """Whether rows do not see keys after them."""
    window_size: int | None
    """Keys at this distance and beyond are hidden."""
    padding: Tensor | None
    """(B, T) bool, True where a key of this piece is padding."""


@dataclass(frozen=True)
class Common:
    """What must be the same for all keys of a sequence."""

    centre: Tensor
    """(B, Hkv, 1, D): the mean of some keys."""
    largest: Tensor
    """(B, H, 1): the largest scale |q|."""

    @classmethod
    def of(cls, openings: Tensor, q: Tensor, k: Tensor) -> "Common":
        """By the `opening` of each rank, for q and k as one of them has them."""
        shapes = (k.shape[0], k.shape[1], k.shape[3]), (k.shape[0], 1, 1), (*q.shape[:2], 1)
        parts = openings.split([math.prod(shape) for shape in shapes], dim=1)
        sums, counts, largest = (part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))
        return cls((sums.sum(dim=0) / counts.sum(dim=0).clamp(min=1))[:, :, None], largest.amax(dim=0))


@torch.no_grad()
def opening(q: Tensor, k: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    """What `Common` is made of, in numbers (n,): the sum of some keys, how many they are, and the largest scale |q|."""
    norm = row_norms(q) * scale
    every = max(1, k.shape[2] // SAMPLE)
    sample = k[:, :, ::every].to(norm.dtype)
    count = norm.new_full((k.shape[0], 1), sample.shape[2])
    if padding is not None:
        hidden = padding[:, ::every]
        sample = sample.masked_fill(hidden[:, None, :, None], 0.0)
        count = (~hidden).sum(dim=1, keepdim=True).to(norm.dtype)
    return torch.cat([x.flatten() for x in (sample.sum(dim=2), count, F.pad(norm, (0, 1)).amax(dim=-1))])


@torch.no_grad()
def first_keys(
    q: Tensor,
    k: Tensor,
    slopes: Tensor | tuple[Tensor, Tensor] | None,
    looking: Looking,
    common: Common,
    *,
    scale: float,
    tolerance: float,
) -> list[list[int]]:
    """Position of the first key that each rank needs, by place and key head: earlier ones hold at most `tolerance`.

    Args:
        q: (B, H, T, D) of this piece.
        k: (B, Hkv, T, D).
        slopes: (H,) or (B, H), a pair (left, right) of them, or None.
        looking: what may be seen.
        common: of all pieces.
        scale: factor of q . k.
        tolerance: probability mass per row that may be dropped, in [0, 1).
    """
    line, num_heads, padding = looking.line, q.shape[1], looking.padding
    left, right = lowered_slopes(q, slopes)
    norm = row_norms(q[:, :, : looking.rows]) * scale  # [B, H, rows]
    side = Side(left, 1, log_tolerance(tolerance, norm.dtype, line.borders[-1]))
    lengths = row_norms(k, common.centre)  # [B, Hkv, T]
    if padding is not None:
        lengths = lengths.masked_fill(padding[:, None], float("-inf"))
    radius = _radii(per_query_head(lengths, num_heads), common.largest, side, line)
    mine = torch.full((k.shape[1],), line.start, device=k.device)
    if looking.rows and radius.shape[-1] and looking.lowest < line.start:
        lse = _lse_bound(q, k, (left, right), common.centre, norm, lengths, looking, scale)
        chord = chord_of(
            norm,
            lse,
            # A row that sees none of the keys here may see earlier ones: its LSE has no bound, and it needs them all.
            torch.ones(1, 1, looking.rows, dtype=torch.bool, device=q.device),
            left[..., None] * torch.arange(looking.rows, device=q.device),
            radius.clamp(min=0.0) * (1 + (q.shape[3] + 16) * ROUNDING),
            looking.rows,
        )
        first, last = _ends_of_blocks(line, q.device)
        hidden = (radius == UNSEEN)[:, :, None] | (last < looking.lowest)
        dropped = count_dropped(chord, side, line.start - last[None], hidden, KEY_BLOCK)[..., 0]  # [B, H]
        found = F.pad(first, (0, 1), value=line.start)[dropped].clamp(min=looking.lowest)
        mine = found.amin(dim=0).unflatten(0, (k.shape[1], -1)).amin(dim=-1)
    firsts: list[list[int]] = line.gather(mine).tolist()
    return firsts


def _radii(lengths: Tensor, largest: Tensor, side: Side, line: Line) -> Tensor:
    """The radius of each block of the pieces before, (B, H, NK), UNSEEN where there is nothing to see.

    Blocks count from the end of their piece, so that it is the far one that may be short.
    """
    most = max(map(_num_blocks, line.lengths))
    filled = F.pad(lengths, (most * KEY_BLOCK - lengths.shape[-1], 0), value=float("-inf"))
    radius = soft_radius(filled, largest, side, KEY_BLOCK)
    unseen = filled.unflatten(-1, (most, KEY_BLOCK)).isneginf().all(dim=-1)
    gathered = line.gather(radius.masked_fill(unseen, UNSEEN))[: line.place]
    parts = [x[..., most - _num_blocks(length) :] for x, length in zip(gathered, line.lengths, strict=False)]
    return torch.cat([radius[..., :0], *parts], dim=-1)


def _ends_of_blocks(line: Line, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position of the first and of the last key of each block of the pieces before, (NK,) each."""
    first, last = [], []
    for start, stop in pairwise(line.borders[: line.place + 1]):
        ends = stop - 1 - KEY_BLOCK * torch.arange(_num_blocks(stop - start), device=device).flip(0)
        first.append((ends - (KEY_BLOCK - 1)).clamp(min=start))
        last.append(ends)
    return torch.cat(first), torch.cat(last)


def _num_blocks(length: int) -> int:
    return -(-length // KEY_BLOCK)


def _lse_bound(
    q: Tensor,
    k: Tensor,
    slopes: tuple[Tensor, Tensor],
    centre: Tensor,
    norm: Tensor,
    lengths: Tensor,
    looking: Looking,
    scale: float,
) -> Tensor:
    """A lower bound of the LSE of the rows that look back, by the keys of their piece: (B, H, rows), as `norm` is."""
    rows, padding = looking.rows, looking.padding
    among = Visibility(rows, rows, looking.causal, looking.window_size, None if padding is None else padding[:, :rows])
    lse, _ = lse_lower_bound(q[:, :, :rows], k[:, :, :rows], *slopes, centre, scale, among)
    longest = lengths[:, :, :rows].amax(dim=-1, keepdim=True).clamp(min=0.0) + torch.linalg.vector_norm(centre, dim=-1)
    return lse - norm * per_query_head(longest, q.shape[1]) * LSE_ROUNDING - 2.0**-12
