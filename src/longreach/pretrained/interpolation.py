"""Slopes for inputs longer than those trained on: position interpolation of ALiBi and its alternatives.

A scaling is a pure function (slopes, L, L') -> slopes, L the length trained on and L' the length wanted. The slopes
change only when L' > L, and then they fall: a smaller slope makes far keys look nearer. The one exception is
"linear-fixed", which divides them by a factor at any length.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longreach.pretrained.lengths import require_tokens


def linear(slopes: Tensor, train_length: float, length: float | Tensor) -> Tensor:
    """Position interpolation (arXiv 2310.13017): m_h min(1, L/L').

    Args:
        slopes: (H,) floating point.
        train_length: L, in tokens.
        length: L', in tokens: one number, or one per sequence, (B,).

    Returns:
        (H,), or (B, H) for a length per sequence.
    """
    return slopes / _stretch(slopes, train_length, length)


def ntk(slopes: Tensor, train_length: float, length: float | Tensor) -> Tensor:
    """NTK-ALiBi: m_h (L'/L)^(-r_h / (R - 1)), where r_h is the rank of slope m_h among the R different slopes.

    The steepest slope, of rank 0, is kept and the shallowest fully interpolated. By ranks any head count works, also
    one whose slopes are not in order, and equal slopes stay equal. A single slope is fully interpolated.

    Args:
        slopes: (H,) floating point.
        train_length: L, in tokens.
        length: L', in tokens: one number, or one per sequence, (B,).

    Returns:
        (H,), or (B, H) for a length per sequence.
    """
    descending, order = slopes.sort(descending=True)
    ranks = torch.zeros_like(slopes)  # [H]
    ranks[order[1:]] = (descending[1:] < descending[:-1]).to(slopes.dtype).cumsum(0)
    highest = ranks.max()
    exponents = torch.where(highest > 0, ranks / highest.clamp(min=1), torch.ones_like(ranks))
    return slopes * _stretch(slopes, train_length, length) ** -exponents


def logn_factor(train_length: float, length: float | Tensor) -> float | Tensor:
    """What logn multiplies the logits q . k with: max(1, log L' / log L); the bias is left to the scaling.

    Args:
        train_length: L, in tokens, at least 2.
        length: L', in tokens: one number, or one per sequence, (B,).

    Returns:
        One number, or (B,) float32 for a length per sequence.
    """
    if isinstance(length, Tensor):
        return (length.to(torch.float32).log() / math.log(train_length)).clamp(min=1.0)
    return max(1.0, math.log(length) / math.log(train_length))


def _stretch(slopes: Tensor, train_length: float, length: float | Tensor) -> Tensor:
    """max(1, L'/L), (1,) or (B, 1)."""
    length = torch.as_tensor(length, device=slopes.device)
    return (length.to(slopes.dtype) / train_length).clamp(min=1.0)[..., None]


_BY_LENGTH: dict[str, Callable[[Tensor, float, float | Tensor], Tensor]] = {"linear": linear, "ntk": ntk}
"""Name of a scaling that depends on L' -> its function."""

SCALINGS = ("none", "linear", "linear-fixed", "ntk")
"""The names of all scalings."""


@dataclass(frozen=True)
class Scaling:
    """A scaling by name, with the numbers that it needs."""

    name: str
    """One of SCALINGS."""
    train_length: int | None = None
    """L, at least 2, which "linear" and "ntk" compare a length with."""
    factor: float | None = None
    """L'/L, above 1, of "linear-fixed"."""

    def __post_init__(self) -> None:
        if self.name not in SCALINGS:
            raise ValueError(f"scaling={self.name!r}: give one of {', '.join(SCALINGS)}")
        if self.train_length is not None:
            require_tokens("train_length", self.train_length, 2)
        if self.depends_on_length and self.train_length is None:
            raise ValueError(f'train_length=None with scaling="{self.name}": give the length trained on, in tokens')
        if self.name == "linear-fixed":
            if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):
                raise ValueError(f'factor={self.factor!r} with scaling="linear-fixed": give L\'/L, a number above 1')
            if not 1.0 < self.factor < float("inf"):
                raise ValueError(f"factor={self.factor!r}: give a finite number above 1, by which slopes are divided")
        elif self.factor is not None:
            raise ValueError(f'factor={self.factor!r} with scaling="{self.name}": only "linear-fixed" takes one')

    @property
    def depends_on_length(self) -> bool:
        """Whether the slopes change with the length of the input."""
        return self.name in _BY_LENGTH

    def __call__(self, slopes: Tensor, length: float | Tensor) -> Tensor:
        """Scale slopes (H,) for a length L' in tokens, or one per sequence, (B,): (H,) or (B, H)."""
        if self.train_length is not None and self.depends_on_length:
            return _BY_LENGTH[self.name](slopes, self.train_length, length)
        return slopes if self.factor is None else slopes / self.factor


def read_alibi_scaling(alibi_scaling: Mapping[str, Any] | None) -> Scaling:
    """Read the `alibi_scaling` of a configuration in the schema of BTLM.

    Args:
        alibi_scaling: None, or exactly {"type": "linear", "factor": float above 1}, which divides the slopes at any
            length, or {"type": "linear", "train_seq_len": int above 1}, which scales by the length of the input.

    Returns:
        The scaling: "none", "linear-fixed" or "linear".

    Raises:
        ValueError: anything else, named.
    """
    if alibi_scaling is None:
        return Scaling("none")
    if not isinstance(alibi_scaling, Mapping):
        raise ValueError(f'alibi_scaling={alibi_scaling!r}: give a mapping with "type" and one number, or None')
    fields = dict(alibi_scaling)
    for name in fields:
        if name not in ("type", "factor", "train_seq_len"):
            raise ValueError(f'alibi_scaling has the field {name!r}: give "type" and one of "factor", "train_seq_len"')
    if fields.get("type") != "linear":
        raise ValueError(f'alibi_scaling has type={fields.get("type")!r}: the one type of its schema is "linear"')
    if len(fields) != 2:
        raise ValueError(f'alibi_scaling={fields!r}: beside "type" give exactly one of "factor", "train_seq_len"')
    if "factor" in fields:
        factor = fields["factor"]
        if not isinstance(factor, float) or not 1.0 < factor < float("inf"):
            raise ValueError(f"alibi_scaling has factor={factor!r}: give a finite float above 1.0")
        return Scaling("linear-fixed", factor=factor)
    require_tokens("alibi_scaling has train_seq_len", fields["train_seq_len"], 2)
    return Scaling("linear", train_length=fields["train_seq_len"])


def write_alibi_scaling(scaling: Scaling) -> dict[str, Any] | None:
    """Write a scaling as `alibi_scaling` in the schema of BTLM; `read_alibi_scaling` reads it back.

    Raises:
        ValueError: the schema has no place for this scaling.
    """
    if scaling.name == "none":
        return None
    if scaling.name == "linear-fixed":
        return {"type": "linear", "factor": float(scaling.factor or 0.0)}
    if scaling.name == "linear":
        return {"type": "linear", "train_seq_len": scaling.train_length}
    raise ValueError(f'scaling="{scaling.name}": alibi_scaling can hold "none", "linear" and "linear-fixed" only')
