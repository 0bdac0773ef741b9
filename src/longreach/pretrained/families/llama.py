"""Llama, Mistral and Qwen2 after `convert`: nothing is rotated, and attention has ALiBi."""

from typing import Any

from torch import Tensor

from longreach.pretrained.attend import attend
from longreach.pretrained.layout import WEIGHTS, Layout, converted_layout


def check_llama(config: Any) -> None:
    """ValueError where some layers of a Llama, Mistral or Qwen2 see a sliding window only."""
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windowed or (config.model_type == "mistral" and config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={config.sliding_window}: ALiBi is made for layers that see everything; "
            "load the model with sliding_window=None"
        )


def llama_layout(base: Any) -> Layout:
    """What is to be swapped in a converted LlamaModel, or one with the same attention."""
    swaps = tuple((layer.self_attn, LlamaAttention) for layer in base.layers)
    return converted_layout(base, positions="rotary positions", swaps=swaps)


class LlamaAttention:
    """Methods of a converted LlamaAttention, MistralAttention or Qwen2Attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden states (B, T, C), nothing rotated, and the weights where they are wanted."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(hidden_states).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for f in projections)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            past_key_values,
            scale=self.scaling,
            dropout_p=self.attention_dropout,
            weights=WEIGHTS in kwargs,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights
