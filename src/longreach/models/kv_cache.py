"""Keys and values of the tokens seen so far, for decoding."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longreach.ops.arguments import validate_integer
from longreach.ops.key_norms import KeyNorms


class KVCache:
    """Grows with what is appended, without a limit on length; with max_context it keeps the last keys alone.

    Each layer's keys and values lie in a buffer with room to spare, doubled when it is full, so that appending
    token after token copies each of them a bounded number of times.

    Args:
        length: L', how many tokens the whole sequence will have, for position methods that depend on it.
        max_context: how many of the last tokens a token sees, itself included; all of them when None.

    Raises:
        ValueError: a value is no integer, or below 1.
    """

    def __init__(self, *, length: int | None = None, max_context: int | None = None) -> None:
        for name, value in (("length", length), ("max_context", max_context)):
            if value is not None:
                validate_integer(name, value, 1, "a positive integer, or None")
        self.final_length = length
        self.max_context = max_context
        self._layers: list[_Layer] = []

    @property
    def length(self) -> int:
        """Number of tokens seen so far: the position of the next one."""
        return self._layers[-1].seen if self._layers else 0

    @property
    def held(self) -> int:
        """Number of tokens whose keys the next token can see: all seen, or the last max_context - 1."""
        return self.length if self.max_context is None else min(self.length, self.max_context - 1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, T, D) to a layer and return what it held and them, (B, Hkv, held + T, D), as views."""
        if layer == len(self._layers):
            self._layers.append(_Layer(keys[:, :, :0], values[:, :, :0]))
        buffers = self._layers[layer]
        if self.max_context is not None:
            buffers.first = max(buffers.first, buffers.stop - (self.max_context - 1))
        if buffers.stop + keys.shape[2] > buffers.keys.shape[2]:
            buffers.move(capacity=max(buffers.stop - buffers.first + keys.shape[2], 2 * (buffers.stop - buffers.first)))
        new = slice(buffers.stop, buffers.stop + keys.shape[2])
        buffers.keys[:, :, new] = keys
        buffers.values[:, :, new] = values
        buffers.stop = new.stop
        buffers.seen += keys.shape[2]
        held = slice(buffers.first, buffers.stop)
        return buffers.keys[:, :, held], buffers.values[:, :, held]

    def key_norms(self, layer: int) -> Tensor | None:
        """Largest norm in each block of KEY_BLOCK keys of a layer, (B, Hkv, ceil(length / KEY_BLOCK)).

        With them attention knows which keys are within reach without reading the others. Each key is read once.
        None with max_context, under which blocks would move with every token, and there are few.
        """
        if self.max_context is not None:
            return None
        buffers = self._layers[layer]
        return buffers.norms.of(buffers.keys[:, :, : buffers.stop])


@dataclass
class _Layer:
    """One layer's buffers, of which first to stop is in use."""

    keys: Tensor
    values: Tensor
    first: int = 0
    stop: int = 0
    seen: int = 0
    norms: KeyNorms = field(default_factory=KeyNorms)

    def move(self, capacity: int) -> None:
        """Put what is in use at the start of new buffers; what earlier views show stays as it was."""
        self.keys, self.values = (_moved(x, self.first, self.stop, capacity) for x in (self.keys, self.values))
        self.first, self.stop = 0, self.stop - self.first


def _moved(buffer: Tensor, first: int, stop: int, capacity: int) -> Tensor:
    moved = torch.empty((*buffer.shape[:2], capacity, buffer.shape[3]), dtype=buffer.dtype, device=buffer.device)
    moved[:, :, : stop - first] = buffer[:, :, first:stop]
    return moved
