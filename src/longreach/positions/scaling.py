"""How positions stretch past the length L trained on: one vocabulary, for our own methods and for pretrained models.

    none                            as trained
    linear, ntk, yarn               by max(1, L'/L), L' the length of the input
    linear-fixed=4, ntk-fixed=4     by L'/L = 4 at any length, as yarn-fixed=4
    linear+logn                     any of them, and logits q . k times max(1, log L' / log L)

ALiBi stretches by smaller slopes, which make far keys look nearer, rotary positions by lower frequencies. Linear
stretches all of them alike; ntk leaves the steepest slope, or the highest frequency, as it is. yarn is of rotary
positions alone: it leaves frequencies that turn often within L, stretches slow ones, and sharpens attention.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longreach.ops.arguments import (
    is_number,
    shown,
    validate_choice,
    validate_flags,
    validate_integer,
    validate_kind,
)
from longreach.reading import read_word

SCALINGS = ("none", "linear", "linear-fixed", "ntk", "ntk-fixed", "yarn", "yarn-fixed")
"""The names of all scalings."""

OF_SLOPES = ("none", "linear", "linear-fixed", "ntk", "ntk-fixed")
"""Those that slopes have."""


@dataclass(frozen=True)
class Scaling:
    """A scaling by name, with the numbers that it needs."""

    name: str
    """One of SCALINGS."""
    train_length: int | None = None
    """L, which "linear", "ntk", "yarn" and logn compare a length with, and both yarns count turns in; at least 2 for
    logn."""
    factor: float | None = None
    """L'/L, above 1, of the fixed ones."""
    logn: bool = False
    """Whether the logits q . k are multiplied with max(1, log L' / log L); the bias is left to the rest."""

    def __post_init__(self) -> None:
        validate_choice("name", self.name, SCALINGS)
        validate_flags(logn=self.logn)
        if self.train_length is not None:
            require_tokens("train_length", self.train_length, 2 if self.logn else 1)
        if (self.depends_on_length or self.kind == "yarn") and self.train_length is None:
            raise ValueError(f'train_length=None with scaling="{self}": give the length trained on, in tokens')
        if self.name.endswith("-fixed"):
            if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):
                raise ValueError(f'factor={self.factor!r} with scaling="{self.name}": give L\'/L, a number above 1')
            if not 1.0 < self.factor < math.inf:
                raise ValueError(f"factor={self.factor!r}: give a finite number above 1, by which positions stretch")
        elif self.factor is not None:
            raise ValueError(f'factor={self.factor!r} with scaling="{self.name}": only the fixed ones take one')

    @property
    def kind(self) -> str:
        """none, linear, ntk or yarn, by a fixed factor or not."""
        return self.name.removesuffix("-fixed")

    @property
    def by_length(self) -> bool:
        """Whether positions stretch with the length of the input."""
        return self.name in ("linear", "ntk", "yarn")

    @property
    def depends_on_length(self) -> bool:
        """Whether anything changes with the length of the input."""
        return self.by_length or self.logn

    def stretch(self, length: float) -> float:
        """L'/L, by which positions stretch at a length L' in tokens: at least 1. ValueError for what is no length."""
        _require_length(length)
        if self.train_length is not None and self.by_length:
            return max(1.0, length / self.train_length)
        return 1.0 if self.factor is None else self.factor

    def __call__(self, slopes: Tensor, length: float | Tensor) -> Tensor:
        """Scale the slopes of ALiBi for a length L'.

        linear (arXiv 2310.13017) is m_h L/L'; ntk is m_h (L'/L)^(-r_h / (R - 1)), where r_h is the rank of slope m_h
        among the R different slopes: the steepest, of rank 0, is kept and the shallowest fully interpolated. By ranks
        any head count works, also one whose slopes are not in order, and equal slopes stay equal. A single slope is
        fully interpolated.

        Args:
            slopes: (H,) floating point.
            length: L' in tokens: one number, or one per sequence, (B,).

        Returns:
            (H,), or (B, H) for a length per sequence.

        Raises:
            ValueError: it is yarn, which scales no slopes, slopes are no floating point, or length is no number.
        """
        self.require_slopes()
        validate_kind("slopes", slopes, Tensor, "a tensor (H,)")
        if not slopes.is_floating_point() or slopes.dim() != 1 or not len(slopes):
            raise ValueError(f"slopes of shape {tuple(slopes.shape)} and {slopes.dtype}: give (H,) floating point")
        _require_length(length)
        if self.name == "none":
            return slopes
        stretch: float | Tensor
        if self.train_length is not None and self.by_length:
            lengths = torch.as_tensor(length, device=slopes.device).to(slopes.dtype)
            stretch = (lengths / self.train_length).clamp(min=1.0)[..., None]  # [1] or [B, 1]
        else:
            stretch = self.factor or 1.0
        return slopes / stretch if self.kind == "linear" else slopes * stretch ** -_ntk_exponents(slopes)

    def require_slopes(self) -> None:
        """Check that it scales slopes.

        Raises:
            ValueError: it is yarn, which is of rotary positions alone.
        """
        if self.name not in OF_SLOPES:
            raise ValueError(
                f'scaling="{self}" scales the frequencies of rotary positions, and ALiBi has slopes: give one of '
                f"{', '.join(OF_SLOPES)}"
            )

    def logit_factor(self, length: float | Tensor) -> float | Tensor:
        """What the logits q . k are multiplied with at a length L': 1 without logn.

        Args:
            length: L' in tokens: one number, or one per sequence, (B,).

        Returns:
            One number, or (B,) float32 for a length per sequence.

        Raises:
            ValueError: length is no number.
        """
        _require_length(length)
        if not self.logn or self.train_length is None:
            return 1.0
        if isinstance(length, Tensor):
            return (length.to(torch.float32).log() / math.log(self.train_length)).clamp(min=1.0)
        return math.log(max(length, self.train_length)) / math.log(self.train_length)

    def __str__(self) -> str:
        """As `parse_scaling` reads it."""
        factor = "" if self.factor is None else f"={self.factor!r}".removesuffix(".0")
        return f"{self.name}{factor}{'+logn' if self.logn else ''}"


def parse_scaling(text: str, train_length: int | None = None) -> Scaling:
    """Read NAME[=FACTOR][+logn], as in `linear`, `linear-fixed=4` or `none+logn`.

    Args:
        text: what to read.
        train_length: L in tokens, which all need but "none" and the fixed ones of slopes.

    Raises:
        ValueError: it is none of these, or lacks a number.
    """
    base, plus, logn = text.partition("+")
    name, equals, number = base.partition("=")
    if name not in SCALINGS or bool(equals) != name.endswith("-fixed") or (plus and logn != "logn"):
        raise ValueError(
            f"scaling={text!r}: give one of {', '.join(SCALINGS)} (as in linear-fixed=4), and +logn after any of them"
        )
    try:
        scaling = Scaling(name, 2, read_word(float, number, "factor") if equals else None, logn=bool(logn))
    except ValueError as error:
        raise ValueError(f"scaling={text!r}: {error}") from error
    return replace(scaling, train_length=train_length)


def require_tokens(name: str, value: Any, least: int) -> None:
    """ValueError where a number of tokens is no integer of at least `least`."""
    validate_integer(name, value, least, f"an integer of at least {least}, in tokens")


def _require_length(length: float | Tensor) -> None:
    if torch.compiler.is_compiling() or isinstance(length, Tensor):  # lengths that are traced are to have no bound
        return
    if not (is_number(length) and 0 <= length < 2**63):
        raise ValueError(f"length={shown(length)}: give a number of tokens, or a tensor (B,) of them")


def _ntk_exponents(slopes: Tensor) -> Tensor:
    """The power of L'/L by which each slope (H,) falls: 0 for the steepest, 1 for the shallowest."""
    descending, order = slopes.sort(descending=True)
    ranks = torch.zeros_like(slopes)  # [H]
    ranks[order[1:]] = (descending[1:] < descending[:-1]).to(slopes.dtype).cumsum(0)
    highest = ranks.max()
    return torch.where(highest > 0, ranks / highest.clamp(min=1), torch.ones_like(ranks))
