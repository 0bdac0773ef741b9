"""GPT-2 after `convert`: its learned positions are left out, and its attention has ALiBi."""

from typing import Any

from torch import Tensor

from longreach.pretrained.attend import attend
from longreach.pretrained.layout import WEIGHTS, Layout, converted_layout


def check_gpt2(config: Any) -> None:
    """ValueError where a GPT-2 has cross-attention."""
    if config.add_cross_attention:
        raise ValueError("add_cross_attention=True: only a GPT-2 that is a plain decoder can have ALiBi")


def gpt2_layout(base: Any) -> Layout:
    """What is to be swapped in a GPT2Model that was converted."""
    swaps = ((base.wpe, NoPositions), *((block.attn, GPT2Attention) for block in base.h))
    return converted_layout(base, positions="learned positions", swaps=swaps)


class NoPositions:
    """Methods of the learned positions of a converted GPT-2."""

    def forward(self: Any, position_ids: Tensor) -> Tensor:
        """0 at any position, whatever the length; the weights take part, since DDP wants all of them to."""
        return 0.0 * self.weight[0, 0]


class GPT2Attention:
    """Methods of a converted GPT2Attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden states (B, T, C), and the weights where they are wanted."""
        heads = self.c_attn(hidden_states).unflatten(2, (3, self.num_heads, self.head_dim))  # [B, T, 3, H, D]
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            scale /= self.layer_idx + 1
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            past_key_values,
            scale=scale,
            dropout_p=self.attn_dropout.p,
            weights=WEIGHTS in kwargs,
        )
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2))), weights
