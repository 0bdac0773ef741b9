"""Keys and values of the tokens seen so far, for decoding."""

import torch
from torch import Tensor

from longreach.ops.reach import KEY_BLOCK, key_block_norms


class KVCache:
    """Grows with what is appended, without a limit on length.

    Each layer's keys and values lie in a buffer with room to spare, doubled when it is full, so that appending
    token after token copies each of them a bounded number of times.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths: list[int] = []
        self._key_norms: list[Tensor | None] = []
        self._normed: list[int] = []

    @property
    def length(self) -> int:
        """Number of tokens that every layer holds."""
        return self._lengths[-1] if self._lengths else 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, T, D) to a layer and return all that it holds, (B, Hkv, length, D), as views."""
        if layer == len(self._keys):
            self._keys.append(keys[:, :, :0])
            self._values.append(values[:, :, :0])
            self._lengths.append(0)
            self._key_norms.append(None)
            self._normed.append(0)
        start = self._lengths[layer]
        stop = start + keys.shape[2]
        if stop > self._keys[layer].shape[2]:
            capacity = max(stop, 2 * start)
            self._keys[layer] = _grown(self._keys[layer], start, capacity)
            self._values[layer] = _grown(self._values[layer], start, capacity)
        self._keys[layer][:, :, start:stop] = keys
        self._values[layer][:, :, start:stop] = values
        self._lengths[layer] = stop
        return self._keys[layer][:, :, :stop], self._values[layer][:, :, :stop]

    def key_norms(self, layer: int) -> Tensor:
        """Largest norm in each block of KEY_BLOCK keys of a layer, (B, Hkv, ceil(length / KEY_BLOCK)).

        With them attention knows which keys are within reach without reading the others. Each key is read once.
        """
        whole = self._normed[layer] // KEY_BLOCK  # blocks that no later key has joined
        keys = self._keys[layer][:, :, whole * KEY_BLOCK : self._lengths[layer]]
        fresh, known = key_block_norms(keys, KEY_BLOCK), self._key_norms[layer]
        norms = fresh if known is None else torch.cat((known[..., :whole], fresh), dim=-1)
        self._key_norms[layer], self._normed[layer] = norms, self._lengths[layer]
        return norms


def _grown(buffer: Tensor, used: int, capacity: int) -> Tensor:
    grown = torch.empty((*buffer.shape[:2], capacity, buffer.shape[3]), dtype=buffer.dtype, device=buffer.device)
    grown[:, :, :used] = buffer[:, :, :used]
    return grown
