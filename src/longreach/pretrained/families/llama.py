"""Llama, Mistral and Qwen2 after `convert`: nothing is rotated, and attention has ALiBi."""

from typing import Any

from torch import Tensor, nn

from longreach.pretrained.attend import attend
from longreach.pretrained.layout import WEIGHTS, Layout, converted_layout


def is_llama_base(module: nn.Module) -> bool:
    """Whether a module is transformers' own LlamaModel, MistralModel or Qwen2Model."""
    from transformers import LlamaModel, MistralModel, Qwen2Model

    return isinstance(module, LlamaModel | MistralModel | Qwen2Model)


def check_llama(config: Any) -> None:
    """Check that a Llama, Mistral or Qwen2 can have ALiBi, by its configuration.

    Raises:
        ValueError: some of its layers see a sliding window only.
    """
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windowed or (config.model_type == "mistral" and config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={config.sliding_window}: ALiBi is made for layers that see everything; "
            "load the model with sliding_window=None"
        )


def llama_layout(base: Any) -> Layout:
    """Find what is to be swapped in a LlamaModel, or one with the same attention.

    Raises:
        ValueError: it is not converted.
    """
    swaps = tuple((layer.self_attn, LlamaAttention) for layer in base.layers)
    return converted_layout(base.config.model_type, base, positions="rotary positions", swaps=swaps)


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
        dropout_p = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            past_key_values,
            scale=self.scaling,
            dropout_p=dropout_p,
            weights=WEIGHTS in kwargs,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights
