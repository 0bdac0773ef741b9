"""FIRE, a learned function of distance over position (Li et al., ICLR 2024, arXiv 2310.04418)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod

CHUNK = 2**22
"""Most elements of the hidden layer that lie in memory at a time: 16 MiB in float32."""


@dataclass(frozen=True)
class FireOptions:
    """Options of `fire`."""

    width: int = 32
    """Width of the hidden layer of f, the paper's."""
    threshold: float | None = None
    """Where the threshold T starts, in tokens: a quarter of the training length when None, as in the paper, where it is
    512 at 2,048."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: give at least 1")
        if self.threshold is not None and not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold={self.threshold}: give a positive number of tokens")


class Fire(PositionMethod):
    """Adds f(psi(i - j) / psi(max(i, T))) with psi(x) = log(1 + c x), the same in every layer.

    f is a network of one hidden layer of ReLU with an output for each head; c and T, both positive, are learned too.
    The quotient is between 0 and 1 at any length: that is the interpolation.
    """

    def __init__(self, options: FireOptions, size: ModelSize):
        super().__init__()
        self.inner = nn.Linear(1, options.width)
        self.outer = nn.Linear(options.width, size.num_heads)
        self.c = nn.Parameter(torch.tensor(0.1))
        self.threshold = options.threshold or size.train_length / 4
        self.threshold_factor = nn.Parameter(torch.tensor(1.0))

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the bias, dense as that of T5: (H, Tq, Tk), or with B in front where sequences stand elsewhere.

        f is made for some rows of queries at a time, and once more for gradients, so that its hidden layer is never
        held for all pairs.
        """
        if positions.stride(0) == 0:  # one row that is expanded
            positions = positions[:1]
        query_length = positions.shape[-1]
        distance = torch.arange(key_length, device=positions.device)  # [Tk]
        ends = torch.arange(key_length - query_length, key_length, device=positions.device)  # [Tq]
        rows = max(1, CHUNK // (positions.shape[0] * key_length * self.inner.out_features))
        pieces = []
        for at, own in zip(positions.split(rows, dim=-1), ends.split(rows), strict=True):
            distances = (own[:, None] - distance).clamp(min=0)  # [rows, Tk]
            if rows < query_length and torch.is_grad_enabled():
                pieces.append(checkpoint(self._bias, distances, at, use_reentrant=False))
            else:
                pieces.append(self._bias(distances, at))
        bias = torch.cat(pieces, dim=-2)  # [B or 1, H, Tq, Tk]
        return AttentionPositions(bias=bias[0] if bias.shape[0] == 1 else bias)

    def _bias(self, distances: Tensor, positions: Tensor) -> Tensor:
        """f for distances (Tq, Tk) of queries at positions (B, Tq), as (B, H, Tq, Tk)."""
        c = self.c.abs()
        threshold = self.threshold * self.threshold_factor.abs()
        normalizer = torch.log1p(c * torch.maximum(positions, threshold))  # [B, Tq]
        share = torch.log1p(c * distances) / normalizer[..., None]  # [B, Tq, Tk]
        values: Tensor = self.outer(self.inner(share[..., None]).relu())  # [B, Tq, Tk, H]
        return values.movedim(-1, 1)
