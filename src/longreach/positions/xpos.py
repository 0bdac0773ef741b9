"""xPos, rotary positions with a decay (Sun et al., ACL 2023, arXiv 2212.10554)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longreach.positions.method import AttentionPositions, ModelSize
from longreach.positions.rotary import Rotary, RotaryOptions

LARGEST_FACTOR = 1e30
"""Of a key: further out its product with a query would overflow float32 before the mask hides it."""


@dataclass(frozen=True)
class XposOptions:
    """Options of `xpos`."""

    base: float = 10000.0
    """Base of the geometric sequence of wavelengths."""
    gamma: float = 0.4
    """The slower a pair turns the less it decays: by (2i/D + gamma) / (1 + gamma) in `unit` tokens."""
    unit: int = 512
    """The distance in tokens over which a pair decays by that, its scale_base in the authors' code."""

    def __post_init__(self) -> None:
        RotaryOptions(self.base)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma}: give a positive number")
        if self.unit < 1:
            raise ValueError(f"unit={self.unit}: give a positive number of tokens")


class Xpos(Rotary):
    """Rotary, and pair i of a query at t times z_i^(t/unit), of a key z_i^(-t/unit): z_i^((i - j)/unit) in the scores.

    z_i = (2i/D + gamma) / (1 + gamma). Keys grow with their position, so that float32 sets an end to it: `max_length`.
    The paper's blockwise attention at inference is not part of this.
    """

    def __init__(self, options: XposOptions, size: ModelSize):
        super().__init__(RotaryOptions(options.base), size)
        self.gamma, self.unit = options.gamma, options.unit
        self.max_length = int(options.unit * math.log(LARGEST_FACTOR) / math.log(1 + 1 / options.gamma))
        if self.max_length < size.train_length:
            raise ValueError(
                f"unit={options.unit} with gamma={options.gamma} holds {self.max_length} positions in float32, below "
                f"train_length={size.train_length}: give larger ones"
            )

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the rotation of queries and that of keys, computed in float32."""
        attend = super().attend(positions, key_length, length)
        assert attend.rotation is not None
        pair = torch.arange(0, self.head_dim, 2, device=positions.device) / self.head_dim  # 2i/D
        decay = ((pair + self.gamma) / (1 + self.gamma)).log() / self.unit  # [D / 2], below 0
        factor = (positions[:, None, :, None] * torch.cat((decay, decay))).exp()  # [B or 1, 1, Tq, D]
        cos, sin = attend.rotation
        return AttentionPositions(rotation=(cos * factor, sin * factor), key_rotation=(cos / factor, sin / factor))
