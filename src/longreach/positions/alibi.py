"""Attention with linear biases (Press, Smith, Lewis, ICLR 2022), with position interpolation (arXiv 2310.13017)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from longreach.ops.alibi import alibi_slopes
from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod
from longreach.positions.scaling import parse_scaling

PAPER_EXPONENT = 8.0
"""The paper's slopes fall to 2^-8."""


@dataclass(frozen=True)
class AlibiOptions:
    """Options of `alibi`."""

    scaling: str = "none"
    """How slopes and logits change past L, as `longreach.positions.scaling` reads it: linear for L/L' times the slopes
    of each input longer than L, linear-fixed=4 for a quarter of them at any length, ntk, and so on."""
    learned: bool = False
    """Train the slopes, from those of `slopes` as a start; they stay positive."""
    slopes: Literal["paper", "closed", "equal", "random"] = "paper"
    """m_h of head h of H, with e the exponent. paper: 2^(-e h/H), and where H is no power of two as the paper's code
    has it, see `longreach.ops.alibi.alibi_slopes`. closed: 2^(-e h/H) for any H, as some other implementations have it.
    equal: 2^(-e/2) for all heads, midway between them. random: 2^(-e u), u drawn uniformly from 0 to 1 when weights
    are: the paper (Section 3) found slopes drawn at random to do well at times."""
    exponent: float = PAPER_EXPONENT
    """e: the shallowest slope is 2^-e. The paper's sequence is that of 8."""

    def __post_init__(self) -> None:
        parse_scaling(self.scaling, train_length=2).require_slopes()  # any L will do to see that it can be read
        if not 0 < self.exponent <= 64:
            raise ValueError(f"exponent={self.exponent}: give a number above 0 and at most 64")

    @property
    def are_the_papers(self) -> bool:
        """Whether the slopes are the paper's, trained or scaled or not."""
        return self.slopes == "paper" and self.exponent == PAPER_EXPONENT


class Alibi(PositionMethod):
    """Gives slopes: attention adds -m_h (i - j) to the scaled scores of head h."""

    slopes: Tensor

    def __init__(self, options: AlibiOptions, size: ModelSize):
        super().__init__()
        self.options = options
        self.scaling = parse_scaling(options.scaling, size.train_length)
        self.depends_on_length = self.scaling.depends_on_length
        slopes = _slopes(options, size.num_heads)
        if options.learned:
            self.log_slopes = nn.Parameter(slopes.log())  # logarithms keep them positive
        else:
            self.register_buffer("slopes", slopes, persistent=options.slopes == "random")

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the slopes, scaled as the options say."""
        slopes = self.log_slopes.exp() if self.options.learned else self.slopes
        return AttentionPositions(
            slopes=self.scaling(slopes, length), logit_factor=float(self.scaling.logit_factor(length))
        )


def _slopes(options: AlibiOptions, num_heads: int) -> Tensor:
    """The slopes that options name, (H,) float32, before any scaling."""
    if options.are_the_papers:
        return alibi_slopes(num_heads)
    exponent = options.exponent
    if options.slopes == "paper":
        return alibi_slopes(num_heads) ** (exponent / PAPER_EXPONENT)
    if options.slopes == "random":
        return 2 ** (-exponent * torch.rand(num_heads))
    if options.slopes == "equal":
        return torch.full((num_heads,), 2 ** (-exponent / 2))
    return 2 ** (-exponent * torch.arange(1, num_heads + 1) / num_heads)
