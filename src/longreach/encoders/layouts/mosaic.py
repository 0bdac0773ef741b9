"""MosaicBERT, DNABERT-2 and others of its code: one matrix makes queries, keys and values."""

from torch import Tensor, nn

from longreach.encoders.config import EncoderConfig
from longreach.encoders.layouts.jina import JinaLayer
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


class MosaicLayer(JinaLayer):
    """Jina's but for its projections."""

    projections = OneProjection
