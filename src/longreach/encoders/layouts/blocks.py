"""What layouts share. Modules have the published names, so that a state dict is one of theirs."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from longreach.encoders.config import EncoderConfig
from longreach.ops.linear import Linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values of all tokens, (..., C) each, to what each token attended to, (..., C)."""

ROWS = 1024
"""Tokens of which a layer holds what follows attention in memory at a time, in inference: it stays in the cache."""


def layer_norm(config: EncoderConfig) -> nn.LayerNorm:
    """A layer norm over the full width."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Added(nn.Module):
    """LayerNorm(dense(x) + residual)."""

    def __init__(self, config: EncoderConfig, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, config.hidden_size)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., width) and (..., C) to (..., C)."""
        normed: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return normed


class Projections(nn.Module):
    """Queries, keys and values, each by a matrix of its own."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.query, self.key, self.value = (Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) to three of (..., C)."""
        return self.query(x), self.key(x), self.value(x)


class Attention(nn.Module):
    """What stands before self-attention and after it."""

    def __init__(self, config: EncoderConfig, projections: nn.Module) -> None:
        super().__init__()
        self.self = projections
        self.output = Added(config, config.hidden_size)


class Layer(GradientCheckpointingLayer):
    """Self-attention, and what a layout does with it, which each token has for itself."""

    projections: ClassVar[type[nn.Module]] = Projections
    """What makes queries, keys and values."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config, self.projections(config))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(..., C) to (..., C)."""
        attended = attend(*self.attention.self(x))
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dim() > 2 or len(x) <= ROWS:
            return self.after(attended, x)
        return torch.cat([self.after(*rows) for rows in zip(attended.split(ROWS), x.split(ROWS), strict=True)])

    def after(self, attended: Tensor, x: Tensor) -> Tensor:
        """What tokens attended to and what they were, (..., C) each, to (..., C)."""
        raise NotImplementedError


def gate(config: EncoderConfig) -> Callable[[Tensor], Tensor]:
    """The activation of a gate: the exact GELU, by erf, or ReLU."""
    return F.relu if config.feed_forward_type == "reglu" else F.gelu


class GatedMLP(nn.Module):
    """LayerNorm(wo(act(first half) * second half) + h)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.gated_layers = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.act = gate(config)

    def forward(self, h: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        first, second = self.gated_layers(h).chunk(2, dim=-1)
        out: Tensor = self.layernorm(self.wo(self.dropout(self.act(first) * second)) + h)
        return out
