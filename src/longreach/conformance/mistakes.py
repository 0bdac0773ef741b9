"""Mistakes that ALiBi is known to be made with, each as the reading of it that gives the same numbers."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longreach.conformance.golden import Reading, golden_slopes


def _closed_form(num_heads: int) -> Tensor:
    return torch.exp2(-8 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads)


def _next_power_cut(num_heads: int) -> Tensor:
    return golden_slopes(1 << (num_heads - 1).bit_length())[:num_heads]


def _unskipped(num_heads: int) -> Tensor:
    power = 1 << (num_heads.bit_length() - 1)
    return torch.cat((golden_slopes(power), golden_slopes(2 * power)[: num_heads - power]))


def _from_exponent_zero(num_heads: int) -> Tensor:
    power = 1 << (num_heads.bit_length() - 1)
    return golden_slopes(num_heads) * 2 ** (8 / power)


SLOPE_MISTAKES: tuple[tuple[str, Callable[[int], Tensor]], ...] = (
    ("negative slopes, where the minus belongs to the bias", lambda heads: -golden_slopes(heads)),
    ("closed-form slopes 2^(-8 h / H), where the paper's code interleaves", _closed_form),
    ("the right slopes in falling order", lambda heads: golden_slopes(heads).sort(descending=True).values),
    ("the right slopes in rising order", lambda heads: golden_slopes(heads).sort().values),
    ("the right slopes backwards", lambda heads: golden_slopes(heads).flip(0)),
    ("the slopes of the next power of two, cut short", _next_power_cut),
    ("beyond the power of two, slopes that are not every other one", _unskipped),
    ("exponents that begin at 0", _from_exponent_zero),
    ("slopes 2^-h at any number of heads", lambda heads: 0.5 ** torch.arange(1, heads + 1, dtype=torch.float64)),
    ("slopes rounded to bfloat16", lambda heads: golden_slopes(heads).bfloat16().double()),
    ("slopes rounded to float16", lambda heads: golden_slopes(heads).half().double()),
)
"""What slopes are known to be instead."""


def bias_mistakes(golden: Reading) -> Iterator[tuple[str, Reading]]:
    """What biases are known to be instead. Where that is the golden bias itself, it explains no error."""
    dialect = golden.dialect
    yield from strength_mistakes(golden)
    yield from slope_mistakes(golden)
    if dialect.positions == "relative":
        yield "queries are aligned with the first keys", replace(golden, top_left=True)
    if not dialect.causal:
        yield "the bias is not symmetric: it favours keys after the query", replace(golden, sees_future=True)
    yield from rounding_mistakes(golden)


def strength_mistakes(golden: Reading) -> Iterator[tuple[str, Reading]]:
    """The right bias too often, or not at all."""
    yield "the bias is missing", replace(golden, strength=0.0)
    yield "the bias is added twice", replace(golden, strength=2.0)
    yield "the bias has the wrong sign", replace(golden, strength=-1.0)


def slope_mistakes(golden: Reading) -> Iterator[tuple[str, Reading]]:
    """Other slopes; first the paper's, where a model has others."""
    yield "alibi_bias_max is ignored", replace(golden, slopes=golden_slopes)
    for words, rule in SLOPE_MISTAKES:
        yield words, replace(golden, slopes=rule)


def rounding_mistakes(golden: Reading) -> Iterator[tuple[str, Reading]]:
    """A bias made from other numbers, and rounded."""
    dialect = golden.dialect
    for positions in ("relative", "first", "last") if dialect.causal else ("relative",):
        form = replace(dialect, positions=positions, factors_dtype=None, bias_dtype=None)
        made = "distances" if positions == "relative" else f"absolute positions from the {positions} key"
        yield f"the bias is made from {made} and not rounded", replace(golden, dialect=form)
        for dtype in (torch.bfloat16, torch.float16):
            words = f"the bias, made from {made}, is rounded to {str(dtype).removeprefix('torch.')}"
            if positions != "relative":
                words += ": neighbouring keys come to share one"
            yield words, replace(golden, dialect=replace(form, bias_dtype=dtype))
            yield words, replace(golden, dialect=replace(form, factors_dtype=dtype))


def attention_mistakes(golden: Reading) -> Iterator[tuple[str, Reading]]:
    """What attention is known to be instead."""
    dialect = golden.dialect
    moved = replace(dialect, bias_before_scale=not dialect.bias_before_scale)
    side = "after" if dialect.bias_before_scale else "before"
    yield f"the bias is added {side} the scale", replace(golden, dialect=moved)
    factor = "D" if dialect.mup_scale else "sqrt(D)"
    if dialect.bias_before_scale:
        yield f"the bias is divided by {factor} twice", replace(golden, scalings=1)
    else:
        yield f"the bias is {factor} too large, as if it were added before the scale", replace(golden, scalings=-1)
    rescaled = replace(dialect, mup_scale=not dialect.mup_scale)
    scale = "1 / sqrt(D)" if dialect.mup_scale else "1 / D"
    yield f"the scale is {scale}", replace(golden, dialect=rescaled)
    yield from bias_mistakes(golden)
    yield "padding is not hidden", replace(golden, padding="seen")
    yield "the padding mask is read the wrong way round", replace(golden, padding="swapped")
    if not dialect.causal:
        yield "causal: queries do not see the keys after them", replace(golden, dialect=replace(dialect, causal=True))
        return
    symmetric = replace(dialect, causal=False, positions="relative")
    yield "not causal: queries see the keys after them", replace(golden, sees_future=True)
    yield "not causal: queries see the keys after them", replace(golden, dialect=symmetric)
    yield "not causal, and the bias is missing", replace(golden, sees_future=True, strength=0.0)
    yield "queries are aligned with the first keys", replace(golden, top_left=True)
    for positions in ("first", "last"):
        words = f"scores are rounded once a bias of absolute positions, from the {positions} key, is in them"
        for dtype in (None, torch.bfloat16, torch.float16):
            absolute = replace(dialect, positions=positions, factors_dtype=None, bias_dtype=dtype)
            yield words, replace(golden, dialect=absolute, rounds_scores=True)


def group_mistakes(golden: Reading, group: int) -> Iterator[tuple[str, Reading]]:
    """What attention is known to be instead where `group` query heads share a key head."""
    if group > 1:
        yield (
            "the slopes of the key heads, each for a whole group",
            replace(golden, slopes=lambda heads: golden_slopes(heads // group).repeat_interleave(group)),
        )
        yield (
            "the slopes of the key heads, over and over",
            replace(golden, slopes=lambda heads: golden_slopes(heads // group).repeat(group)),
        )
