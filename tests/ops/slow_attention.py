"""Attention one score at a time in Python floats, and the cases that every implementation is held to."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-13
"""Between two ways to compute a case in float64. Scores here stay below 40 and sum about 12 rounded terms, so each
carries at most 40 * 12 * 2^-53 = 5e-14, which is the relative error of its weight; twice that for the two ways."""


def slow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Any = None,
    bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE, float64, by loops that follow the docstring of `longreach.attention` word by word."""
    queries, keys, values = (x.detach().double().numpy() for x in (q, k, v))
    batch, num_heads, query_length, head_dim = queries.shape
    num_kv_heads, key_length = keys.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    left, right = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    out = np.zeros((batch, num_heads, query_length, head_dim))
    lse = np.full((batch, num_heads, query_length), -math.inf)
    for b, h, r in np.ndindex(batch, num_heads, query_length):
        position = r + key_length - query_length
        kv_head = h * num_kv_heads // num_heads
        scores = {}
        for j in range(key_length):
            if causal and j > position:
                continue
            if window_size is not None and abs(position - j) >= window_size:
                continue
            if key_padding_mask is not None and key_padding_mask[b, j]:
                continue
            if cu_seqlens is not None and _document(cu_seqlens, position) != _document(cu_seqlens, j):
                continue
            score = scale * sum(float(a) * float(c) for a, c in zip(queries[b, h, r], keys[b, kv_head, j], strict=True))
            side = left if j <= position else right
            if side is not None:
                score -= float(side[b, h] if side.dim() == 2 else side[h]) * abs(position - j)
            if bias is not None:
                score += float(bias.broadcast_to(batch, num_heads, query_length, key_length)[b, h, r, j])
            if score > -math.inf:
                scores[j] = score
        if scores:
            top = max(scores.values())
            total = math.fsum(math.exp(score - top) for score in scores.values())
            lse[b, h, r] = top + math.log(total)
            for j, score in scores.items():
                out[b, h, r] += math.exp(score - top) / total * values[b, kv_head, j]
    return torch.from_numpy(out), torch.from_numpy(lse)


def _document(cu_seqlens: Tensor, position: int) -> int:
    borders = cu_seqlens.tolist()
    return next(n for n in range(len(borders) - 1) if borders[n] <= position < borders[n + 1])


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    queries: int = 5
    keys: int = 5
    head_dim: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments; a callable is called with the generator of the random numbers."""

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Any]]:
        """q, k, v in a dtype, and the options with float32 slopes and biases, float64 where the dtype is."""
        generator = torch.Generator().manual_seed(17)
        kv_shape = (self.batch, self.kv_heads, self.keys, self.head_dim)
        shapes = ((self.batch, self.heads, self.queries, self.head_dim), kv_shape, kv_shape)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        made = {name: value(generator) if callable(value) else value for name, value in self.options.items()}
        wide = torch.promote_types(dtype, torch.float32)
        return tensors, {name: _widened(value, wide) for name, value in made.items()}


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_widened(side, dtype) for side in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def with_gradients(
    tensors: list[Tensor], options: dict[str, Any]
) -> tuple[list[Tensor], Callable[..., dict[str, Any]]]:
    """All floating-point tensors of a call as leaves, and a function that puts the last of them back into options."""
    slopes = options.get("slopes")
    sides = slopes if isinstance(slopes, tuple) else () if slopes is None else (slopes,)
    extra = [*sides, *([options["bias"]] if "bias" in options else [])]
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *extra)]

    def rebuilt(*extra: Tensor) -> dict[str, Any]:
        changed = dict(options)
        if sides:
            changed["slopes"] = tuple(extra[:2]) if isinstance(slopes, tuple) else extra[0]
        if "bias" in options:
            changed["bias"] = extra[-1]
        return changed

    return leaves, rebuilt


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def _slopes(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.rand(shape, generator=generator, dtype=torch.float64)


def _pair(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    return lambda generator: (_slopes(*shape)(generator), _slopes(*shape)(generator))


_LEFT_PADDED = torch.tensor([[True, True, False, False, False], [False] * 5])
_ALL_PADDED = torch.tensor([[True] * 5, [False, True, False, True, True]])
_DOCUMENTS = torch.tensor([0, 1, 2, 6, 7, 9], dtype=torch.int32)  # three of length 1
_HIDING = torch.zeros(5, 5).masked_fill(torch.eye(5, dtype=torch.bool), -math.inf)  # leaves query 0 no key

CASES = {
    "causal": Case(),
    "bidirectional": Case(options={"causal": False}),
    "one token": Case(queries=1, keys=1, head_dim=1),
    "decoding step": Case(queries=1, keys=7, options={"slopes": _slopes(4)}),
    "plain decoding step": Case(queries=1, keys=7, kv_heads=2),
    "more keys": Case(queries=3, keys=8),
    "more keys, slopes": Case(queries=3, keys=8, options={"slopes": _slopes(4)}),
    "more keys, bidirectional": Case(queries=3, keys=8, options={"slopes": _slopes(4), "causal": False}),
    "more queries": Case(queries=7, keys=3),
    "more queries, slopes": Case(queries=7, keys=3, options={"slopes": _slopes(4)}),
    "more queries, bidirectional": Case(queries=7, keys=3, options={"slopes": _slopes(4), "causal": False}),
    "more queries, window": Case(queries=7, keys=3, options={"causal": False, "window_size": 2}),
    "grouped": Case(kv_heads=2, options={"slopes": _slopes(4)}),
    "grouped, plain": Case(heads=6, kv_heads=2),
    "multi-query": Case(heads=3, kv_heads=1, queries=4, options={"slopes": _slopes(3)}),
    "slopes of each row": Case(options={"slopes": _slopes(2, 4)}),
    "slopes of zero": Case(options={"slopes": lambda _: torch.tensor([0.0, 1.0, 0.0, 0.5])}),
    "pair": Case(options={"slopes": _pair(4), "causal": False}),
    "pair of each row": Case(kv_heads=2, queries=4, keys=6, options={"slopes": _pair(2, 4), "causal": False}),
    "pair, causal": Case(options={"slopes": _pair(4)}),
    "bias of a scalar": Case(options={"bias": _normal(), "causal": False}),
    "bias (Tk,)": Case(options={"bias": _normal(5), "causal": False}),
    "bias (Tq, Tk)": Case(queries=3, options={"bias": _normal(3, 5)}),
    "bias (H, Tq, Tk)": Case(queries=3, options={"bias": _normal(4, 3, 5), "causal": False}),
    "bias (H, 1, 1)": Case(options={"bias": _normal(4, 1, 1)}),
    "bias (B, 1, 1, Tk)": Case(options={"bias": _normal(2, 1, 1, 5), "causal": False}),
    "bias (B, H, Tq, 1)": Case(options={"bias": _normal(2, 4, 5, 1)}),
    "bias (B, H, Tq, Tk) and slopes": Case(options={"bias": _normal(2, 4, 5, 5), "slopes": _slopes(2, 4)}),
    "bias that hides": Case(options={"bias": lambda _: _HIDING}),
    "window": Case(queries=9, keys=9, options={"window_size": 3, "slopes": _slopes(4)}),
    "window, bidirectional": Case(queries=6, keys=9, options={"window_size": 3, "causal": False}),
    "window of one": Case(options={"window_size": 1}),
    "window past the end": Case(options={"window_size": 99}),
    "padding": Case(options={"key_padding_mask": _LEFT_PADDED, "slopes": _slopes(4)}),
    "padding, bidirectional": Case(options={"key_padding_mask": _LEFT_PADDED, "causal": False}),
    "padding everywhere": Case(options={"key_padding_mask": _ALL_PADDED, "causal": False}),
    "padding everywhere, slopes": Case(queries=3, options={"key_padding_mask": _ALL_PADDED, "slopes": _slopes(4)}),
    "documents": Case(queries=9, keys=9, options={"cu_seqlens": _DOCUMENTS, "slopes": _slopes(4)}),
    "documents, bidirectional": Case(queries=9, keys=9, options={"cu_seqlens": _DOCUMENTS.long(), "causal": False}),
    "an empty document": Case(options={"cu_seqlens": torch.tensor([0, 2, 2, 5])}),
    "scale": Case(options={"scale": 0.3, "slopes": _slopes(4)}),
    "all at once": Case(
        kv_heads=2,
        queries=9,
        keys=9,
        options={
            "slopes": _pair(2, 4),
            "bias": _normal(4, 9, 9),
            "causal": False,
            "scale": 1.7,
            "window_size": 3,
            "key_padding_mask": torch.arange(18).view(2, 9) % 4 == 0,
            "cu_seqlens": _DOCUMENTS,
        },
    ),
}
"""Name -> case: every argument alone and together, with lengths that are odd, equal and not."""
