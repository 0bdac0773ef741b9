"""Golden values: the dialects of ALiBi, and slopes, biases and attention in each, in float64."""

import decimal
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longreach.ops.alibi import validate_heads, validate_lengths
from longreach.ops.arguments import (
    shown,
    validate_choice,
    validate_flags,
    validate_kind,
    validate_tensors,
    validate_types,
)
from longreach.ops.attention import attention


@dataclass(frozen=True)
class Dialect:
    """How an implementation writes ALiBi down; by default as the paper does, softmax(q.k / sqrt(D) - m (i - j))."""

    positions: Literal["relative", "first", "last"] = "relative"
    """What the bias is made from: each query's distance to each key, or the key's position alone, counted from the
    first key that is no padding (BLOOM, Falcon) or back from the last key (MPT). In exact numbers they differ by a
    constant per query, which softmax removes; once rounded they do not."""
    bias_before_scale: bool = False
    """Whether the scores are (q.k + bias) * scale, as in Falcon, instead of q.k * scale + bias."""
    mup_scale: bool = False
    """Whether the scale is 1 / D, as in BTLM and JAIS (muP), instead of 1 / sqrt(D)."""
    causal: bool = True
    """False for encoders: -m |i - j| over past and future (JinaBERT, MosaicBERT, DNABERT-2)."""
    factors_dtype: torch.dtype | None = None
    """What slopes and positions are rounded to before they are multiplied; not rounded when None."""
    bias_dtype: torch.dtype | None = None
    """What their product is rounded to; not rounded, but to float32 at most, when None."""

    def __post_init__(self) -> None:
        validate_choice("positions", self.positions, ("relative", "first", "last"))
        validate_flags(bias_before_scale=self.bias_before_scale, mup_scale=self.mup_scale, causal=self.causal)
        if not self.causal and self.positions != "relative":
            raise ValueError(f"positions={self.positions!r} with causal=False: |i - j| needs the relative form")
        for name in ("factors_dtype", "bias_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (
                isinstance(dtype, torch.dtype) and dtype in (torch.float32, torch.bfloat16, torch.float16)
            ):
                raise ValueError(f"{name}={shown(dtype)}: give torch.float32, torch.bfloat16, torch.float16 or None")

    @property
    def rounded(self) -> bool:
        """Whether the bias is rounded below float32."""
        return not {self.factors_dtype, self.bias_dtype} <= {None, torch.float32}

    @property
    def score(self) -> str:
        """What the bias is added to, in words."""
        root = "D" if self.mup_scale else "sqrt(D)"
        return f"(q.k + bias) / {root}" if self.bias_before_scale else f"q.k / {root} + bias"

    @property
    def bias(self) -> str:
        """What the bias is made from, in words, and what it is rounded to."""
        made = {
            "relative": "-slope * distance",
            "first": "slope * position of the key",
            "last": "slope * (position of the key - the last one)",
        }[self.positions]
        dtype = self.factors_dtype or self.bias_dtype
        return made if dtype is None else f"{made}, in {str(dtype).removeprefix('torch.')}"

    def scale(self, head_dim: int) -> float:
        """The factor of the scores."""
        return 1.0 / head_dim if self.mup_scale else head_dim**-0.5


DIALECTS = {
    "relative": Dialect(),
    "bloom": Dialect(positions="first"),
    "bloom-bf16": Dialect(positions="first", bias_dtype=torch.bfloat16),
    "bloom-fp16": Dialect(positions="first", bias_dtype=torch.float16),
    "mpt": Dialect(positions="last"),
    "falcon": Dialect(positions="first", bias_before_scale=True, factors_dtype=torch.bfloat16),
    "btlm": Dialect(mup_scale=True),
    "encoder": Dialect(causal=False),
}
"""Dialects by name: the paper's equation, and what published models compute."""


def golden_slopes(num_heads: int) -> Tensor:
    """Slopes by the rule of the paper's code, each the float64 nearest to the exact value.

    With p the largest power of two up to H, head number r < p has the slope 2^(-8 (r + 1) / p), and head p + r the
    slope 2^(-8 (r + 1/2) / p).

    Args:
        num_heads: H, at least 1.

    Returns:
        (H,) float64.

    Raises:
        ValueError: num_heads is no positive integer, or more than any model has.
    """
    num_heads = validate_heads("num_heads", num_heads, "a positive integer")
    return torch.tensor(_exact_slopes(num_heads), dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _exact_slopes(num_heads: int) -> tuple[float, ...]:
    power = 1 << (num_heads.bit_length() - 1)
    halves = [2 * rank + 2 for rank in range(power)] + [2 * rank + 1 for rank in range(num_heads - power)]
    with decimal.localcontext(prec=25):
        return tuple(float(decimal.Decimal(2) ** (decimal.Decimal(-4 * half) / power)) for half in halves)


def golden_bias(
    num_heads: int,
    query_length: int,
    key_length: int,
    key_padding_mask: Tensor | None = None,
    dialect: Dialect | None = None,
) -> Tensor:
    """The bias of a dialect, before the scale where the dialect adds it there. It hides no key.

    Args:
        num_heads: H.
        query_length: Tq; queries are aligned with the last keys.
        key_length: Tk.
        key_padding_mask: (B, Tk) bool, True where a key is padding.
        dialect: the paper's equation when None.

    Returns:
        (B, H, Tq, Tk) float64; B is 1 without a mask.

    Raises:
        ValueError: a number is out of range, the mask is not bool or not of Tk keys, or the dialect is none.
    """
    golden_slopes(num_heads)  # refuses what is no number of heads
    query_length, key_length = validate_lengths(query_length, key_length)
    _validate_padding(key_padding_mask, key_length)
    return reading_of(dialect).bias(num_heads, query_length, key_length, key_padding_mask)


def golden_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, dialect: Dialect | None = None
) -> Tensor:
    """Attention in a dialect, computed in float64 by its definition: softmax(scale q.k + bias) v.

    Args:
        q: (B, H, Tq, D) float64, float32, bfloat16 or float16; queries are aligned with the last keys.
        k: (B, Hkv, Tk, D) of the same dtype and device; Hkv divides H.
        v: as k.
        key_padding_mask: (B, Tk) bool, True where a key is padding, which no query sees.
        dialect: of the bias, the scale and who sees whom; the paper's equation when None.

    Returns:
        (B, H, Tq, D) float64; a query that sees no key has 0.

    Raises:
        ValueError: q, k and v do not fit together, the mask does not fit them or is not bool, or the dialect is none.
    """
    validate_types(q=q, k=k, v=v)
    validate_tensors(q, k, v)
    _validate_padding(key_padding_mask, k.shape[2])
    return reading_of(dialect).attention(q, k, v, key_padding_mask)


def _validate_padding(key_padding_mask: Tensor | None, key_length: int) -> None:
    if key_padding_mask is None:
        return
    validate_types(key_padding_mask=key_padding_mask)
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape[1:] != (key_length,):
        given = f"shape {tuple(key_padding_mask.shape)} and {key_padding_mask.dtype}"
        raise ValueError(f"key_padding_mask of {given}: give (B, Tk) = (B, {key_length}) bool, True for padding")


@dataclass(frozen=True)
class Reading:
    """One way to compute ALiBi: a dialect and, where it departs from that, a known mistake."""

    dialect: Dialect
    slopes: Callable[[int], Tensor] = golden_slopes
    strength: float = 1.0
    """What the bias is multiplied by."""
    scalings: int = 0
    """How often the bias of attention is multiplied by the scale besides; below 0, how often it is divided by it."""
    sees_future: bool = False
    """Whether all keys are seen, with the bias that the formula gives there without | |."""
    top_left: bool = False
    """Whether queries are aligned with the first keys."""
    padding: Literal["hidden", "seen", "swapped"] = "hidden"
    rounds_scores: bool = False
    """Whether scores are rounded to the dtype of q once the bias is added."""

    def bias(self, num_heads: int, query_length: int, key_length: int, padding: Tensor | None) -> Tensor:
        """(B, H, Tq, Tk) float64."""
        dialect, keys = self.dialect, torch.arange(key_length)
        first = torch.zeros(1, 1, dtype=torch.int64) if padding is None else (~padding).int().argmax(-1, keepdim=True)
        if dialect.positions == "relative":
            queries = torch.arange(query_length) + (0 if self.top_left else key_length - query_length)
            distance = queries[:, None] - keys
            position = -(distance if self.sees_future else distance.abs())[None]  # [1, Tq, Tk]
        elif dialect.positions == "first":
            position = (keys - first)[:, None]  # [B, 1, Tk]
        else:
            position = (keys - (key_length - 1))[None, None]  # [1, 1, Tk]
        factors = dialect.factors_dtype or torch.float64
        bias = self.slopes(num_heads)[:, None, None].to(factors) * position[:, None].to(factors)
        if dialect.bias_dtype is not None:
            bias = bias.float().to(dialect.bias_dtype)  # by way of float32, as everyone computes it
        return (self.strength * bias.double()).expand(len(first), num_heads, query_length, key_length)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """(B, H, Tq, D) float64."""
        if self.top_left:
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
            padding = None if padding is None else padding[:, : q.shape[2]]
        bias = self.bias(q.shape[1], q.shape[2], k.shape[2], padding)
        if padding is not None and self.padding != "hidden":
            padding = None if self.padding == "seen" else ~padding
        if self.rounds_scores:
            keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = q.double() @ keys.transpose(-2, -1) * self.dialect.scale(q.shape[3])
            bias = (scores + bias).to(q.dtype).double() - scores
        return self._attend(q.double(), k.double(), v.double(), padding, bias)

    def plain_attention(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """The same by the dense definition in the dtype of q, with the bias taken relative to each query's own key."""
        bias = from_own_key(self.bias(q.shape[1], q.shape[2], k.shape[2], padding))
        return self._attend(q, k, v, padding, bias).double()

    def loss_of_positions(self, num_heads: int, v: Tensor) -> float:
        """What float32 scores may lose in outputs, at most, by holding absolute positions instead of distances."""
        if self.dialect.positions == "relative":
            return 0.0
        largest_bias = float(self.slopes(num_heads).max()) * v.shape[2]
        return 2 * torch.finfo(torch.float32).eps * largest_bias * float(v.abs().max())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, bias: Tensor) -> Tensor:
        scale = self.dialect.scale(q.shape[3])
        out: Tensor = attention(
            q,
            k,
            v,
            bias=bias * scale ** (self.scalings + self.dialect.bias_before_scale),
            causal=self.dialect.causal and not self.sees_future,
            scale=scale,
            key_padding_mask=padding,
            impl="reference",
        )
        return out


def reading_of(dialect: Dialect | None) -> Reading:
    """A dialect without any mistake; the paper's equation when None."""
    validate_kind("dialect", dialect, Dialect | None, "one of longreach.conformance.DIALECTS, a Dialect or None")
    return Reading(dialect or Dialect())


def from_own_key(bias: Tensor) -> Tensor:
    """A bias (B, H, Tq, Tk) less what it is at each query's own key."""
    return bias - bias.diagonal(bias.shape[-1] - bias.shape[-2], dim1=-2, dim2=-1)[..., None]
