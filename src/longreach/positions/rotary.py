"""Rotary position embeddings (Su et al., 2021, arXiv 2104.09864), with two ways to stretch them to longer inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod
from longreach.positions.scaling import parse_scaling


@dataclass(frozen=True)
class RotaryOptions:
    """Options of `rotary`."""

    base: float = 10000.0
    """Base of the geometric sequence of wavelengths."""
    scaling: str = "none"
    """How positions stretch past L, as `longreach.positions.scaling` reads it. linear: positions times L/L' (arXiv
    2306.15595). ntk: the base times (L'/L)^(D/(D-2)) (NTK-aware scaling)."""

    def __post_init__(self) -> None:
        if not 1 < self.base < float("inf"):
            raise ValueError(f"base={self.base}: give a number above 1")
        parse_scaling(self.scaling, train_length=2)  # any L will do to see that it can be read


class Rotary(PositionMethod):
    """Rotates the pair (x_i, x_{i + D/2}) of queries and keys at position t by t base^(-2i/D), in every layer."""

    def __init__(self, options: RotaryOptions, size: ModelSize):
        super().__init__()
        if size.head_dim % 2:
            raise ValueError(f"head_dim={size.head_dim} with rotary positions: give an even number")
        if options.scaling.startswith("ntk") and size.head_dim < 4:
            raise ValueError(f"head_dim={size.head_dim} with scaling={options.scaling}: give at least 4")
        self.base = options.base
        self.head_dim = size.head_dim
        self.scaling = parse_scaling(options.scaling, size.train_length)
        self.depends_on_length = self.scaling.depends_on_length

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the rotation, computed in float32."""
        base, stretch = self.base, self.scaling.stretch(length)
        if self.scaling.name.startswith("ntk"):
            base *= stretch ** (self.head_dim / (self.head_dim - 2))
        pair = torch.arange(0, self.head_dim, 2, device=positions.device)
        frequency = base ** (-pair / self.head_dim)  # [D / 2]
        if self.scaling.name.startswith("linear"):
            frequency = frequency * (1.0 / stretch)
        angle = positions[:, None, :, None] * frequency  # [B or 1, 1, Tq, D / 2]
        angle = torch.cat((angle, angle), dim=-1)
        return AttentionPositions(
            rotation=(angle.cos(), angle.sin()), logit_factor=float(self.scaling.logit_factor(length))
        )


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys (B, H, T, D) by (cos, sin) of shape (B or 1, 1, T, D); the dtype of x is kept."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
