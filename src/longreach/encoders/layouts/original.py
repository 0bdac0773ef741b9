"""JinaBERT v2 with `feed_forward_type: original`, as gbert-large-alibi has it: the MLP is plain BERT's."""

import torch.nn.functional as F
from torch import Tensor, nn

from longreach.encoders.config import EncoderConfig
from longreach.encoders.layouts.blocks import Added, Layer
from longreach.ops.linear import Linear


class Intermediate(nn.Module):
    """gelu(dense(h))."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)

    def forward(self, h: Tensor) -> Tensor:
        """(..., C) to (..., I)."""
        return F.gelu(self.dense(h))


class OriginalLayer(Layer):
    """BERT's own layer but for ALiBi."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.intermediate = Intermediate(config)
        self.output = Added(config, config.intermediate_size)

    def after(self, attended: Tensor, x: Tensor) -> Tensor:
        """(..., C) each to (..., C)."""
        h = self.attention.output(attended, x)
        out: Tensor = self.output(self.intermediate(h), h)
        return out
