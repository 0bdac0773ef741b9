"""Attention under the policy `sinks` (StreamingLLM, arXiv 2309.17453), which keeps the first tokens and the last.

Attention puts much weight on the first few tokens, which serve as sinks. A cache that keeps them beside a window of the
last tokens goes on for ever, and a key's distance is counted inside the cache, so that none grows past sinks + window.
"""

import torch
from torch import Tensor

from longreach.ops.attention import attention


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
    distance min(c, sinks + window - 1) - s, where they have stood in the cache since the first was evicted. The sinks
    come first in k (B, Hkv, Tk, D); the rest as in `longreach.attention`, tolerance being for the window.
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
