"""Norms of keys that a cache collects, so that decoding learns which keys are within reach without reading them."""

import torch
from torch import Tensor

from longreach.ops.reach import KEY_BLOCK, key_block_norms


class KeyNorms:
    """Largest norm in each block of KEY_BLOCK keys, of keys that become more: each is read once."""

    def __init__(self) -> None:
        self._norms: Tensor | None = None
        self._count = 0  # keys in them

    def of(self, keys: Tensor) -> Tensor:
        """(B, Hkv, ceil(T / KEY_BLOCK)) of keys (B, Hkv, T, D), the first of which are those of earlier calls."""
        self.keep(keys.shape[2])
        whole = self._count // KEY_BLOCK  # blocks that no later key has joined
        fresh = key_block_norms(keys[:, :, whole * KEY_BLOCK :], KEY_BLOCK)
        self._norms = fresh if self._norms is None else torch.cat((self._norms[..., :whole], fresh), dim=-1)
        self._count = keys.shape[2]
        return self._norms

    def keep(self, count: int) -> None:
        """Forget all but the first `count` keys."""
        self._count = min(self._count, count)
