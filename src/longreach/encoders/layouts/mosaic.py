"""MosaicBERT, DNABERT-2 and others of its code: one matrix makes queries, keys and values."""

from torch import Tensor, nn

from longreach.encoders.config import EncoderConfig
from longreach.encoders.layouts.blocks import GatedMLP, Layer
from longreach.ops.linear import Linear


class OneProjection(nn.Module):
    """Queries of all heads, then keys, then values."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) to three of (..., C)."""
        q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        return q, k, v


class MosaicLayer(Layer):
    """Post-norm attention, and Jina's gated MLP."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, OneProjection(config))
        self.mlp = GatedMLP(config)

    def after(self, attended: Tensor, x: Tensor) -> Tensor:
        """(..., C) each to (..., C)."""
        out: Tensor = self.mlp(self.attention.output(attended, x))
        return out
