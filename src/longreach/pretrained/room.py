"""Room in which the keys and values of a cache grow, so that a new token copies itself alone.

The stock cache of transformers copies all keys and values at each step, which is half of a decoding step at 8k tokens.
"""

import torch
from torch import Tensor

from longreach.ops.key_norms import KeyNorms

LEAST_ROOM = 256
"""Tokens for which there is room at least, beyond those that it is made for."""


class Room:
    """Keys and values (B, Hkv, T, D) in buffers with room to spare, whose filled part is handed out as views.

    Whoever is handed them may keep them, as a snapshot or a branch of a tree: where what is to come would be written
    over what is held, or could be reached through it, all moves to another room.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        with torch.inference_mode(False):  # outside of which its tensors could not be written to
            self._buffers = [_with_room(x) for x in (keys, values)]
        self._norms, self._version = KeyNorms(), 0
        self.handed_out = self._write((keys, values), 0)

    def is_last(self, pair: tuple[Tensor, Tensor]) -> bool:
        """Whether these are the very tensors that were handed out last."""
        return all(x is y for x, y in zip(pair, self.handed_out, strict=True))

    def takes(self, last: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> bool:
        """Whether new keys and values can be written behind the last ones."""
        if not self.is_last(last) or self._is_held():
            return False
        fits = last[0].shape[2] + new[0].shape[2] <= self._buffers[0].shape[2]
        return fits and all(_alike(x, buffer) for x, buffer in zip(new, self._buffers, strict=True))

    def append(self, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """All keys and values, new ones behind the last, which it `takes`."""
        filled = self.handed_out[0].shape[2]
        self._norms.keep(filled)  # after a crop, other keys stand where there were some
        self.handed_out = self._write(new, filled)
        return self.handed_out

    def key_norms(self) -> Tensor:
        """Of the keys that were handed out last, as `longreach.attention` takes them."""
        if self._buffers[0]._version != self._version:  # someone wrote into what was handed out
            self._norms, self._version = KeyNorms(), self._buffers[0]._version
        return self._norms.of(self.handed_out[0])

    def _write(self, new: tuple[Tensor, Tensor], filled: int) -> tuple[Tensor, Tensor]:
        total = filled + new[0].shape[2]
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer.narrow(2, filled, x.shape[2]).copy_(x)
        self._version = self._buffers[0]._version
        keys, values = (buffer.narrow(2, 0, total) for buffer in self._buffers)
        return keys, values

    def _is_held(self) -> bool:
        """Whether anyone holds a tensor of the buffers beside those that were handed out last."""
        # Such a tensor is one holder of its storage; the buffer is another, and so is what is asked here for the count.
        storages = [buffer.untyped_storage() for buffer in self._buffers]
        return any(torch._C._storage_Use_Count(storage._cdata) > 3 for storage in storages)


def _alike(new: Tensor, buffer: Tensor) -> bool:
    """Whether new keys or values can stand in a buffer as they are."""
    shapes = [(*x.shape[:2], x.shape[3]) for x in (new, buffer)]
    return shapes[0] == shapes[1] and new.dtype == buffer.dtype and new.device == buffer.device


def _with_room(x: Tensor) -> Tensor:
    """An empty buffer for as many tokens as in x (B, Hkv, T, D), and an eighth more."""
    length = x.shape[2]
    return x.new_empty((*x.shape[:2], length + max(LEAST_ROOM, length // 8), x.shape[3]))
