"""Randomized positions (Ruoss et al., ACL 2023, arXiv 2305.16843), rotary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longreach.positions.method import AttentionPositions, ModelSize
from longreach.positions.rotary import Rotary, RotaryOptions

MOST_POSITIONS = 2**24
"""The most positions that may be drawn from."""


@dataclass(frozen=True)
class RandomizedRotaryOptions:
    """Options of `rotary-randomized`."""

    base: float = 10000.0
    """Base of the geometric sequence of wavelengths."""
    range: int | None = None
    """N, the number of positions that are drawn from; the longest length that the model is meant for when None."""

    def __post_init__(self) -> None:
        RotaryOptions(self.base)
        if self.range is not None and self.range < 1:
            raise ValueError(f"range={self.range}: give at least the training length")


class RandomizedRotary(Rotary):
    """Rotary, at T positions drawn without order from 0 to N - 1 and sorted, for a sequence of T tokens.

    In training each batch has another draw, so that positions and distances of sequences up to N have been seen:
    `draw` makes it, and the model takes the positions that it is given as they are. At test time there is one draw for
    each T, the same in every run, so that decoding with a cache has the positions of the full pass. What comes after T
    in a longer stream stands at the same positions N further on.
    """

    draws_in_training = True

    def __init__(self, options: RandomizedRotaryOptions, size: ModelSize):
        super().__init__(RotaryOptions(options.base), size)
        self.depends_on_length = True
        self.max_length = options.range or size.longest_length
        if self.max_length > MOST_POSITIONS:
            raise ValueError(f"range={self.max_length}: give at most {MOST_POSITIONS}")
        if self.max_length < size.train_length:
            raise ValueError(f"range={self.max_length} is below train_length={size.train_length}: give at least that")

    def draw(self, rows: int, length: int) -> Tensor:
        """Positions (1, length), the same for all sequences of a training batch."""
        return self._drawn(length)[None]

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the rotation at the positions drawn."""
        if not self.training:
            assert self.max_length is not None
            drawn = self._drawn(length, torch.Generator().manual_seed(0)).to(positions.device)
            positions = drawn[positions % len(drawn)] + positions // len(drawn) * self.max_length
        return super().attend(positions, key_length, length)

    def _drawn(self, length: int, generator: torch.Generator | None = None) -> Tensor:
        assert self.max_length is not None
        return torch.randperm(self.max_length, generator=generator)[:length].sort().values
