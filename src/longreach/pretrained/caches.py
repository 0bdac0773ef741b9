"""Caches for generation: one that grows in place, and one of the policy `sinks` (StreamingLLM, arXiv 2309.17453).

`sinks` keeps the first tokens and a window of the last. Attention puts much weight on the first few tokens, which serve
as sinks. A cache that keeps them beside the last tokens goes on for ever, and a key's distance is counted inside the
cache, so that none grows past sinks + window.
"""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from longreach.ops.attention import attention
from longreach.ops.key_norms import KeyNorms

LEAST_ROOM = 256
"""Tokens for which a growing buffer has room at least, beyond those that it is made for."""


def sink_cache(sinks: int, window: int) -> Any:
    """Make an empty cache for `generate(past_key_values=...)` that keeps the first tokens and the last.

    Each token sees at most sinks + window keys: the first `sinks` and the last `window`, itself among them.

    Args:
        sinks: how many of the first tokens to keep, at least 0.
        window: how many of the last tokens each token sees, itself included, at least 1.

    Returns:
        A transformers Cache, of any batch size, for an extended model.
    """
    return _sink_cache_class()(sinks, window)


def sink_window(cache: Any) -> tuple[int, int] | None:
    """(sinks, window) of a cache made by `sink_cache`, None for any other."""
    return getattr(cache, "sink_window", None)


@lru_cache(maxsize=1)
def _sink_cache_class() -> type:
    """The class, made when it is first wanted: its bases are of transformers."""
    from transformers.cache_utils import Cache, DynamicLayer

    class SinkLayer(DynamicLayer):
        def __init__(self, sinks: int, window: int):
            super().__init__()
            self.sinks, self.window = sinks, window
            self.seen = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key_states, value_states)
            self.seen += key_states.shape[2]
            self.keys, self.values = self._evicted(keys), self._evicted(values)
            return keys, values

        def _evicted(self, x: Tensor) -> Tensor:
            last = self.window - 1  # the next token fills the window
            if x.shape[2] <= self.sinks + last:
                return x
            return torch.cat((x[:, :, : self.sinks], x[:, :, x.shape[2] - last :]), dim=2)

        def get_seq_length(self, *args: Any) -> int:
            return self.seen  # generate asks how many tokens it need not give again

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.seen + query_length, 0

        def reset(self) -> None:
            self.seen = 0
            super().reset()

        def crop(self, *args: Any) -> None:
            raise ValueError("a cache with sinks cannot give tokens back: use no assisted generation with it")

    class SinkCache(Cache):
        def __init__(self, sinks: int, window: int):
            super().__init__(layer_class_to_replicate=partial(SinkLayer, sinks, window))  # type: ignore[arg-type]
            self.sink_window = (sinks, window)

    return SinkCache


def growing_cache() -> Any:
    """Make an empty DynamicCache in which a new token copies itself alone.

    The stock one copies all keys and values at each step, which is half of a decoding step at 8k tokens. Here they lie
    in buffers with room to spare.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.layer_class_to_replicate = _growing_layer_class()
    return cache


@lru_cache(maxsize=1)
def _growing_layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """`keys` and `values` are views of the filled part of two buffers, until something puts other tensors there."""

        buffers: tuple[Tensor, ...] = ()
        norms: KeyNorms

        def key_norms(self) -> Tensor:
            """As `longreach.attention` takes them."""
            assert self.keys is not None, "it was initialized"
            return self.norms.of(self.keys)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if torch.is_grad_enabled() and key_states.requires_grad:  # autograd needs every version of the keys
                self.buffers, self.norms = (), KeyNorms()
                return super().update(key_states, value_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None, "it was initialized"
            assert self.values is not None, "it was initialized"
            new = (key_states, value_states)
            filled = self.keys.shape[2] if self.keys.numel() else 0
            total = filled + key_states.shape[2]
            if not self.buffers or not _starts(self.buffers[0], self.keys, total):
                self.buffers, self.norms = tuple(_with_room(x, total) for x in new), KeyNorms()
                if filled:
                    for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
                        buffer[:, :, :filled] = old
            for buffer, x in zip(self.buffers, new, strict=True):
                buffer.narrow(2, filled, x.shape[2]).copy_(x)
            self.norms.keep(filled)  # after a crop, other keys stand where there were some
            self.keys, self.values = (buffer.narrow(2, 0, total) for buffer in self.buffers)
            return self.keys, self.values

    return GrowingLayer


def _starts(buffer: Tensor, keys: Tensor, total: int) -> bool:
    """Whether keys still are a view of the buffer's beginning (`crop` leaves one), and it has room for `total`."""
    same = keys.data_ptr() == buffer.data_ptr() and keys.stride() == buffer.stride()
    return same and keys.shape[:2] == buffer.shape[:2] and total <= buffer.shape[2]


def _with_room(x: Tensor, total: int) -> Tensor:
    """An empty buffer like x (B, Hkv, T, D) for `total` tokens, and an eighth more."""
    return x.new_empty((*x.shape[:2], total + max(LEAST_ROOM, total // 8), x.shape[3]))


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
