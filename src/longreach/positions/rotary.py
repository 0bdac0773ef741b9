"""Rotary position embeddings (Su et al., 2021, arXiv 2104.09864), with two ways to stretch them to longer inputs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod


@dataclass(frozen=True)
class RotaryOptions:
    """Options of `rotary`."""

    base: float = 10000.0
    """Base of the geometric sequence of wavelengths."""
    scaling: Literal["none", "linear", "ntk"] = "none"
    """linear: positions times L/L' (arXiv 2306.15595). ntk: the base times (L'/L)^(D/(D-2)) (NTK-aware scaling)."""
    interpolation_factor: float | None = None
    """L/L', below 1, for linear and ntk; None takes it from the length of each input once that exceeds L."""

    def __post_init__(self) -> None:
        if not 1 < self.base < float("inf"):
            raise ValueError(f"base={self.base}: give a number above 1")
        if self.scaling not in ("none", "linear", "ntk"):
            raise ValueError(f"scaling={self.scaling!r}: give none, linear or ntk")
        if self.interpolation_factor is not None:
            if self.scaling == "none":
                raise ValueError(
                    f"interpolation_factor={self.interpolation_factor}: give scaling=linear or ntk with it"
                )
            if not 0 < self.interpolation_factor <= 1:
                raise ValueError(f"interpolation_factor={self.interpolation_factor}: give more than 0 and at most 1")


class Rotary(PositionMethod):
    """Rotates the pair (x_i, x_{i + D/2}) of queries and keys at position t by t base^(-2i/D), in every layer."""

    def __init__(self, options: RotaryOptions, size: ModelSize):
        super().__init__()
        if size.head_dim % 2:
            raise ValueError(f"head_dim={size.head_dim} with rotary positions: give an even number")
        if options.scaling == "ntk" and size.head_dim < 4:
            raise ValueError(f"head_dim={size.head_dim} with scaling=ntk: give at least 4")
        self.options = options
        self.head_dim = size.head_dim
        self.train_length = size.train_length
        self.depends_on_length = options.scaling != "none" and options.interpolation_factor is None

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the rotation, computed in float32."""
        base, factor = self.options.base, self.options.interpolation_factor
        if factor is None:
            factor = min(1.0, self.train_length / length) if self.depends_on_length else 1.0
        if self.options.scaling == "ntk":
            base *= (1.0 / factor) ** (self.head_dim / (self.head_dim - 2))
        pair = torch.arange(0, self.head_dim, 2, device=positions.device)
        frequency = base ** (-pair / self.head_dim)  # [D / 2]
        if self.options.scaling == "linear":
            frequency = frequency * factor
        angle = positions[:, None, :, None] * frequency  # [B or 1, 1, Tq, D / 2]
        angle = torch.cat((angle, angle), dim=-1)
        return AttentionPositions(rotation=(angle.cos(), angle.sin()))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys (B, H, T, D) by (cos, sin) of shape (B or 1, 1, T, D); the dtype of x is kept."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
