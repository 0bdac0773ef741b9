"""KERPLE, biases that fall as a power or a logarithm of distance (Chi et al., NeurIPS 2022, arXiv 2205.09921)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod, bias_by_distance

LEAST = 0.01
"""What the authors' code keeps parameters above; here they start above it and stay positive."""


@dataclass(frozen=True)
class KerpleOptions:
    """Options of `kerple`."""

    kernel: Literal["log", "power"] = "log"
    """log: -r1 log(1 + r2 d). power: -r1 d^r2, which is ALiBi with learned slopes at r2 = 1."""


class Kerple(PositionMethod):
    """Adds -r1 log(1 + r2 (i - j)) or -r1 (i - j)^r2, r1 > 0 and r2 > 0 learned for each head, r2 <= 2 as a power.

    The same in every layer, where the authors' code learns them for each. They start as there, drawn uniformly: of log
    r1 below 2 and r2 below 1, of power r1 below 1 and r2 below 2.
    """

    def __init__(self, options: KerpleOptions, size: ModelSize):
        super().__init__()
        self.kernel = options.kernel
        largest = (2.0, 1.0) if options.kernel == "log" else (1.0, 2.0)
        r1, r2 = (torch.rand(size.num_heads).mul(end).clamp(min=LEAST) for end in largest)
        self.log_r1 = nn.Parameter(r1.log())
        # exp and a sigmoid keep them where they belong.
        self.raw_r2 = nn.Parameter(r2.log() if options.kernel == "log" else (r2 / 2).logit(eps=1e-6))

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the bias, dense as that of T5."""
        distance = torch.arange(key_length, device=positions.device, dtype=self.log_r1.dtype)
        r1 = self.log_r1.exp()[:, None]
        if self.kernel == "log":
            values = -r1 * torch.log1p(self.raw_r2.exp()[:, None] * distance)
        else:
            values = -r1 * distance ** (2 * self.raw_r2.sigmoid())[:, None]
        return AttentionPositions(bias=bias_by_distance(values, positions.shape[-1]))
