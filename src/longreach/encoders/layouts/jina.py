"""JinaBERT v2: embeddings in English, German, Chinese and Spanish, ColBERT, rerankers."""

from torch import Tensor

from longreach.encoders.config import EncoderConfig
from longreach.encoders.layouts.blocks import GatedMLP, Layer


class JinaLayer(Layer):
    """Post-norm attention, and a gated MLP whose first half is the gate."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.mlp = GatedMLP(config)

    def after(self, attended: Tensor, x: Tensor) -> Tensor:
        """(..., C) each to (..., C)."""
        out: Tensor = self.mlp(self.attention.output(attended, x))
        return out
