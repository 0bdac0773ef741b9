"""Tokens of unequal texts without their padding, and who attends to whom among them."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.alibi import alibi_bias, alibi_slopes
from longreach.ops.attention import attention
from longreach.positions.scaling import Scaling


@dataclass(frozen=True)
class Heads:
    """How heads attend: softmax(q_i . k_j / sqrt(D) - m_h |i - j|)."""

    num_heads: int
    """H."""
    scaling: Scaling
    """How slopes change with the length of a text."""
    dropout_p: float = 0.0
    """Probability with which attention weights are dropped; 0 outside training."""


class Packed:
    """All texts one after another: what is made of a token, is made of no padding."""

    def __init__(self, lengths: tuple[int, ...], places: Tensor | None = None, shape: tuple[int, int] = (0, 0)) -> None:
        """Texts of `lengths` tokens, which stand at `places` (N,) of a flattened (B, T); at all of them when None."""
        self.lengths = lengths
        self._places = places
        self._shape = shape

    @staticmethod
    def of(attention_mask: Tensor | None, shape: tuple[int, int]) -> "Packed":
        """Texts padded to (B, T), 0 where a token is padding; ValueError where padding stands between tokens."""
        batch, length = shape
        if attention_mask is None:
            return Packed((length,) * batch, None, shape)
        if tuple(attention_mask.shape) != shape:
            raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: give that of the ids, {shape}")
        seen = attention_mask != 0
        lengths = seen.sum(dim=1)  # [B]
        borders = (seen[:, 1:] != seen[:, :-1]).sum(dim=1) + seen[:, 0] + seen[:, -1] if length else lengths
        if bool((borders > 2).any()):
            row = int((borders > 2).nonzero()[0])
            raise ValueError(f"attention_mask has padding between tokens in row {row}: pad at the ends alone")
        counts = tuple(lengths.tolist())
        places = None if min(counts, default=length) == length else seen.flatten().nonzero()[:, 0]
        return Packed(counts, places, shape)

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (N, ...)."""
        x = x.flatten(0, 1)
        return x if self._places is None else x[self._places]

    def scatter(self, x: Tensor) -> Tensor:
        """(N, C) to (B, T, C), zeros where there is padding."""
        if self._places is None:
            return x.unflatten(0, self._shape)
        batch, length = self._shape
        return x.new_zeros(batch * length, x.shape[-1]).index_copy(0, self._places, x).unflatten(0, self._shape)

    def first(self, x: Tensor) -> Tensor:
        """(N, C) to (B, C): the first token of each text, zeros for a text without tokens."""
        begins = accumulate(self.lengths, initial=0)
        rows = [(row, begin) for row, (begin, length) in enumerate(zip(begins, self.lengths, strict=False)) if length]
        to, where = torch.tensor(rows, dtype=torch.int64, device=x.device).view(-1, 2).unbind(1)
        return x.new_zeros(len(self.lengths), x.shape[1]).index_copy(0, to, x[where])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
        """Attention within each text, (N, C) each."""
        calls = list(self._calls(q.device, heads.scaling))
        if not calls:
            return q
        parts = zip(*(x.split([sum(lengths) for lengths in calls]) for x in (q, k, v)), strict=True)
        return torch.cat([_call(q, k, v, lengths, heads) for (q, k, v), lengths in zip(parts, calls, strict=True)])

    def _calls(self, device: torch.device, scaling: Scaling) -> Iterator[list[int]]:
        """Lengths of the texts of each call of attention.

        On the CPU, whose kernels work through one text after another, a call takes neighbours of one length; elsewhere
        all neighbours of the same slopes, with borders between them.
        """

        def alike(length: int) -> Hashable:
            known = max(length, 1)
            return length if device.type == "cpu" else (scaling.stretch(known), scaling.logit_factor(known))

        for _, lengths in groupby(self.lengths, key=alike):
            yield list(lengths)


class Dense:
    """All texts at their padded length, with a mask of T x T: for graphs, such as ONNX's, that are to serve any length.

    Outputs are those of `Packed`.
    """

    def __init__(self, attention_mask: Tensor | None) -> None:
        """Texts with 0 where a token is padding, (B, T), if any is."""
        self._seen = None if attention_mask is None else attention_mask != 0

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, ...) as it is."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """(B, T, C), zeros where there is padding."""
        return x if self._seen is None else x * self._seen[..., None].to(x.dtype)

    def first(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, C): the first token of each text, zeros for a text without tokens."""
        if self._seen is None:
            return x[:, 0]
        where = self._seen.int().argmax(dim=1)  # [B], of equals the first
        return self.scatter(x)[torch.arange(x.shape[0], device=x.device), where]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
        """Attention within each text, (B, T, C) each."""
        if heads.scaling.depends_on_length:
            raise ValueError(f'scaling="{heads.scaling}" depends on length: export with "none" or a fixed one')
        slopes = heads.scaling(alibi_slopes(heads.num_heads, device=q.device), 1)
        bias = alibi_bias(slopes, q.shape[1]).to(q.dtype)[None]  # [1, H, T, T]
        if self._seen is not None:
            bias = bias.masked_fill(~self._seen[:, None, None], torch.finfo(q.dtype).min)
        q, k, v = (x.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=heads.dropout_p)
        return out.transpose(1, 2).flatten(2)


def _call(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], heads: Heads) -> Tensor:
    """Attention within texts of some lengths, (N, C) each, whose slopes are the same."""
    equal = len(set(lengths)) == 1
    longest = max(lengths)
    if longest == 0:
        return q
    batch = len(lengths) if equal else 1
    q, k, v = (split_heads(x, batch, heads.num_heads) for x in (q, k, v))
    out = attention(
        q,
        k,
        v,
        slopes=heads.scaling(alibi_slopes(heads.num_heads, device=q.device), longest),
        causal=False,
        scale=q.shape[3] ** -0.5 * heads.scaling.logit_factor(longest),
        cu_seqlens=None if equal else torch.tensor([0, *accumulate(lengths)], device=q.device),
        dropout_p=heads.dropout_p,
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def split_heads(x: Tensor, batch: int, num_heads: int) -> Tensor:
    """(N, C) of texts of one length, or of one that holds others, to (B, H, T, D)."""
    return x.unflatten(0, (batch, -1)).unflatten(-1, (num_heads, -1)).transpose(1, 2)


Arrangement = Packed | Dense
"""Where the tokens of texts are, and who attends to whom."""
