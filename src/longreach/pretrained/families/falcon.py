"""Falcon with alibi (Falcon-RW): the bias is added before the scale, its slopes and products rounded to bfloat16."""

from functools import partial
from typing import Any

from torch import Tensor

from longreach.conformance.golden import DIALECTS
from longreach.ops.alibi import alibi_slopes
from longreach.pretrained.attend import ATTRIBUTE, attend
from longreach.pretrained.layout import Layout
from longreach.pretrained.masks import hand_mask


def check_falcon(config: Any) -> None:
    """ValueError where the configuration of a Falcon says rotary positions."""
    if not config.alibi:
        raise ValueError("alibi=False: this Falcon has rotary positions and no ALiBi, there is nothing to extend")


def falcon_layout(base: Any) -> Layout:
    """What is to be swapped in a FalconModel."""
    config = base.config
    attentions = tuple(block.self_attention for block in base.h)
    return Layout(
        base=base,
        swaps=((base, FalconBase), *((module, FalconAttention) for module in attentions)),
        prepare=partial(hand_mask, counted=False),
        slopes=alibi_slopes(config.num_attention_heads, device="cpu"),
        dialect=DIALECTS["falcon"],
    )


class FalconBase:
    """What is different in an extended FalconModel."""

    @property
    def use_alibi(self: Any) -> bool:
        """Whether to make a bias; attention makes its own."""
        return ATTRIBUTE not in vars(self) and vars(self)["use_alibi"]

    @use_alibi.setter
    def use_alibi(self: Any, value: bool) -> None:
        """Keep what the stock code says, for when it is restored."""
        vars(self)["use_alibi"] = value


class FalconAttention:
    """Methods of an extended FalconAttention, of any attn_implementation."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: None,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden states (B, T, C), and the weights where they are wanted."""
        # [B, T, H or Hkv, D]
        q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
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
            bias_scale=self.inv_norm_factor,
            dropout_p=self.attention_dropout.p,
            weights=output_attentions,
        )
        return self.dense(out.transpose(1, 2).flatten(2)), weights
