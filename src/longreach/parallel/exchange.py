"""Keys and values on their way to the ranks that need them, their gradients on the way back, and what both weigh."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longreach.parallel.line import Line


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one layer, and what other ways would have it send, on average over ranks."""

    forward: tuple[int, ...]
    """Keys and values, by key head."""
    backward: tuple[int, ...]
    """Gradients of keys and values that came from other ranks, by key head."""
    bound: int
    """The numbers that say which keys are needed."""
    all_gather: int
    """An all-gather of keys and values, and a reduce-scatter of their gradients."""
    ring: int
    """A ring, around which all keys and values go, in the backward pass once more, and their gradients with them until
    they are where they belong."""

    def __add__(self, other: "Traffic") -> "Traffic":
        """That of both, in one layer."""
        forward, backward = (
            tuple(a + b for a, b in zip(*pair, strict=True))
            for pair in ((self.forward, other.forward), (self.backward, other.backward))
        )
        return Traffic(
            forward, backward, self.bound + other.bound, self.all_gather + other.all_gather, self.ring + other.ring
        )


_counts: ContextVar[tuple[list[Traffic], ...]] = ContextVar("counts", default=())
"""Where what is sent is counted."""


@contextmanager
def count_traffic(calls: list[Traffic] | None = None) -> Iterator[list[Traffic]]:
    """Count what calls of `context_parallel_attention` inside of the block send: a list that grows with them.

    A causal call adds one entry, another one two, for each way in which its rows look; its backward pass, whenever that
    is, as many.

    Args:
        calls: the list; a new one when None.
    """
    calls = [] if calls is None else calls
    token = _counts.set((*_counts.get(), calls))
    try:
        yield calls
    finally:
        _counts.reset(token)


@dataclass(frozen=True)
class Route:
    """Which keys travel where along a line: to each rank, of each key head, those from its first one to its piece."""

    line: Line
    """The ranks."""
    firsts: list[list[int]]
    """Position of the first key that each rank needs, by place and key head."""

    @property
    def groups(self) -> list[slice]:
        """Key heads side by side of which this rank needs as many keys."""
        firsts = self.firsts[self.line.place]
        starts = [head for head, first in enumerate(firsts) if head == 0 or first != firsts[head - 1]]
        return [slice(*ends) for ends in pairwise([*starts, len(firsts)])]

    def parts(self, source: int, target: int) -> list[slice]:
        """Which keys of a piece travel to another, of each head: numbers within the piece, an empty slice for none."""
        start, stop = self.line.borders[source : source + 2]
        length = stop - start
        if source >= target:
            return [slice(length, length) for _ in self.firsts[target]]
        return [slice(min(max(first - start, 0), length), length) for first in self.firsts[target]]

    def traffic(self, shape: torch.Size, dtype: torch.dtype, *, back: bool) -> Traffic:
        """What it weighs, with keys of the shape (B, Hkv, T, D) on this rank: on the way back that of gradients."""
        line, (batch, num_heads, length, head_dim) = self.line, shape
        each = 2 * batch * head_dim * dtype.itemsize  # a key and its value
        here, places = line.place, range(line.size)
        parts = [self.parts(place, here) if back else self.parts(here, place) for place in places]
        sent = tuple(each * sum(part.stop - part.start for part in of_head) for of_head in zip(*parts, strict=True))
        piece, others = each * num_heads * length, line.size - 1
        if back:
            return Traffic((0,) * num_heads, sent, 0, others * piece, (others + line.size) * piece)
        return Traffic(sent, (0,) * num_heads, line.gathered, others * piece, others * piece)


def exchange(q: Tensor, k: Tensor, v: Tensor, route: Route, rows: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Keys and values that the first rows of this piece need, for each of the route's groups of heads.

    Differentiable; all ranks must call it, and then the backward pass.

    Args:
        q: (B, H, T, D), handed through: what is computed from it has the backward pass of the exchange in its graph,
            which other ranks wait for, even where it reads no key.
        k: (B, Hkv, T, D).
        v: (B, Hkv, T, D).
        route: what travels.
        rows: how many of this rank's own keys come last.

    Returns:
        q, and keys and values (B, heads of the group, from its first key to the last of the rows, D).
    """
    q, *found = _Exchange.apply(q, k, v, route, rows)
    return q, list(zip(found[::2], found[1::2], strict=True))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, route: Route, rows: int) -> tuple[Tensor, ...]:
        line = route.line
        ctx.route, ctx.rows, ctx.shape, ctx.dtype, ctx.counts = route, rows, k.shape, k.dtype, _counts.get()
        for calls in ctx.counts:
            calls.append(route.traffic(k.shape, k.dtype, back=False))
        found = []
        for heads in route.groups:
            length = line.start + rows - route.firsts[line.place][heads.start]
            for x in (k, v):
                whole = x.new_empty(x.shape[0], heads.stop - heads.start, length, x.shape[3])
                whole[:, :, length - rows :] = x[:, heads, :rows]
                found.append(whole)
        outgoing = {target: list(_taken(k, v, route, target)) for target in range(line.place + 1, line.size)}
        arriving = {source: list(_kept(found, route, source)) for source in range(line.place)}
        for source, parts in _swap(line, outgoing, arriving, "keys and values"):
            for place, part in zip(arriving[source], parts, strict=True):
                place.copy_(part)
        return q, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, *of_found: Tensor) -> tuple[Tensor | None, ...]:
        route, rows, line = ctx.route, ctx.rows, ctx.route.line
        for calls in ctx.counts:
            calls.append(route.traffic(ctx.shape, ctx.dtype, back=True))
        wide = torch.promote_types(ctx.dtype, torch.float32)
        of_k, of_v = (of_q.new_zeros(ctx.shape, dtype=wide) for _ in range(2))
        for heads, pair in zip(route.groups, zip(of_found[::2], of_found[1::2], strict=True), strict=True):
            for total, gradient in zip((of_k, of_v), pair, strict=True):
                total[:, heads, :rows] += gradient[:, :, gradient.shape[2] - rows :]
        outgoing = {source: list(_kept(of_found, route, source)) for source in range(line.place)}
        arriving = {target: list(_taken(of_k, of_v, route, target)) for target in range(line.place + 1, line.size)}
        # Sums in the order of the line, so that two runs agree to the last bit.
        for target, parts in _swap(line, outgoing, arriving, "gradients of keys and values", ctx.dtype):
            for place, part in zip(arriving[target], parts, strict=True):
                place += part
        return of_q, of_k.to(ctx.dtype), of_v.to(ctx.dtype), None, None


def _taken(k: Tensor, v: Tensor, route: Route, target: int) -> Iterator[Tensor]:
    """What another rank needs of k and v, or their gradients, (B, Hkv, T, D): views (B, n, D), a pair for each head."""
    for head, part in enumerate(route.parts(route.line.place, target)):
        yield from (x[:, head, part] for x in (k, v))


def _kept(found: Sequence[Tensor], route: Route, source: int) -> Iterator[Tensor]:
    """Where what came from another rank stands among keys and values of groups, or their gradients: views likewise."""
    place, start = route.line.place, route.line.borders[source]
    parts = route.parts(source, place)
    for heads, pair in zip(route.groups, zip(found[::2], found[1::2], strict=True), strict=True):
        for head in range(heads.start, heads.stop):
            first = route.firsts[place][head]
            there = slice(start + parts[head].start - first, start + parts[head].stop - first)
            yield from (x[:, head - heads.start, there] for x in pair)


def _swap(
    line: Line,
    outgoing: Mapping[int, Sequence[Tensor]],
    arriving: Mapping[int, Sequence[Tensor]],
    what: str,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, list[Tensor]]]:
    """Send tensors to each place as one message, and yield what came from each, of the shapes of `arriving`."""
    messages = {place: torch.cat([x.flatten() for x in parts]) for place, parts in outgoing.items()}
    receipts = {
        place: parts[0].new_empty(sum(x.numel() for x in parts), dtype=dtype or parts[0].dtype)
        for place, parts in arriving.items()
    }
    line.swap(_filled(messages), _filled(receipts), what)
    for place, numbers in receipts.items():
        parts = arriving[place]
        split = numbers.split([x.numel() for x in parts])
        yield place, [flat.view(x.shape) for flat, x in zip(split, parts, strict=True)]


def _filled(messages: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Those that are not empty: nothing is sent where nothing is needed."""
    return {place: x for place, x in messages.items() if x.numel()}
