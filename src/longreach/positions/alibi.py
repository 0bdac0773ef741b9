"""Attention with linear biases (Press, Smith, Lewis, ICLR 2022), with position interpolation (arXiv 2310.13017)."""

from dataclasses import dataclass

from torch import Tensor, nn

from longreach.ops.alibi import alibi_slopes
from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod


@dataclass(frozen=True)
class AlibiOptions:
    """Options of `alibi`."""

    interpolation_factor: float = 1.0
    """L/L', at most 1: multiplies the slopes, at every length."""
    dynamic: bool = False
    """Multiply the slopes by L/L' for each input longer than L, by its length L'."""
    learned: bool = False
    """Train the slopes, from the paper's as a start; they stay positive."""

    def __post_init__(self) -> None:
        if not 0 < self.interpolation_factor <= 1:
            raise ValueError(f"interpolation_factor={self.interpolation_factor}: give more than 0 and at most 1")
        if self.dynamic and self.interpolation_factor != 1.0:
            raise ValueError(
                f"interpolation_factor={self.interpolation_factor} with dynamic=true: give one of the two, "
                "a dynamic factor comes from the length"
            )


class Alibi(PositionMethod):
    """Gives slopes: attention adds -m_h (i - j) to the scaled scores of head h."""

    slopes: Tensor

    def __init__(self, options: AlibiOptions, size: ModelSize):
        super().__init__()
        self.options = options
        self.train_length = size.train_length
        self.depends_on_length = options.dynamic
        slopes = alibi_slopes(size.num_heads)
        if options.learned:
            self.log_slopes = nn.Parameter(slopes.log())  # logarithms keep them positive
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """Give the slopes, scaled as the options say."""
        factor = min(1.0, self.train_length / length) if self.options.dynamic else self.options.interpolation_factor
        slopes = self.log_slopes.exp() if self.options.learned else self.slopes
        return AttentionPositions(slopes=slopes * factor if factor != 1.0 else slopes)
