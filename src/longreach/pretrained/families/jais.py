"""BTLM and JAIS: GPT-2's attention with ALiBi added after the scale, and muP's 1/d in place of 1/sqrt(d).

Their code is remote code, which is not part of transformers; what is taken from a model is checked when it is found.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longreach.conformance.golden import Dialect
from longreach.ops.alibi import alibi_slopes
from longreach.pretrained.attend import attend
from longreach.pretrained.layout import Layout, require_layout
from longreach.pretrained.masks import is_carrier, pack, read_documents, read_padding, require_size

ATTENTION_ATTRIBUTES = (
    "c_attn",
    "c_proj",
    "split_size",
    "num_heads",
    "head_dim",
    "scale_attn_weights",
    "attn_scale_power",
    "attn_dropout",
    "resid_dropout",
)


def is_jais_base(module: nn.Module) -> bool:
    """Whether a module is a BTLMModel or JAISModel, by what it holds; relative_pe is None with learned positions."""
    return hasattr(module, "relative_pe") and "h" in module._modules


def check_jais(config: Any) -> None:
    """ValueError where the configuration of a BTLM or JAIS says learned positions."""
    kind = getattr(config, "position_embedding_type", None)
    if kind != "alibi":
        raise ValueError(f"position_embedding_type={kind!r}: this model has no ALiBi, there is nothing to extend")


def jais_layout(base: Any) -> Layout:
    """What is to be swapped in a BTLMModel or JAISModel; ValueError where it is not laid out as known."""
    attentions = tuple(block.attn for block in base.h)
    for module in attentions:
        require_layout(module, ATTENTION_ATTRIBUTES, "position_bias")
    return Layout(
        base=base,
        swaps=((base.relative_pe, NoBias), *((module, JaisAttention) for module in attentions)),
        prepare=hand_key_mask,
        slopes=alibi_slopes(attentions[0].num_heads, device="cpu"),
        dialect=Dialect(mup_scale=attentions[0].attn_scale_power == 1.0),  # as BTLM has it, and not JAIS
        heeds_scaling=True,
        keeps_tuples=True,
    )


def hand_key_mask(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the base model, whose own mask is per key: checked, and without it where it hides nothing."""
    mask = kwargs.get("attention_mask")
    if is_carrier(mask) or read_documents(kwargs) is not None:
        raise ValueError("position_ids pack documents, which BTLM and JAIS cannot pass on: give one document per row")
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if mask is not None and inputs is not None:
        require_size(mask, inputs, kwargs.get("past_key_values"))
    if read_padding(mask) is None:
        return {**kwargs, "attention_mask": None}
    return kwargs


class NoBias:
    """Methods of the position bias of an extended model."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: attention makes its own bias."""
        return None


class JaisAttention:
    """Methods of an extended BTLMAttention or JAISAttention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        layer_past: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        position_bias: None = None,
    ) -> tuple[Tensor | tuple[Tensor, Tensor] | None, ...]:
        """Attention of hidden states (B, T, C), keys and values as they are cached, and weights where wanted."""
        for name, value in (("head_mask", head_mask), ("encoder_hidden_states", encoder_hidden_states)):
            if value is not None:
                raise ValueError(f"{name} is given: an extended model takes none; use longreach.restore(model) first")
        qkv = self.c_attn(hidden_states).split(self.split_size, dim=2)
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in qkv)  # [B, H, T, D]
        if layer_past is not None:
            k, v = (torch.cat((past, x), dim=2) for past, x in zip(layer_past, (k, v), strict=True))
        scale = self.head_dim**-self.attn_scale_power if self.scale_attn_weights else 1.0
        if getattr(self, "scale_attn_by_inverse_layer_idx", False):
            scale /= self.layer_idx + 1
        carrier = None
        if attention_mask is not None:  # (B, 1, 1, Tk), what the stock code adds to the scores: far below 0 for padding
            carrier = pack(attention_mask[:, 0, 0] < 0, None, q.device)
        options: dict[str, Any] = {"dropout_p": self.attn_dropout.p, "weights": output_attentions}
        out, weights = attend(self, q, k, v, carrier, layer_past, scale=scale, **options)
        out = self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))
        present = (k, v) if use_cache else None
        return (out, present, weights) if output_attentions else (out, present)
