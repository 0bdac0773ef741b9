"""JinaBERT v2 for code: queries and keys are normed, and the residual stream goes another way."""

from torch import Tensor, nn

from longreach.encoders.config import EncoderConfig
from longreach.encoders.layouts.blocks import Layer, Projections, gate, layer_norm
from longreach.ops.linear import Linear


class NormedProjections(Projections):
    """Queries and keys normed over the full width, before heads are split."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.layer_norm_q, self.layer_norm_k = layer_norm(config), layer_norm(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) to three of (..., C)."""
        return self.layer_norm_q(self.query(x)), self.layer_norm_k(self.key(x)), self.value(x)


class SecondHalfMLP(nn.Module):
    """down(first half * act(second half)): the other half is the gate than in other layouts."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.up_gated_layer = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_layer = Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.act = gate(config)

    def forward(self, h: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        first, second = self.up_gated_layer(h).chunk(2, dim=-1)
        out: Tensor = self.down_layer(self.dropout(first * self.act(second)))
        return out


class JinaCodeLayer(Layer):
    """The residual is added twice: within attention, as everywhere, and once more after it."""

    projections = NormedProjections

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.layer_norm_1, self.layer_norm_2 = layer_norm(config), layer_norm(config)
        self.mlp = SecondHalfMLP(config)

    def after(self, attended: Tensor, x: Tensor) -> Tensor:
        """(..., C) each to (..., C)."""
        h = self.layer_norm_1(x + self.attention.output(attended, x))
        out: Tensor = self.layer_norm_2(h + self.mlp(h))
        return out
