"""Rotary position embeddings (Su et al., 2021, arXiv 2104.09864), with three ways to stretch them to longer inputs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod
from longreach.positions.scaling import parse_scaling

FEWEST_TURNS, MOST_TURNS = 1, 32
"""Of yarn, its beta_slow and beta_fast: pairs that turn less often within L are interpolated, more often kept."""


@dataclass(frozen=True)
class RotaryOptions:
    """Options of `rotary`."""

    base: float = 10000.0
    """Base of the geometric sequence of wavelengths."""
    scaling: str = "none"
    """How positions stretch past L, as `longreach.positions.scaling` reads it. linear: positions times L/L' (arXiv
    2306.15595). ntk: the base times (L'/L)^(D/(D-2)) (NTK-aware scaling). yarn: by parts (arXiv 2309.00071)."""

    def __post_init__(self) -> None:
        if not 1 < self.base < float("inf"):
            raise ValueError(f"base={self.base}: give a number above 1")
        parse_scaling(self.scaling, train_length=2)  # any L will do to see that it can be read


class Rotary(PositionMethod):
    """Rotates the pair (x_i, x_{i + D/2}) of queries and keys at position t by t base^(-2i/D), in every layer."""

    def __init__(self, options: RotaryOptions, size: ModelSize):
        super().__init__()
        if size.head_dim % 2:
            raise ValueError(f"head_dim={size.head_dim} with rotary positions: give an even d_model / num_heads")
        self.base = options.base
        self.head_dim = size.head_dim
        self.scaling = parse_scaling(options.scaling, size.train_length)
        if self.scaling.kind in ("ntk", "yarn") and size.head_dim < 4:
            raise ValueError(f"head_dim={size.head_dim} with scaling={options.scaling}: give at least 4")
        self.depends_on_length = self.scaling.depends_on_length

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the rotation, computed in float32, and the factor of the logits."""
        angle = positions[:, None, :, None] * self.frequencies(length, positions.device)  # [B or 1, 1, Tq, D / 2]
        angle = torch.cat((angle, angle), dim=-1)
        return AttentionPositions(rotation=(angle.cos(), angle.sin()), logit_factor=self.logit_factor(length))

    def logit_factor(self, length: int) -> float:
        """What the logits q . k are multiplied with at a length L'."""
        factor = float(self.scaling.logit_factor(length))
        if self.scaling.kind == "yarn":
            factor *= (0.1 * math.log(self.scaling.stretch(length)) + 1) ** 2  # its 1/t, t the temperature
        return factor

    def frequencies(self, length: int, device: torch.device | None = None) -> Tensor:
        """The angle by which each pair turns from one position to the next, (D/2,), stretched for a length L'."""
        base, stretch = self.base, self.scaling.stretch(length)
        if self.scaling.kind == "ntk":
            base *= stretch ** (self.head_dim / (self.head_dim - 2))
        pair = torch.arange(0, self.head_dim, 2, device=device)
        frequency = base ** (-pair / self.head_dim)  # [D / 2]
        if self.scaling.kind == "linear":
            frequency = frequency * (1.0 / stretch)
        if self.scaling.kind == "yarn":
            frequency = frequency * (1 - self._interpolated(device) * (1 - 1 / stretch))
        return frequency

    def _interpolated(self, device: torch.device | None) -> Tensor:
        """How far yarn interpolates each pair, (D/2,): from 0 where it turns often within L to 1 where it does not.

        The ramp is the one of its authors' code, linear in the number of the pair between borders rounded outwards; in
        the paper's text it is linear in the number of turns.
        """
        assert self.scaling.train_length is not None  # both yarns have one
        first, last = (
            self.head_dim * math.log(self.scaling.train_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))
            for turns in (MOST_TURNS, FEWEST_TURNS)
        )  # the pair that turns so often within L, as a real number
        low, high = max(math.floor(first), 0), min(math.ceil(last), self.head_dim - 1)
        pair = torch.arange(self.head_dim // 2, device=device)
        return ((pair - low) / max(high - low, 0.001)).clamp(0, 1)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys (B, H, T, D) by (cos, sin) of shape (B or 1, 1, T, D); the dtype of x is kept."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
