"""Caches for generation: one that grows in place, and one of the policy `sinks` (StreamingLLM, arXiv 2309.17453).

`sinks` keeps the first tokens and a window of the last. Attention puts much weight on the first few tokens, which serve
as sinks. A cache that keeps them beside the last tokens goes on for ever, and a key's distance is counted inside the
cache, so that none grows past sinks + window.
"""

from typing import Any

import torch
from torch import Tensor

from longreach.ops.attention import attention


def sink_cache(sinks: int, window: int) -> Any:
    """Make an empty cache for `generate(past_key_values=...)` that keeps the first tokens and the last.

    Each token sees at most sinks + window keys: the first `sinks` and the last `window`, itself among them.

    Args:
        sinks: how many of the first tokens to keep, at least 0.
        window: how many of the last tokens each token sees, itself included, at least 1.

    Returns:
        A transformers Cache, of any batch size, for an extended model.
    """
    from longreach.pretrained.cache_layers import SinkCache

    return SinkCache(sinks, window)


def sink_window(cache: Any) -> tuple[int, int] | None:
    """(sinks, window) of a cache made by `sink_cache`, None for any other."""
    return getattr(cache, "sink_window", None)


def growing_cache() -> Any:
    """Make an empty DynamicCache in which a new token copies itself alone, and not the whole cache as in the stock one.

    Keys and values that were taken from it are not written to again, as they are not by the stock one.
    """
    from transformers import DynamicCache

    from longreach.pretrained.cache_layers import GrowingLayer

    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    sinks: int,
    window: int,
    *,
    scale: float,
    tolerance: float | None,
    impl: str,
) -> Tensor:
    """Attention of many tokens at once, each of which sees what it would have seen token by token.

    Query number r stands at c = r + Tk - Tq and sees the keys above c - window at their distance, and the sinks s at
    distance min(c, sinks + window - 1) - s, where they have stood in the cache since the first was evicted.

    Args:
        q: (B, H, Tq, D).
        k: (B, Hkv, Tk, D), the sinks first.
        v: (B, Hkv, Tk, D).
        slopes: (H,) or (B, H).
        sinks: how many keys are sinks.
        window: how many of the last keys a query sees, itself included.
        scale: factor of q . k.
        tolerance: as in `longreach.attention`, for the window.
        impl: likewise.

    Returns:
        (B, H, Tq, D).
    """
    rest, rest_lse = attention(
        q,
        k[:, :, sinks:],
        v[:, :, sinks:],
        slopes=slopes,
        scale=scale,
        window_size=window,
        tolerance=tolerance,
        return_lse=True,
        impl=impl,
    )
    first = k.shape[2] - q.shape[2]
    position = torch.arange(first, k.shape[2], device=q.device)[:, None]  # [Tq, 1]
    sink = torch.arange(sinks, device=q.device)
    distance = position.clamp(max=sinks + window - 1) - sink  # [Tq, sinks]
    group = q.shape[1] // k.shape[1]
    k, v = (x[:, :, :sinks].repeat_interleave(group, dim=1).to(rest_lse.dtype) for x in (k, v))  # [B, H, sinks, D]
    scores = scale * (q.to(k.dtype) @ k.mT) - slopes[..., None, None] * distance  # [B, H, Tq, sinks]
    scores = scores.masked_fill(distance < 0, float("-inf"))
    lse = torch.logaddexp(rest_lse, scores.logsumexp(dim=-1))[..., None]  # [B, H, Tq, 1]
    out = rest * (rest_lse[..., None] - lse).exp() + (scores - lse).exp() @ v
    return out.to(q.dtype)
