"""Caches for generation, of transformers' own classes, which is why this is imported where one is wanted."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from longreach.pretrained.room import Room


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, which lie in a `Room` while nothing but its own methods changes them."""

    room: Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values (B, Hkv, T, D), the new ones last."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # autograd may need any version of the keys
            self.room = None
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        last, new = self._pair(), (key_states, value_states)
        if self.room is not None and self.room.takes(last, new):
            self.keys, self.values = self.room.append(new)
        else:
            joined = (torch.cat(pair, dim=2) for pair in zip(last, new, strict=True))  # as stock: what misfits raises
            self.room = Room(*joined)
            self.keys, self.values = self.room.handed_out
        return self.keys, self.values

    def key_norms(self) -> Tensor | None:
        """As `longreach.attention` takes them; None where keys lie in no room."""
        return None if self.room is None else self.room.key_norms()

    def crop(self, tokens_to_remove: int) -> None:
        """As stock, and what is left lies in the room still."""
        lay_there = self.room is not None and self.room.is_last(self._pair())
        super().crop(tokens_to_remove)
        if self.room is not None and lay_there:
            self.room.handed_out = self._pair()

    def reset(self) -> None:
        """Forget all."""
        self.room = None
        super().reset()

    def _pair(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None, "it was initialized"
        assert self.values is not None, "it was initialized"
        return self.keys, self.values

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file has of it: keys and values without the room, which is another's."""
        state = {name: value for name, value in vars(self).items() if name != "room"}
        if self.room is not None:
            state |= {name: state[name].clone(memory_format=torch.contiguous_format) for name in ("keys", "values")}
        return state


def growing_cache() -> DynamicCache:
    """An empty cache in which a new token copies itself alone, and not the whole cache as in the stock one.

    Keys and values that were taken from it are not written to again, as they are not by the stock one.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


class SinkLayer(DynamicLayer):
    """The first keys and values and the last alone."""

    def __init__(self, sinks: int, window: int):
        super().__init__()
        self.sinks, self.window = sinks, window
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Those kept before and the new ones, of which fewer may be kept."""
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
        """Tokens seen: generate asks how many it need not give again."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all were kept."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget all."""
        self.seen = 0
        super().reset()

    def crop(self, *args: Any) -> None:
        """Refuse: what was evicted is gone."""
        raise ValueError("a cache with sinks cannot give tokens back: use no assisted generation with it")


class SinkCache(Cache):
    """An empty cache whose tokens see the first `sinks` tokens and the last `window`, themselves included."""

    def __init__(self, sinks: int, window: int):
        super().__init__(layer_class_to_replicate=partial(SinkLayer, sinks, window))  # type: ignore[arg-type]
        self.sink_window = (sinks, window)
