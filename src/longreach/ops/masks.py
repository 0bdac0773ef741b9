"""Which keys a query may see, and what is added to its scores, as dense tensors."""

import torch
from torch import Tensor

from longreach.ops.alibi import alibi_distance


def visible_keys(
    query_length: int,
    key_length: int,
    *,
    causal: bool,
    window_size: int | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query may see: bool, broadcastable to (B, H, Tq, Tk), or None when it sees all."""
    conditions = []
    if causal and query_length > 1:  # a single query stands at the last key
        conditions.append(alibi_distance(query_length, key_length, device=device) >= 0)  # [Tq, Tk]
    if window_size is not None:
        conditions.append(alibi_distance(query_length, key_length, device=device).abs() < window_size)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(key_length, device=device), cu_seqlens, right=True)
        conditions.append(document[:, None] == document)
    if key_padding_mask is not None:
        conditions.append(~key_padding_mask[:, None, None, :])  # [B, 1, 1, Tk]
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible


def dense_bias(
    slopes: Tensor | tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    query_length: int,
    key_length: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """What is added to the scaled scores, broadcastable to (B, H, Tq, Tk), or None when nothing is.

    slopes m give -m |i - j|; a pair (left, right) gives -left (i - j) to keys in the past and -right (j - i) to
    keys in the future.
    """
    total = bias.to(dtype) if bias is not None else None
    if slopes is not None:
        left, right = slopes if isinstance(slopes, tuple) else (slopes, slopes)
        # Distances in float16 overflow past 65504, where a slope of 0 would give NaN: round the product alone.
        wide = torch.promote_types(dtype, torch.float32)
        left = left.to(wide)[..., None, None]  # [(B,) H, 1, 1]
        if query_length == 1:  # it has no future, and few operations make a decoding step fast
            penalties = left * torch.arange(1 - key_length, 1, device=left.device, dtype=wide)
        else:
            right = right.to(wide)[..., None, None]
            distance = alibi_distance(query_length, key_length, device=left.device).to(wide)
            penalties = -(left * distance.clamp(min=0) + right * (-distance).clamp(min=0))
        total = penalties.to(dtype) if total is None else total + penalties.to(dtype)
    return total


def without_padding(k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v with zeros where a key is padding: what stands there is unset memory perhaps, and 0 * NaN is NaN."""
    if key_padding_mask is None:
        return k, v
    padding = key_padding_mask[:, None, :, None]  # [B, 1, Tk, 1]
    return k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
