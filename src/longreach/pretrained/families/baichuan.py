"""Baichuan-13B and Baichuan2-13B: ALiBi in a causal mask of float values, which is as large as H x L x L.

Their code is remote code, which is not part of transformers; what is taken from a model is checked when it is found.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longreach.conformance.golden import Dialect
from longreach.ops.alibi import alibi_slopes
from longreach.pretrained.attend import ATTRIBUTE, attend
from longreach.pretrained.layout import Layout, require_layout
from longreach.pretrained.masks import hand_mask


def is_baichuan_base(module: nn.Module) -> bool:
    """Whether a module is a BaichuanModel, by what it holds."""
    return "layers" in module._modules and "embed_tokens" in module._modules


def baichuan_layout(base: Any) -> Layout:
    """What is to be swapped in a BaichuanModel; ValueError where it is the 7B model, or not laid out as known."""
    attentions = tuple(layer.self_attn for layer in base.layers)
    if hasattr(attentions[0], "rotary_emb"):
        raise ValueError("this Baichuan has rotary positions and no ALiBi (the 7B models), there is nothing to extend")
    require_layout(base, ("get_alibi_mask", "alibi_mask"))
    for module in attentions:
        require_layout(module, ("W_pack", "o_proj", "num_heads", "head_dim"), "past_key_value")
    return Layout(
        base=base,
        swaps=((base, BaichuanBase), *((module, BaichuanAttention) for module in attentions)),
        prepare=keep_mask,
        slopes=alibi_slopes(attentions[0].num_heads, device="cpu"),
        dialect=Dialect(positions="first"),
        keeps_tuples=True,
    )


def keep_mask(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the base model without the mask: `get_alibi_mask` hands out what carries it."""
    getattr(module, ATTRIBUTE).carrier = hand_mask(module, kwargs).get("attention_mask")
    return {**kwargs, "attention_mask": None}


class BaichuanBase:
    """Methods of an extended BaichuanModel."""

    def get_alibi_mask(self: Any, tensor: Tensor, seq_length_with_past: int) -> Tensor:
        """What carries the padding, in place of the mask H x L x L."""
        return getattr(self, ATTRIBUTE).carrier

    @property
    def alibi_mask(self: Any) -> Tensor:
        """The mask that the stock code keeps while it trains."""
        return getattr(self, ATTRIBUTE).carrier if ATTRIBUTE in vars(self) else vars(self)["alibi_mask"]

    @alibi_mask.setter
    def alibi_mask(self: Any, value: Tensor) -> None:
        """Keep nothing where extended: the next batch has its own padding."""
        if ATTRIBUTE not in vars(self):
            vars(self)["alibi_mask"] = value


class BaichuanAttention:
    """Methods of an extended BaichuanAttention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Attention of hidden states (B, T, C), weights where wanted, and keys and values as they are cached."""
        qkv = self.W_pack(hidden_states).chunk(3, dim=2)
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in qkv)  # [B, H, T, D]
        if past_key_value is not None:
            k, v = (torch.cat((past, x), dim=2) for past, x in zip(past_key_value, (k, v), strict=True))
        scale, wish = self.head_dim**-0.5, output_attentions
        out, weights = attend(self, q, k, v, attention_mask, past_key_value, scale=scale, weights=wish)
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights, (k, v) if use_cache else None
