"""Planning for attention on the CPU: which tiles of queries and keys cover the key ranges that `reach` leaves.

A tile is one call of a kernel, or a few matrix products. Each head's queries are cut into blocks, as many queries each
as make the work cheapest. Blocks whose ranges are alike become one batch, their keys overlapping windows of k and v,
and so do heads.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from longreach.ops.visibility import Visibility

Item = TypeVar("Item")

BLOCK_M = 128
"""Queries per block in the ranges."""

BLOCK_N = 64
"""Keys per block in the ranges."""

BLOCK_ROWS = (128, 256, 512, 1024)
"""Queries per tile to choose from."""

CALL_COST = 2**15
"""Work, in pairs of a query and a key, that is worth an additional call of a kernel."""

LANE_COST = 90_000
"""What a lane's own products and sums cost besides their pairs, in pairs."""

NARROW_COST = 1.8
"""Cost of a pair where many lanes share a product, relative to a lane's own products."""

WIDE_PAIRS = round(LANE_COST / (NARROW_COST - 1))
"""Pairs from which on a lane of a tile is worth matrix products of its own."""

READING_CALL_COST = 3000
"""Keys whose reading takes as long as an additional call."""

STRIP_PAIRS = 2**21
"""Pairs whose weights are in memory at a time; for fewer, products lose speed."""

ALIGNED = 64
"""Widths are rounded up to multiples of this, so that few sizes of products occur: each is compiled when first used."""

Ranges = dict[int, tuple[list[list[int]], list[list[int]]]]
"""By head, first key and one past the last that it needs, for each sequence and each block."""


class Tile(NamedTuple):
    """One call: either some heads of one block of queries, or many blocks of one head with equally wide windows."""

    batch: slice
    """Which sequences."""
    heads: slice
    """Which query heads; one alone where there are several windows."""
    row: int
    """First query."""
    rows: int
    """Queries in a window."""
    windows: int
    """Number of windows; each begins `rows` queries and as many keys after the one before."""
    key: int
    """First key of the first window."""
    width: int
    """Keys in a window."""

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in each sequence."""
        return (self.heads.stop - self.heads.start) * self.windows * self.rows * self.width


@dataclass(frozen=True)
class HostVisibility(Visibility):
    """Which keys each query sees, with what its tensors say as numbers, read back from them."""

    documents: tuple[int, ...] = ()
    """Borders of documents, (0, Tk) when there is but one."""
    spans: tuple[tuple[int, int], ...] | None = None
    """For each sequence the range of keys outside of which all is padding; None without padding."""
    holes: Tensor | None = None
    """(B, Tk) bool, True where a key is padding; None when the spans say it all."""

    @staticmethod
    def read(seen: Visibility) -> "HostVisibility":
        """From what knows tensors alone."""
        length, padding, borders = seen.key_length, seen.key_padding_mask, seen.cu_seqlens
        documents = (0, length) if borders is None else tuple(borders.tolist())
        spans, holes = None, None
        if padding is not None and bool(padding.any()):
            visible = ~padding
            count = visible.sum(dim=-1)
            first = visible.byte().argmax(dim=-1)
            past = torch.where(count > 0, length - visible.flip(-1).byte().argmax(dim=-1), first)
            spans = tuple(zip(first.tolist(), past.tolist(), strict=True))
            holes = padding if bool((past - first != count).any()) else None
        tensors = (padding, borders)
        return HostVisibility(
            seen.query_length, length, seen.causal, seen.window_size, *tensors, documents, spans, holes
        )

    @property
    def may_hide_all_keys(self) -> bool:
        """Whether there may be a query that sees no key, and no tile for it."""
        return not self.sees_own_keys

    @property
    def sees_own_keys(self) -> bool:
        """Whether each query surely sees the key at its position."""
        are_in_documents = self.documents[0] <= 0 and self.documents[-1] >= self.key_length
        return self.spans is None and self.query_length <= self.key_length and are_in_documents

    @property
    def may_leave_rows_empty(self) -> bool:
        """Whether a tile may hold a query that sees none of its keys."""
        return self.holes is not None or (self.window_size is not None and self.may_hide_all_keys)


Cost = Callable[[int, int, int], float]
"""Time, in pairs of a query and a key, of so many lanes of so many rows and so many keys in one tile; measured."""


def kernel_cost(lanes: int, rows: int, width: int) -> float:
    """The cost with the flash kernel, which cuts queries into strips of 32, 64 and 256: wide ones are faster."""
    return CALL_COST + lanes * rows * width * (1.35 if rows < 192 else 0.9 if rows >= 768 else 1.0)


def reading_cost(lanes: int, rows: int, width: int) -> float:
    """The cost for few queries, in keys that are read; a thread takes whole lanes, while the others wait."""
    threads = torch.get_num_threads()
    return READING_CALL_COST + -(-lanes // threads) * threads * width


def product_cost(lanes: int, rows: int, width: int) -> float:
    """The cost with matrix products."""
    pairs = rows * width
    return lanes * (pairs + LANE_COST) if pairs >= WIDE_PAIRS else CALL_COST + lanes * pairs * NARROW_COST


class Block(NamedTuple):
    """Some queries of one head and the keys they need."""

    row: int
    """First query."""
    rows: int
    """Number of queries."""
    low: int
    """First key."""
    high: int
    """One past the last key."""

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key."""
        return self.rows * (self.high - self.low)


def plan(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    heads: Sequence[int],
    visibility: HostVisibility,
    ranges: Ranges,
    cost: Cost,
    *,
    largest: int | None,
) -> Iterator[Tile]:
    """Cover by few tiles all keys in the ranges of some heads; for a head without, all that are visible.

    With `largest` each sequence has tiles of its own, with several key heads only up to so many pairs.
    """
    group = q_shape[1] // k_shape[1]
    if not heads:
        return
    for part in _parts(q_shape[0], visibility, ranges, apart=largest is not None):
        unbounded = _blocks(part, visibility, None, cost)
        blocks = {
            head: _blocks(part, visibility, part.bounds[head], cost) if head in part.bounds else unbounded
            for head in heads
        }
        yield from _tiles(part.sequences, blocks, group, part.keys, visibility.offset, cost, largest)


def blocks_of_heads(
    batch: int, heads: Sequence[int], visibility: HostVisibility, ranges: Ranges
) -> dict[tuple[int, int], list[Block]]:
    """Cover what `plan` covers by the blocks of BLOCK_M queries: those of each sequence and head."""
    found: dict[tuple[int, int], list[Block]] = {}
    for part in _parts(batch, visibility, ranges, apart=True):
        starts = [part.rows[0], *range((part.rows[0] // BLOCK_M + 1) * BLOCK_M, part.rows[1], BLOCK_M)]
        unbounded = _blocks_of(starts, part, visibility, None)
        for head in heads:
            bounds = part.bounds.get(head)
            blocks = unbounded if bounds is None else _blocks_of(starts, part, visibility, bounds)
            found.setdefault((part.sequences.start, head), []).extend(blocks)
    return found


class _Part(NamedTuple):
    """A document, in sequences whose keys have the same span."""

    sequences: slice
    """Which sequences."""
    rows: tuple[int, int]
    """Its first query, and one past the last."""
    keys: tuple[int, int]
    """Likewise its keys."""
    bounds: dict[int, tuple[list[int], list[int]]]
    """By head, first key and one past the last that each block needs in any of the sequences."""


def _parts(batch: int, visibility: HostVisibility, ranges: Ranges, *, apart: bool) -> Iterator[_Part]:
    """Every document of every sequence, of all at once where they are alike unless they shall be apart."""
    if not batch:
        return
    whole = (0, visibility.key_length)
    if apart or visibility.spans is not None:
        spans = [(slice(b, b + 1), span) for b, span in enumerate(visibility.spans or [whole] * batch)]
    else:
        spans = [(slice(0, batch), whole)]
    for sequences, span in spans:
        bounds = {
            head: (_over_sequences(min, low[sequences]), _over_sequences(max, high[sequences]))
            for head, (low, high) in ranges.items()
        }
        for document in zip(visibility.documents[:-1], visibility.documents[1:], strict=True):
            keys = max(span[0], document[0]), min(span[1], document[1])
            rows = 0, visibility.query_length
            if len(visibility.documents) > 2:  # whose borders nobody has looked at where a program is compiled
                rows = max(document[0], 0), min(document[1], visibility.query_length)
            if visibility.causal:
                rows = max(rows[0], keys[0] - visibility.offset), rows[1]
            if keys[0] < keys[1] and rows[0] < rows[1]:
                yield _Part(sequences, rows, keys, bounds)


def _over_sequences(extreme: Callable[..., int], ends: list[list[int]]) -> list[int]:
    """The least or the greatest end of each block's range among some sequences."""
    return [extreme(of_block) for of_block in zip(*ends, strict=True)]


def _blocks(
    part: _Part, visibility: HostVisibility, bounds: tuple[list[int], list[int]] | None, cost: Cost
) -> list[Block]:
    """Cut the queries of one head into blocks, as many queries each as make the keys cheapest."""
    count = part.rows[1] - part.rows[0]
    steps = [step for step in BLOCK_ROWS if step < 2 * count] or BLOCK_ROWS[:1]  # others make one block
    choices = [_blocks_of(range(*part.rows, step), part, visibility, bounds) for step in steps]

    def work(blocks: list[Block]) -> float:
        """Without the cost of calls, which blocks may share."""
        sizes = [(block.rows, block.high - block.low) for block in blocks]
        return sum(cost(2, *size) - cost(1, *size) for size in sizes)

    return choices[0] if len(choices) == 1 else min(choices, key=work)  # few queries have no choice, and no time


def _blocks_of(
    starts: Sequence[int], part: _Part, visibility: HostVisibility, bounds: tuple[list[int], list[int]] | None
) -> list[Block]:
    """Blocks of queries that begin there, those that need a key."""
    offset, causal, window_size = visibility.offset, visibility.causal, visibility.window_size
    found = []
    for row, past_row in pairwise([*starts, part.rows[1]]):
        low, high = part.keys
        if causal:
            high = min(high, past_row + offset)
        if window_size is not None:
            low, high = max(low, row + offset - window_size + 1), min(high, past_row - 1 + offset + window_size)
        if bounds is not None:
            of_block = slice(row // BLOCK_M, (past_row - 1) // BLOCK_M + 1)
            low, high = max(low, min(bounds[0][of_block])), min(high, max(bounds[1][of_block]))
        low = max(part.keys[0], min(low, high + (low - high) // ALIGNED * ALIGNED))
        if low < high:
            found.append(Block(row, past_row - row, low, high))
    return found


def _tiles(
    batch: slice,
    blocks: dict[int, list[Block]],
    group: int,
    keys: tuple[int, int],
    offset: int,
    cost: Cost,
    largest: int | None,
) -> Iterator[Tile]:
    """Batch consecutive blocks of a head whose windows are alike, and heads whose blocks are."""
    alone: dict[tuple[int, int], list[tuple[int, Block]]] = {}
    for head, head_blocks in blocks.items():
        for run in _cut(head_blocks, lambda run: _run_cost(run, keys, offset, cost)):
            if len(run) == 1:
                alone.setdefault((run[0].row, run[0].rows), []).append((head, run[0]))
                continue
            before, width = _window(run, offset)
            row = run[0].row
            key = row + offset - before
            yield Tile(batch, slice(head, head + 1), row, run[0].rows, len(run), key, width)
    for (row, rows), members in alone.items():
        for call in _calls(members, group, cost, largest):
            low = min(block.low for _, block in call)
            high = max(block.high for _, block in call)
            yield Tile(batch, slice(call[0][0], call[-1][0] + 1), row, rows, 1, low, high - low)


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


def _window(run: list[Block], offset: int) -> tuple[int, int]:
    """How far before its first query's position the window of each block must begin, and how wide it must be."""
    before = max(block.row + offset - block.low for block in run)
    after = max(block.high - block.row - offset for block in run)
    return before, before + after


def _run_cost(run: list[Block], keys: tuple[int, int], offset: int, cost: Cost) -> float:
    """Work of one call for these blocks of one head; infinite where their windows cannot be a batch."""
    rows = run[0].rows
    before, width = _window(run, offset)
    if len(run) > 1:
        first, last = run[0].row, run[-1].row
        regular = run[-1].rows == rows and last - first == rows * (len(run) - 1)
        inside = first + offset - before >= keys[0] and last + offset - before + width <= keys[1]
        if not (regular and inside):
            return math.inf
    return cost(len(run), rows, width)


def _calls(
    members: list[tuple[int, Block]], group: int, cost: Cost, largest: int | None
) -> list[list[tuple[int, Block]]]:
    """Cut one block of queries of several heads into calls of adjacent heads, as few and as narrow as is cheapest."""
    least = [0.0]  # cost of the calls of the first 0, 1, ... members
    firsts = []  # who comes first in the last of these calls
    for past in range(1, len(members) + 1):
        last, block = members[past - 1]
        low, high, best, chosen = block.low, block.high, math.inf, past - 1
        for first in range(past - 1, -1, -1):
            head, block = members[first]
            low, high = min(low, block.low), max(high, block.high)
            too_large = largest is not None and (past - first) * block.rows * (high - low) > largest
            if last - head != past - 1 - first or ((too_large or group > 1) and head // group != last // group):
                break  # a call takes heads that lie evenly spaced in memory, as their keys do
            call = cost(past - first, block.rows, high - low)
            if call > best:
                break  # calls of more heads cost no less
            if least[first] + call <= best:
                best, chosen = least[first] + call, first
        least.append(best)
        firsts.append(chosen)
    calls, past = [], len(members)
    while past:
        calls.append(members[firsts[past - 1] : past])
        past = firsts[past - 1]
    return calls[::-1]


def pieces(tile: Tile) -> Iterator[Tile]:
    """Cut a tile into ones of one sequence with as many lanes as share a product: one lane alone where it is wide."""
    pairs = tile.rows * tile.width
    lanes = 1 if pairs >= WIDE_PAIRS else max(1, STRIP_PAIRS // pairs)
    for sequence in range(tile.batch.start, tile.batch.stop):
        one = tile._replace(batch=slice(sequence, sequence + 1))
        if tile.windows == 1:
            for head in range(tile.heads.start, tile.heads.stop, lanes):
                yield one._replace(heads=slice(head, min(head + lanes, tile.heads.stop)))
        else:
            for first in range(0, tile.windows, lanes):
                step = first * tile.rows
                yield one._replace(row=tile.row + step, key=tile.key + step, windows=min(lanes, tile.windows - first))


def strips(tile: Tile) -> Iterator[Tile]:
    """Cut a tile of one block of queries into ones with fewer keys; a tile of several windows is narrow already."""
    if tile.windows > 1:
        yield tile
        return
    width = max(1, STRIP_PAIRS // (tile.rows * ALIGNED)) * ALIGNED
    for first in range(0, tile.width, width):
        yield tile._replace(key=tile.key + first, width=min(width, tile.width - first))


def by_key_head(tiles: Iterable[Tile], group: int) -> list[list[Tile]]:
    """Tiles that are apart, those of each key head of each sequence together."""
    of_head: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        of_head.setdefault((tile.batch.start, tile.heads.start // group), []).append(tile)
    return list(of_head.values())
