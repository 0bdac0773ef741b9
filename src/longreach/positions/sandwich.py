"""Sandwich, sinusoids as a bias of distance (Chi et al., ACL 2023, arXiv 2212.10356)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod, bias_by_distance


@dataclass(frozen=True)
class SandwichOptions:
    """Options of `sandwich`."""

    dimension: int = 128
    """D', the dimension of the sinusoids, of the model's own apart."""

    def __post_init__(self) -> None:
        if self.dimension < 2 or self.dimension % 2:
            raise ValueError(f"dimension={self.dimension}: give an even number of at least 2")


class Sandwich(PositionMethod):
    """Adds H/(8h) sum_k (cos((i - j) / 10000^(2k/D')) - 1), k = 1..D'/2, for head h = 1..H: nothing is learned.

    The sum is the product of two sinusoidal embeddings; the -1 takes from each head a constant, which softmax ignores.
    """

    def __init__(self, options: SandwichOptions, size: ModelSize):
        super().__init__()
        self.dimension = options.dimension
        self.num_heads = size.num_heads

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the bias, in float32 from angles in float64, dense as that of T5."""
        distance = torch.arange(key_length, device=positions.device, dtype=torch.float64)
        curve = torch.zeros_like(distance)
        for pair in range(1, self.dimension // 2 + 1):  # one by one, or there would be D'/2 of each distance
            curve += torch.cos(distance * 10000.0 ** (-2 * pair / self.dimension)) - 1
        ratio = 8 * torch.arange(1, self.num_heads + 1, device=positions.device) / self.num_heads  # [H]
        values = (curve / ratio[:, None]).float()  # [H, Tk]
        return AttentionPositions(bias=bias_by_distance(values, positions.shape[-1]))
