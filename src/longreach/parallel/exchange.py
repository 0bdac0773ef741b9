"""Keys and values on their way to the ranks that need them, their gradients on the way back, and what both weigh."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longreach.parallel.line import Line, stretches


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends and receives in one call, of one layer."""

    sent: tuple[int, ...]
    """Keys and values sent, by key head."""
    received: tuple[int, ...]
    """Keys and values received, by key head; a backward pass sends back as many bytes of gradients."""
    bound: int
    """Sent of the numbers that say which keys are needed."""
    all_gather: int
    """What an all-gather of all keys and values has this rank send, and a ring on average."""

    def __add__(self, other: "Traffic") -> "Traffic":
        """That of both calls, of one layer."""
        sent, received = (
            tuple(a + b for a, b in zip(*pair, strict=True))
            for pair in ((self.sent, other.sent), (self.received, other.received))
        )
        return Traffic(sent, received, self.bound + other.bound, self.all_gather + other.all_gather)


_counts: ContextVar[list[Traffic] | None] = ContextVar("counts", default=None)


@contextmanager
def count_traffic() -> Iterator[list[Traffic]]:
    """Count what each call of `context_parallel_attention` inside of the block sends: a list that grows with them.

    A causal call adds one entry, another one two, for each way in which its rows look. A block around it has them too,
    once this one ends.
    """
    calls: list[Traffic] = []
    around = _counts.get()
    token = _counts.set(calls)
    try:
        yield calls
    finally:
        _counts.reset(token)
        if around is not None:
            around.extend(calls)


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
        return list(stretches(self.firsts[self.line.place]))

    def parts(self, source: int, target: int) -> list[slice]:
        """Which keys of a piece travel to another, of each head: numbers within the piece, an empty slice for none."""
        start, stop = self.line.borders[source : source + 2]
        length = stop - start
        if source >= target:
            return [slice(length, length) for _ in self.firsts[target]]
        return [slice(min(max(first - start, 0), length), length) for first in self.firsts[target]]

    def traffic(self, k: Tensor) -> Traffic:
        """What it weighs, for keys (B, Hkv, T, D) of this rank."""
        line = self.line
        each = 2 * k.shape[0] * k.shape[3] * k.itemsize  # a key and its value
        sent = [self.parts(line.place, target) for target in range(line.size)]
        received = [self.parts(source, line.place) for source in range(line.size)]
        heads_sent, heads_received = (
            tuple(each * sum(part.stop - part.start for part in parts) for parts in zip(*by_place, strict=True))
            for by_place in (sent, received)
        )
        all_gather = each * k.shape[1] * k.shape[2] * (line.size - 1)
        return Traffic(heads_sent, heads_received, bound=line.gathered, all_gather=all_gather)


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
    calls = _counts.get()
    if calls is not None:
        calls.append(route.traffic(k))
    q, *found = _Exchange.apply(q, k, v, route, rows)
    return q, list(zip(found[::2], found[1::2], strict=True))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, route: Route, rows: int) -> tuple[Tensor, ...]:
        line = route.line
        ctx.route, ctx.rows, ctx.shape, ctx.dtype = route, rows, k.shape, k.dtype
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
