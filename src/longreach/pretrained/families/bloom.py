"""BLOOM: ALiBi added after the scale, from absolute positions in the dtype of the model."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.conformance.golden import DIALECTS
from longreach.ops.alibi import alibi_slopes
from longreach.pretrained.attend import attend
from longreach.pretrained.layout import Layout
from longreach.pretrained.masks import hand_mask


def bloom_layout(base: Any) -> Layout:
    """What is to be swapped in a BloomModel."""
    config = base.config
    attentions = ((block.self_attention, BloomAttention) for block in base.h)
    activations = ((block.mlp.gelu_impl, BloomGelu) for block in base.h)
    return Layout(
        base=base,
        swaps=((base, BloomBase), *attentions, *activations),
        prepare=partial(hand_mask, counted=False),
        slopes=alibi_slopes(config.num_attention_heads, device="cpu"),
        dialect=DIALECTS["bloom"],
        rounds_bias=True,
    )


class BloomBase:
    """Methods of an extended BloomModel."""

    def build_alibi_tensor(self: Any, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        """Nothing of the length of the keys: attention makes its own bias."""
        return attention_mask


class BloomAttention:
    """Methods of an extended BloomAttention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden states (B, T, C), the residual added, and the weights where they are wanted."""
        q, k, v = self._reshape(self.query_key_value(hidden_states))  # [B, H, T, D]
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            layer_past,
            scale=self.inv_norm_factor,
            dropout_p=self.attention_dropout.p,
            weights=output_attentions,
        )
        out = self.dense(out.transpose(1, 2).flatten(2))  # [B, T, C]
        return residual + F.dropout(out, self.hidden_dropout, self.training), weights


class BloomGelu:
    """Methods of an extended BloomGelu."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """GELU by tanh as one operation: the stock code's eight take about 5% of a decoding step of 768 channels.

        They have sqrt(2 / pi) to eight digits, which float64 alone can tell.
        """
        return super().forward(x) if x.dtype == torch.float64 else F.gelu(x, approximate="tanh")  # type: ignore[misc]
