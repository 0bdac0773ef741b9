"""Attention of one sequence that lies over many ranks: `context_parallel_attention`."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.arguments import (
    validate_borders,
    validate_choice,
    validate_documents,
    validate_flags,
    validate_slopes,
    validate_tensors,
    validate_types,
    validated_scale,
    validated_tolerance,
    validated_visibility,
)
from longreach.ops.attention import IMPLEMENTATIONS, attention, autocast
from longreach.ops.reach import default_tolerance
from longreach.parallel.agreement import agree
from longreach.parallel.exchange import Route, exchange
from longreach.parallel.line import Line, validate_carried
from longreach.parallel.needed import Common, Looking, first_keys, opening

Slopes = Tensor | tuple[Tensor, Tensor] | None
_Outcome = tuple[Tensor, Tensor | None]
"""Output, and LSE where it is wanted."""


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    slopes: Slopes = None,
    causal: bool = True,
    scale: float | None = None,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tolerance: float | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    slopes: Slopes = None,
    causal: bool = True,
    scale: float | None = None,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tolerance: float | None = None,
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    slopes: Slopes = None,
    causal: bool = True,
    scale: float | None = None,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tolerance: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`longreach.attention` of a sequence of which each rank of a group holds a piece.

    softmax(scale q_i . k_j - m_h |i - j|) v over all keys of the sequence, for the queries of this rank. Pieces follow
    each other in the order of the ranks, T = T_0 + T_1 + ..., and need not be of one length. Keys and values travel as
    far as each head's reach demands, their gradients come back (docs/reach.md, "Over many ranks"). All ranks call it,
    and all or none call the backward pass, those of several calls in the same order. Two runs agree to the last bit.

    Args:
        q: (B, H, T_r, D) of this rank's piece: float64, float32, bfloat16 or float16.
        k: (B, Hkv, T_r, D), the dtype and device of q; Hkv divides H.
        v: (B, Hkv, T_r, D), likewise.
        group: the process group; all processes when None.
        slopes: (H,) or (B, H), or a pair (left, right), the same on all ranks. May require a gradient, which on each
            rank is that of its own queries: their sum over the ranks is the whole.
        causal: whether a query sees only keys at or before its position.
        scale: factor of q . k; D**-0.5 when None.
        window_size: |i - j| < window_size is seen.
        key_padding_mask: (B, T_r) bool of this piece, True where a key is padding; on all ranks or on none. A query
            that sees no key of its own piece needs all that it sees of others.
        cu_seqlens: (N + 1,) borders of documents over the whole sequence, [0, ..., T], the same on all ranks.
        tolerance: probability mass per row that may be dropped: half of it by what does not travel, half by what each
            rank computes. None is the default of the dtype.
        return_lse: whether to return the LSE too.
        impl: as in `longreach.attention`, which each rank runs over what it has gathered.

    Returns:
        The output (B, H, T_r, D) in the dtype of q; with return_lse a pair of it and the LSE (B, H, T_r).

    Raises:
        ValueError: on all ranks, for what is wrong on one of them, as in `longreach.attention`, or where they disagree.
        RuntimeError: another rank ended, or is late beyond the time limit of the group.
    """

    def said() -> dict[str, str]:
        validate_types(q=q, k=k, v=v)
        validate_tensors(q, k, v)
        validate_carried(q, group)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q has {q.shape[2]} tokens, k has {k.shape[2]}: a piece has as many of both")
        validate_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
        validate_slopes(slopes, q)
        validated_scale(scale)
        validated_tolerance(tolerance)
        validated_visibility(q, k, causal, window_size, key_padding_mask, None)
        validate_flags(return_lse=return_lse)
        if cu_seqlens is not None:
            validate_documents(cu_seqlens, q)
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return {
            "B": str(q.shape[0]),
            "H": str(q.shape[1]),
            "Hkv": str(k.shape[1]),
            "D": str(q.shape[3]),
            "dtype": str(autocast(q[:0], k[:0], v[:0])[0].dtype),
            "device": q.device.type,
            "slopes": _word(slopes),
            "causal": str(causal),
            "scale": str(scale),
            "window_size": str(window_size),
            "tolerance": str(tolerance),
            "key_padding_mask": "None" if key_padding_mask is None else "given",
            "cu_seqlens": _word(cu_seqlens),
            "requires_grad": str(learns),
        }

    def told() -> Tensor:
        return opening(*autocast(q, k, v)[:2], key_padding_mask, factor())

    def factor() -> float:
        return q.shape[3] ** -0.5 if scale is None else scale

    line, openings = agree(group, lambda: q.shape[2], said, told)
    borders: tuple[int, ...] = (0, line.borders[-1])
    if cu_seqlens is not None:
        borders = tuple(cu_seqlens.tolist())
        validate_borders(borders, line.borders[-1])
    q, k, v = autocast(q, k, v)
    padding = None if key_padding_mask is None else _whole(key_padding_mask, line)
    piece = _Piece(q, k, v, line, borders, padding, Common.of(openings, q, k))
    tolerance = default_tolerance(q.dtype) if tolerance is None else tolerance
    causal = causal or window_size == 1
    bounds = _Bounds(
        scale=factor(),
        window_size=window_size,
        beyond=tolerance / (2 if causal else 4),
        tolerance=tolerance / 2,
        impl=impl,
    )
    out, lse = _attend(piece, slopes, bounds, causal, return_lse)
    return (out, lse) if return_lse else out  # type: ignore[return-value]  # an LSE that is wanted is there


@dataclass(frozen=True)
class _Bounds:
    """What limits who sees whom, and how exactly."""

    scale: float
    """Factor of q . k."""
    window_size: int | None
    """Keys at this distance and beyond are hidden."""
    beyond: float
    """Probability mass per row that may stay with other ranks, on one side."""
    tolerance: float
    """Probability mass per row that may be dropped of what was gathered."""
    impl: str
    """The implementation."""


@dataclass(frozen=True)
class _Piece:
    """What a rank holds of a sequence, along a line of ranks."""

    q: Tensor
    """(B, H, T, D)."""
    k: Tensor
    """(B, Hkv, T, D)."""
    v: Tensor
    """(B, Hkv, T, D)."""
    line: Line
    """The ranks."""
    borders: tuple[int, ...]
    """Of documents, over the whole sequence."""
    padding: Tensor | None
    """(B, T) bool, True where a key is padding, over the whole sequence."""
    common: Common
    """Of all pieces."""

    @property
    def _document(self) -> tuple[int, int]:
        """Where the document of the first token begins and ends."""
        number = bisect_right(self.borders, self.line.start)
        return self.borders[number - 1], self.borders[min(number, len(self.borders) - 1)]

    @property
    def rows(self) -> int:
        """How many of the first tokens are of a document that may have begun on an earlier rank."""
        return min(self._document[1], self.line.stop) - self.line.start

    def looking(self, causal: bool, window_size: int | None) -> Looking:
        """What these may see."""
        lowest = self._document[0] if window_size is None else max(self._document[0], self.line.start - window_size + 1)
        return Looking(self.line, self.rows, lowest, causal, window_size, self.hidden(self.line.start, self.line.stop))

    def hidden(self, first: int, past: int) -> Tensor | None:
        """Which keys are padding, from one position to another."""
        return None if self.padding is None else self.padding[:, first:past]

    def turn(self) -> "_Piece":
        """The same from the other end."""
        q, k, v = (x.flip(2) for x in (self.q, self.k, self.v))
        borders = tuple(self.borders[-1] - border for border in reversed(self.borders))
        padding = None if self.padding is None else self.padding.flip(1)
        return _Piece(q, k, v, self.line.turn(), borders, padding, self.common)

    def within(self, first: int, past: int, slopes: Slopes, bounds: _Bounds, causal: bool, wanted: bool) -> _Outcome:
        """Attention of some rows, which make up whole documents, among themselves."""
        rows = slice(first, past)
        cut = [border - self.line.start - first for border in self.borders]
        borders = dict.fromkeys([0, *(border for border in cut if 0 < border < past - first), past - first])
        documents = torch.tensor(list(borders), device=self.q.device) if len(borders) > 1 else None
        return _attention(
            bounds,
            wanted,
            *(x[:, :, rows] for x in (self.q, self.k, self.v)),
            slopes=slopes,
            causal=causal,
            window_size=bounds.window_size,
            key_padding_mask=self.hidden(self.line.start + first, self.line.start + past),
            cu_seqlens=documents,
        )


def _attend(piece: _Piece, slopes: Slopes, bounds: _Bounds, causal: bool, wanted: bool) -> _Outcome:
    """Output and, where it is wanted, LSE: of the first document here, of whole ones, and of the last."""
    rows, length = piece.rows, piece.q.shape[2]
    past, ahead = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    if causal:
        parts = [_look_back(piece, past, bounds, wanted, causal=True)]
        if rows < length:
            parts.append(piece.within(rows, length, past, bounds, True, wanted))
        return _side_by_side(parts)
    turned = piece.turn()
    both = None if past is None or ahead is None else (past, ahead)
    if rows == length:  # one document, which others may hold parts of on both sides
        sides = (
            _look_back(piece, past, bounds, True, causal=True),
            _turn(_look_back(turned, ahead, bounds, True, causal=True, strictly=True)),
        )
        return _join(*sides)
    first = _look_back(piece, both, bounds, wanted, causal=False)
    inner = piece.within(rows, length - turned.rows, both, bounds, False, wanted)
    last = _look_back(turned, None if both is None else both[::-1], bounds, wanted, causal=False)
    return _side_by_side([first, inner, _turn(last)])


def _look_back(
    piece: _Piece, slopes: Slopes, bounds: _Bounds, wanted: bool, *, causal: bool, strictly: bool = False
) -> _Outcome:
    """Attention of the first rows, those of one document, over all that they need of their piece and those before.

    Strictly, a row does not see its own key: then its keys end one earlier, and distances count from there.
    """
    looking = piece.looking(causal, bounds.window_size)
    line, rows = piece.line, looking.rows
    firsts = first_keys(piece.q, piece.k, slopes, looking, piece.common, scale=bounds.scale, tolerance=bounds.beyond)
    route = Route(line, firsts)
    q, gathered = exchange(piece.q, piece.k, piece.v, route, rows)
    window, group, last = bounds.window_size, q.shape[1] // piece.k.shape[1], line.start + rows
    if strictly and rows:
        window, last = None if window is None else window - 1, last - 1
    parts = []
    for kv_heads, pair in zip(route.groups, gathered, strict=True):
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        first = firsts[line.place][kv_heads.start]
        parts.append(
            _attention(
                bounds,
                wanted,
                q[:, heads, :rows],
                *(x[:, :, : last - first] for x in pair),
                slopes=_of_heads(slopes, heads),
                causal=causal,
                window_size=window,
                key_padding_mask=piece.hidden(first, last),
            )
        )
    out, lse = torch.cat([part[0] for part in parts], dim=1), None
    if wanted:
        lse = torch.cat([part[1] for part in parts if part[1] is not None], dim=1)
        if strictly and isinstance(slopes, Tensor):
            lse = lse - slopes.to(lse.dtype)[..., None]
    return out, lse


def _attention(bounds: _Bounds, wanted: bool, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> _Outcome:
    options |= {"scale": bounds.scale, "tolerance": bounds.tolerance, "impl": bounds.impl}
    if wanted:
        return attention(q, k, v, return_lse=True, **options)
    return attention(q, k, v, **options), None


def _whole(padding: Tensor, line: Line) -> Tensor:
    """The padding (B, T) of the whole sequence."""
    most = max(line.lengths)
    gathered = line.gather(F.pad(padding, (0, most - padding.shape[1])))
    return torch.cat([x[:, :length] for x, length in zip(gathered, line.lengths, strict=True)], dim=1)


def _of_heads(slopes: Slopes, heads: slice) -> Slopes:
    if isinstance(slopes, tuple):
        return slopes[0][..., heads], slopes[1][..., heads]
    return None if slopes is None else slopes[..., heads]


def _turn(outcome: _Outcome) -> _Outcome:
    out, lse = outcome
    return out.flip(2), None if lse is None else lse.flip(2)


def _side_by_side(parts: list[_Outcome]) -> _Outcome:
    """Outcomes of rows after rows."""
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat(lses, dim=2) if lses else None


def _join(*sides: _Outcome) -> _Outcome:
    """The outcome over the keys of all sides, given that of each with its LSE; a row may see no key of a side."""
    outs, lses = zip(*sides, strict=True)
    lse = torch.stack(lses)  # [sides, B, H, T]
    peak = lse.detach().amax(dim=0).clamp(min=torch.finfo(lse.dtype).min)
    shares = (lse - peak).exp()
    total = shares.sum(dim=0).clamp(min=torch.finfo(lse.dtype).tiny)
    out = sum(out * share[..., None] for out, share in zip(outs, shares / total, strict=True))
    nothing = lse.isneginf().all(dim=0)
    return out.to(outs[0].dtype), (total.log() + peak).masked_fill(nothing, float("-inf"))


def _word(value: object) -> str:
    """What two ranks give alike, in words."""
    if isinstance(value, tuple):
        return ", ".join(map(_word, value))
    return str(value.tolist() if isinstance(value, Tensor) else value)
