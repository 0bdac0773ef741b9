"""Attention with linear biases (Press, Smith, Lewis, ICLR 2022), with position interpolation (arXiv 2310.13017)."""

from dataclasses import dataclass

from torch import Tensor, nn

from longreach.ops.alibi import alibi_slopes
from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod
from longreach.positions.scaling import parse_scaling


@dataclass(frozen=True)
class AlibiOptions:
    """Options of `alibi`."""

    scaling: str = "none"
    """How slopes and logits change past L, as `longreach.positions.scaling` reads it: linear for L/L' times the slopes
    of each input longer than L, linear-fixed=4 for a quarter of them at any length, ntk, and so on."""
    learned: bool = False
    """Train the slopes, from the paper's as a start; they stay positive."""

    def __post_init__(self) -> None:
        parse_scaling(self.scaling, train_length=2).require_slopes()  # any L will do to see that it can be read


class Alibi(PositionMethod):
    """Gives slopes: attention adds -m_h (i - j) to the scaled scores of head h."""

    slopes: Tensor

    def __init__(self, options: AlibiOptions, size: ModelSize):
        super().__init__()
        self.options = options
        self.scaling = parse_scaling(options.scaling, size.train_length)
        self.depends_on_length = self.scaling.depends_on_length
        slopes = alibi_slopes(size.num_heads)
        if options.learned:
            self.log_slopes = nn.Parameter(slopes.log())  # logarithms keep them positive
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the slopes, scaled as the options say."""
        slopes = self.log_slopes.exp() if self.options.learned else self.slopes
        return AttentionPositions(
            slopes=self.scaling(slopes, length), logit_factor=float(self.scaling.logit_factor(length))
        )
