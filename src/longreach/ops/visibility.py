"""Who sees whom: which keys each query may attend to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees: what stands behind four arguments of `longreach.attention`, which validates them.

    Queries are aligned with the last keys: query number r stands at position r + Tk - Tq.
    """

    query_length: int
    """Tq."""
    key_length: int
    """Tk."""
    causal: bool = True
    """Whether keys after the query are hidden."""
    window_size: int | None = None
    """Keys at this distance and beyond are hidden."""
    key_padding_mask: Tensor | None = None
    """(B, Tk) bool, True where a key is padding, hidden from all."""
    cu_seqlens: Tensor | None = None
    """(N + 1,) borders of packed documents; keys of other documents are hidden. Tq = Tk then."""
    document: Tensor | None = field(init=False, default=None, repr=False)
    """(Tk,) number of each token's document, from 1 on; None without borders."""

    def __post_init__(self) -> None:
        if self.cu_seqlens is not None:
            positions = torch.arange(self.key_length, device=self.cu_seqlens.device)
            object.__setattr__(self, "document", torch.bucketize(positions, self.cu_seqlens, right=True))

    @property
    def offset(self) -> int:
        """Position of query 0."""
        return self.key_length - self.query_length

    @property
    def are_last(self) -> bool:
        """Whether no query sees keys after it, all being of one document: that of a single one they surely are."""
        return self.cu_seqlens is None and (self.causal or self.query_length == 1)

    @property
    def hides_past(self) -> bool:
        """Whether keys before a query may be hidden from it."""
        return not (self.window_size is None and self.key_padding_mask is None and self.cu_seqlens is None)

    def near(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Whether each query sees each key but for padding, of broadcast positions in [0, Tk); None where all do."""
        visible = []
        if (self.causal and self.query_length > 1) or self.window_size is not None:
            distance = queries - keys
            if self.causal and self.query_length > 1:  # a single query stands at the last key
                visible.append(distance >= 0)
            if self.window_size is not None:
                visible.append(distance.abs() < self.window_size)
        if self.document is not None:
            visible.append(self.document[queries] == self.document[keys])
        return _all(visible)

    def dense(
        self,
        device: torch.device,
        rows: slice | None = None,
        keys: slice | None = None,
        *,
        batch: slice = slice(None),
    ) -> Tensor | None:
        """Whether each of some queries, or of all, sees each key: bool, broadcastable to (B, H, Tq, Tk); None for yes.

        `rows` are numbers of queries, `keys` positions, `batch` sequences.
        """
        rows, keys = rows or slice(0, self.query_length), keys or slice(0, self.key_length)
        near = None
        if self.window_size is not None or self.cu_seqlens is not None or (self.causal and self.query_length > 1):
            queries = torch.arange(rows.start + self.offset, rows.stop + self.offset, device=device)[:, None]
            near = self.near(queries, torch.arange(keys.start, keys.stop, device=device))  # [Tq, Tk]
        shown = None if self.key_padding_mask is None else ~self.key_padding_mask[batch, None, None, keys]
        return _all([condition for condition in (near, shown) if condition is not None])


def without_padding(k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v with zeros where a key is padding: what stands there is unset memory perhaps, and 0 * NaN is NaN."""
    if key_padding_mask is None:
        return k, v
    padding = key_padding_mask[:, None, :, None]  # [B, 1, Tk, 1]
    return k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)


def _all(conditions: list[Tensor]) -> Tensor | None:
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible
