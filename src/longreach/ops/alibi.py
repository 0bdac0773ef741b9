"""The equations of ALiBi: slopes, distance, bias (Press, Smith, Lewis, ICLR 2022, arXiv 2108.12409)."""

import math
from typing import Any

import torch
from torch import Tensor

from longreach.ops.arguments import validate_device, validate_integer, validate_types, validate_values

MOST_DISTANCES = 2**36
"""The most elements of a table of distances, half a TiB, that are taken for no mistake."""

MOST_HEADS = 2**20
"""The most heads that are taken for no mistake, each of which has its slope computed by itself."""


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """Slopes of ALiBi for any number of heads, by the rule of the paper's code.

    For H = 2^k heads the slopes are the geometric sequence m_h = 2^(-8 h / H), h = 1..H (Section 3). For any
    other H the paper's code takes the slopes of the power of two p below H and appends every other slope of 2p,
    from the steepest, until there are H. This is not the closed form 2^(-8 h / H), and not monotone: at 12 heads
    the two differ by up to 0.69.

    Args:
        num_heads: number of query heads H, at least 1.
        device: where to put the slopes.

    Returns:
        (H,) float32, all positive.

    Raises:
        ValueError: num_heads is not a positive integer, or over any model's, or the device is not here.
    """
    num_heads = validate_heads("num_heads", num_heads, "a positive integer")
    validate_device(device)
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = _geometric(power) + _geometric(2 * power)[0::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def validate_heads(name: str, value: Any, mend: str) -> int:
    """A number of heads that a model may have."""
    num_heads = validate_integer(name, value, 1, mend)
    if num_heads > MOST_HEADS:
        raise ValueError(f"{name}={num_heads}: give at most {MOST_HEADS}")
    return num_heads


def _geometric(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * head / num_heads) for head in range(1, num_heads + 1)]


def alibi_distance(
    query_length: int, key_length: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Distance i - j from each query to each key, queries aligned with the last keys: (Tq, Tk) int64.

    Query number r stands at position i = r + Tk - Tq, so that a cached decoding step (Tq = 1) looks back over
    all Tk keys. Positive for keys in the past, negative for keys in the future. ValueError where no memory holds it.
    """
    query_length, key_length = validate_lengths(query_length, query_length if key_length is None else key_length)
    query_positions = torch.arange(query_length, device=device) + (key_length - query_length)
    return query_positions[:, None] - torch.arange(key_length, device=device)


def validate_lengths(query_length: int, key_length: int) -> tuple[int, int]:
    """Numbers of queries and of keys with room for a number for each pair of them."""
    query_length = validate_integer("query_length", query_length, 0)
    key_length = validate_integer("key_length", key_length, 0)
    if not torch.compiler.is_compiling() and query_length * key_length > MOST_DISTANCES:  # no bound on traced lengths
        raise ValueError(
            f"query_length={query_length} and key_length={key_length} make a table larger than any memory: give "
            "smaller ones; attention(..., slopes=...) needs no table"
        )
    return query_length, key_length


def alibi_bias(slopes: Tensor, query_length: int, key_length: int | None = None) -> Tensor:
    """Bias of ALiBi as a dense tensor: bias[h, i, j] = -m_h |i - j|, added to the scaled scores.

    Causal attention needs i >= j only, where this is the paper's -m (i - j). It is made from distances, so that
    neighbouring keys keep distinct biases at any length; nothing is rounded below the dtype of the slopes.
    Its H Tq Tk elements are for looking and testing: `longreach.attention(..., slopes=...)` needs no such tensor.

    Args:
        slopes: (H,) or (B, H) floating point, see `alibi_slopes`.
        query_length: Tq.
        key_length: Tk; Tq when None. Queries are aligned with the last keys.

    Returns:
        (H, Tq, Tk) or (B, H, Tq, Tk) in the dtype of the slopes.

    Raises:
        ValueError: slopes are not of that shape, not floating point or not finite; a length is negative, no
            integer, or too large for a dense bias.
    """
    validate_types(slopes=slopes)
    if slopes.dim() not in (1, 2) or not slopes.is_floating_point():
        raise ValueError(
            f"slopes of shape {tuple(slopes.shape)} and {slopes.dtype}: give a floating-point tensor (H,) or (B, H)"
        )
    validate_values("slopes", slopes)
    distance = alibi_distance(query_length, key_length, device=slopes.device).abs()
    return -slopes[..., None, None] * distance.to(slopes.dtype)  # [H, Tq, Tk]


def dense_bias(
    slopes: Tensor | tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    query_length: int,
    key_length: int,
    dtype: torch.dtype,
    *,
    offset: int | None = None,
) -> Tensor | None:
    """What is added to the scaled scores, broadcastable to (B, H, Tq, Tk), or None when nothing is.

    slopes m give -m |i - j|; a pair (left, right) gives -left (i - j) to keys in the past and -right (j - i) to
    keys in the future. Query 0 stands `offset` after key 0, or the last query at the last key.
    """
    total = bias.to(dtype) if bias is not None else None
    if slopes is not None:
        left, right = slopes if isinstance(slopes, tuple) else (slopes, slopes)
        # Distances in float16 overflow past 65504, where a slope of 0 would give NaN: round the product alone.
        wide = torch.promote_types(dtype, torch.float32)
        left = left.to(wide)[..., None, None]  # [(B,) H, 1, 1]
        if query_length == 1 and offset is None:  # it has no future, and few operations make a decoding step fast
            penalties = left * torch.arange(1 - key_length, 1, device=left.device, dtype=wide)
        else:
            right = right.to(wide)[..., None, None]
            offset = key_length - query_length if offset is None else offset
            positions = torch.arange(query_length, device=left.device) + offset
            distance = (positions[:, None] - torch.arange(key_length, device=left.device)).to(wide)
            penalties = -(left * distance.clamp(min=0) + right * (-distance).clamp(min=0))
        total = penalties.to(dtype) if total is None else total + penalties.to(dtype)
    return total
