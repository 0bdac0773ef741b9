"""The relative bias of T5 (Raffel et al., 2020, arXiv 1910.10683): one learned scalar per head and distance bucket."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod, bias_by_distance


@dataclass(frozen=True)
class T5Options:
    """Options of `t5`."""

    num_buckets: int = 32
    """Number of buckets: the first half for one distance each, the rest spaced logarithmically."""
    max_distance: int = 128
    """The distance from which on all keys share the last bucket."""

    def __post_init__(self) -> None:
        if self.num_buckets < 2:
            raise ValueError(f"num_buckets={self.num_buckets}: give at least 2")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(f"max_distance={self.max_distance}: give more than num_buckets // 2")


class T5(PositionMethod):
    """Adds bias[h, bucket(i - j)] to the scaled scores, the same in every layer."""

    def __init__(self, options: T5Options, size: ModelSize):
        super().__init__()
        self.options = options
        self.bias = nn.Embedding(options.num_buckets, size.num_heads)
        nn.init.zeros_(self.bias.weight)

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the bias. It is dense: T5's bias has no cheaper form for PyTorch's attention."""
        by_distance = self.bias(self.bucket(torch.arange(key_length, device=positions.device)))  # [Tk, H]
        return AttentionPositions(bias=bias_by_distance(by_distance.t(), positions.shape[-1]))

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance i - j >= 0, int64: causal T5 spends all its buckets on the past."""
        exact = self.options.num_buckets // 2
        log_ratio = torch.log(distance.clamp(min=1).double() / exact) / math.log(self.options.max_distance / exact)
        # Distances that stand on a border of two buckets must not fall below it by rounding.
        spaced = exact + (log_ratio * (self.options.num_buckets - exact) + 1e-9).long()
        return torch.where(distance < exact, distance, spaced.clamp(max=self.options.num_buckets - 1))
