"""JinaBERT v2: embeddings in English, German, Chinese and Spanish, ColBERT, rerankers."""

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from longreach.encoders.config import EncoderConfig
from longreach.encoders.layouts.blocks import Attend, Attention, GatedMLP, Projections


class JinaLayer(GradientCheckpointingLayer):
    """Post-norm attention, and a gated MLP whose first half is the gate."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config, Projections(config))
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(..., C) to (..., C)."""
        out: Tensor = self.mlp(self.attention(x, attend))
        return out
