"""MPT: ALiBi in float32 after the scale, sized by the configuration, which is what limits its length.

Replit-code v1 is MPT too, when it is loaded as transformers' own MptForCausalLM.
"""

import math
from functools import partial
from typing import Any

from torch import Tensor

from longreach.conformance.golden import DIALECTS
from longreach.ops.alibi import alibi_slopes
from longreach.pretrained.attend import attend
from longreach.pretrained.layout import Layout
from longreach.pretrained.masks import hand_mask


def check_mpt(config: Any) -> None:
    """ValueError where an MPT has no ALiBi, or was trained with what transformers' own code leaves out."""
    attention = config.attn_config
    if not attention.alibi:
        raise ValueError("attn_config.alibi=False: this MPT was trained without ALiBi, there is nothing to extend")
    steepness = attention.alibi_bias_max
    if isinstance(steepness, bool) or not isinstance(steepness, int | float) or not 0 < steepness < math.inf:
        raise ValueError(f"attn_config.alibi_bias_max={steepness!r}: give a positive number, 8 in the paper")
    ffn = getattr(config, "ffn_config", None) or {}
    for name, value, *computed in (
        ("attn_config.attn_type", attention.attn_type, "multihead_attention"),
        ("attn_config.qk_ln", attention.qk_ln, False),
        ("attn_config.prefix_lm", attention.prefix_lm, False),
        ("attn_config.rope", getattr(attention, "rope", False), False),
        ("attn_config.sliding_window_size", getattr(attention, "sliding_window_size", -1), -1),
        ("attn_config.attn_logit_softcapping", getattr(attention, "attn_logit_softcapping", None), None),
        ("ffn_config.ffn_type", ffn.get("ffn_type", "mptmlp") if isinstance(ffn, dict) else ffn, "mptmlp"),
        ("norm_type", config.norm_type, "low_precision_layernorm", "layernorm"),
        ("no_bias", config.no_bias, True),
        ("logit_scale", config.logit_scale, None),
    ):
        if value not in computed:
            raise ValueError(
                f"{name}={value!r}: transformers' own code does not compute it, and gives other outputs than this MPT "
                f"was trained for; only a model with {name}={computed[0]!r} can be extended"
            )


def mpt_layout(base: Any) -> Layout:
    """Find what is to be swapped in an MptModel.

    Slopes are those of the configuration's alibi_bias_max, which transformers ignores. Its bias is float32.
    """
    config = base.config
    blocks = ((block, MptBlock) for block in base.blocks)
    attentions = ((block.attn, MptAttention) for block in base.blocks)
    return Layout(
        base=base,
        swaps=((base, MptBase), *blocks, *attentions),
        prepare=partial(hand_mask, dense=hidden_where_set),
        slopes=alibi_slopes(config.n_heads, device="cpu") ** (config.attn_config.alibi_bias_max / 8),
        dialect=DIALECTS["mpt"],
    )


def hidden_where_set(mask: Tensor) -> Tensor:
    """Which keys a mask of four axes hides, (B, H, T, Tk) bool: the stock code hides those where it is not 0."""
    return mask != 0


class MptBase:
    """Methods of an extended MptModel."""

    def build_mpt_alibi_tensor(
        self: Any, num_heads: int, sequence_length: int, alibi_bias_max: int = 8, device: Any = None
    ) -> None:
        """Nothing: attention makes its own bias, of any length."""
        return None


class MptBlock:
    """Methods of an extended MptBlock."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: None,
        attention_mask: Tensor,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock block, whose attention is told in place of a bias whether weights are wanted."""
        return super().forward(hidden_states, output_attentions, attention_mask, layer_past)  # type: ignore[misc]


class MptAttention:
    """Methods of an extended MptAttention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: bool,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden states (B, T, C), and the weights where position_bias says that they are wanted."""
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = (x.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            past_key_values,
            scale=self.softmax_scale,
            dropout_p=self.attn_dropout_p,
            weights=position_bias,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights
