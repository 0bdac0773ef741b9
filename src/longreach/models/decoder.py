"""A pre-LN decoder that leaves positions to a position method."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach.models.config import ModelConfig
from longreach.models.kv_cache import KVCache
from longreach.models.vocabulary import Vocabulary
from longreach.ops.arguments import (
    can_be_read,
    validate_documents,
    validate_integer,
    validate_kind,
    validate_types,
)
from longreach.ops.attention import attention, choose_impl, uses_key_norms
from longreach.ops.crossovers import processor_of
from longreach.ops.linear import Linear
from longreach.positions import AttentionPositions, build_method, rotate
from longreach.positions.method import require_borders

# Axes: B batch, T tokens (Tq queries, Tk keys), H query heads, Hkv key/value heads, D head_dim, C d_model,
# V vocabulary.


Attend = Callable[..., Tensor]
"""`longreach.attention`, or a function of the same arguments."""


class Decoder(nn.Module):
    """Token ids to logits. With LayerNorm, GELU and no biases its weights fit `transformers`' MPT exactly."""

    def __init__(self, config: ModelConfig):
        validate_kind("config", config, ModelConfig, "a longreach.models.config.ModelConfig")
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = _norm(config)
        # Built last, so that with one seed all other weights are the same under every method.
        self.positions = build_method(config.method, config.size)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        length: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token after each token.

        Args:
            tokens: (B, T) int64 ids; with a cache, those that follow what it holds.
            positions: (B, T) or (1, T) int64 absolute positions; counted on from the cache, or from 0 in each document,
                when None.
            cache: keys and values of the tokens before, appended to in place. For inference only.
            length: L', the length that the whole sequence will have, for methods that depend on it; the cache's, or
                Tk without a cache, when None; with cu_seqlens that of the longest document.
            cu_seqlens: (N + 1,) int32 or int64, [0, ..., T]: borders of N documents that are packed along T, each
                computed as if it stood alone. For B = 1, without a cache; positions are consecutive in each, but for
                methods that draw them in training.

        Returns:
            (B, T, V).

        Raises:
            ValueError: more positions than the method holds; a cache of unknown length for a method that needs it;
                cu_seqlens for what they are not for; an argument of another shape or kind.
        """
        hidden = self.hidden(tokens, positions=positions, cache=cache, length=length, cu_seqlens=cu_seqlens)
        logits: Tensor = self.vocabulary.logits(hidden)
        return logits

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        length: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What the logits are made of, (B, T, C). Arguments as in `forward`."""
        validate_types(tokens=tokens)
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype}: give (B, T) int64")
        if positions is not None:
            _check_positions(positions, tokens)
        if cache is not None:
            validate_kind("cache", cache, KVCache, "what new_cache makes")
        if cu_seqlens is None:
            placed = self._place(tokens, positions, cache, length)
        elif len(tokens) != 1 or cache is not None:
            raise ValueError(
                f"cu_seqlens with B={len(tokens)} or a cache: give documents packed along T of one sequence"
            )
        else:
            placed = self._place_packed(tokens, positions, cu_seqlens, length)
        x = self.dropout(self.positions.embed(self.vocabulary.embed(tokens), placed.positions))  # [B, T, C]
        attend = self.positions.attend(placed.queries, placed.key_length, placed.length)
        if cu_seqlens is not None:
            attend = attend.packed(placed.positions, cu_seqlens)
        for block in self.blocks:
            x = block(x, attend, cache)
        normed: Tensor = self.norm(x)
        return normed

    def attend_by(self, attends: Callable[[int], Attend] | None) -> None:
        """Let other functions compute the attention of all blocks, given the number of each; None ends that."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.attend = attention if attends is None else attends(module.layer)

    def logits(
        self,
        tokens: Tensor,
        chunk_size: int = 1024,
        *,
        last: int | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        length: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield the logits of consecutive stretches of at most chunk_size positions, each (B, chunk, V).

        All V logits of a long sequence need more memory than the rest of the model; a stretch at a time does not.
        With `last`, only the logits of that many last positions are made. The rest as in `forward`.
        """
        validate_integer("chunk_size", chunk_size, 1)
        if last is not None:
            validate_integer("last", last, 1, "a positive integer, or None for all")
        hidden = self.hidden(tokens, positions=positions, cache=cache, length=length)
        for chunk in hidden[:, -last if last else 0 :].split(chunk_size, dim=1):
            yield self.vocabulary.logits(chunk)

    def new_cache(self, length: int, max_context: int | None = None) -> KVCache:
        """An empty cache for a stream of `length` tokens, each seeing at most max_context, itself included.

        A method that depends on the length of its input is told the most that any token will see.
        """
        return KVCache(length=length if max_context is None else min(length, max_context), max_context=max_context)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Mean nll in nats per token of targets (B, T), each the token after tokens (B, T); -100 counts for nothing."""
        hidden = self.hidden(tokens, positions=positions, cu_seqlens=cu_seqlens, length=length)
        loss: Tensor = self.vocabulary.loss(hidden.flatten(0, 1), targets.flatten())
        return loss

    def attention_impl(self, query_length: int, key_length: int | None = None, windowed: bool = False) -> str:
        """Name of the attention implementation that runs for so many queries and keys, as many when None."""
        weight = next(self.parameters())
        device = weight.device
        attend = self.positions.attend(torch.zeros(1, 1, dtype=torch.int64, device=device), 1, query_length)
        dense = attend.bias is not None or (self.training and self.config.attention_dropout > 0)
        return choose_impl(
            device.type,
            query_length,
            key_length or query_length,
            dtype=weight.dtype,
            reaching=windowed or attend.slopes is not None,
            dense=dense,
            has_key_norms=attend.slopes is not None and not windowed,
            learns=self.training,
            processor=processor_of(device, weight.dtype, self.config.head_dim),
            cache_width=(self.config.num_kv_heads or self.config.num_heads) * self.config.head_dim,  # of one sequence
        ).impl

    def _place(self, tokens: Tensor, positions: Tensor | None, cache: KVCache | None, length: int | None) -> "_Placed":
        """Where tokens stand that follow what a cache holds."""
        total = tokens.shape[1]
        start, held = (0, 0) if cache is None else (cache.length, cache.held)
        if length is None and cache is not None:
            length = cache.final_length
        self._check_length(start + total, positions, cache, length)
        if positions is None:
            positions = torch.arange(start, start + total, device=tokens.device)[None]
        return _Placed(positions, positions, held + total, held + total if length is None else length)

    def _place_packed(
        self, tokens: Tensor, positions: Tensor | None, cu_seqlens: Tensor, length: int | None
    ) -> "_Placed":
        """Where the tokens of packed documents stand."""
        # With positions, tokens may be a piece of what the borders are of, which several ranks share.
        validate_documents(cu_seqlens, tokens, tokens.shape[1] if positions is None else None)
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        self._check_length(longest, positions, None, length)
        if positions is None:
            end = require_borders(cu_seqlens, tokens.shape[1])
            starts = cu_seqlens[:-1].repeat_interleave(lengths)  # [T]
            positions = (torch.arange(end, device=starts.device) - starts)[None]
        end = int(positions.max()) + 1
        queries = torch.arange(end, device=positions.device)[None]
        return _Placed(positions, queries, end, longest if length is None else length)

    def _check_length(self, total: int, positions: Tensor | None, cache: KVCache | None, length: int | None) -> None:
        longest = self.positions.max_length
        if longest is not None:
            reached = total
            if positions is not None and positions.numel() and not torch.compiler.is_compiling():
                reached = int(positions.max()) + 1  # a compiled graph cannot look at values
            if reached > longest:
                raise ValueError(
                    f"{reached} tokens: position method {self.config.method!r} holds {longest} positions; "
                    "give fewer tokens, or train one with a longer table"
                )
        seen = total if cache is None or cache.max_context is None else min(total, cache.max_context)
        if length is not None and validate_integer("length", length, 1) < seen:
            raise ValueError(f"length={length} is below the {seen} tokens of cache and input: give at least that")
        if cache is not None and length is None and self.positions.depends_on_length:
            raise ValueError(
                f"position method {self.config.method!r} depends on the length of the whole sequence: "
                "make the cache by KVCache(length=...)"
            )


def _check_positions(positions: Tensor, tokens: Tensor) -> None:
    validate_types(positions=positions)
    shapes = ((1, tokens.shape[1]), tuple(tokens.shape))
    if tuple(positions.shape) not in shapes or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"positions of shape {tuple(positions.shape)} and {positions.dtype}: give (B, T) or (1, T) = {shapes[0]} "
            "int64"
        )
    if can_be_read(positions) and positions.numel() and (least := int(positions.min())) < 0:
        raise ValueError(f"positions holds {least}: give positions from 0 on")


class _Placed(NamedTuple):
    """Where the tokens of one forward pass stand, and what their position method is asked about them."""

    positions: Tensor
    """(B or 1, T), of all tokens."""
    queries: Tensor
    """(B or 1, Tq) positions of one sequence: of packed documents, all that any has."""
    key_length: int
    """Tk of it."""
    length: int
    """L' of it."""


def count_weights(config: ModelConfig) -> int:
    """How many numbers the state dict of a decoder holds, found without making it, which may be too large for that."""
    with torch.device("meta"):
        one, two = (
            sum(weight.numel() for weight in Decoder(replace(config, num_layers=layers)).state_dict().values())
            for layers in (1, 2)
        )
    return one + (config.num_layers - 1) * (two - one)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = SelfAttention(config, layer)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, positions: AttentionPositions, cache: KVCache | None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class SelfAttention(nn.Module):
    """Causal self-attention, grouped-query where num_kv_heads is below num_heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        kv_heads = config.num_kv_heads or config.num_heads
        self.heads = (config.num_heads, kv_heads, kv_heads)
        self.qkv = _linear(config, config.d_model, sum(self.heads) * config.head_dim)  # rows are [q | k | v]
        self.out = _residual_linear(config, config.d_model)
        self.attend: Attend = attention

    def forward(self, x: Tensor, positions: AttentionPositions, cache: KVCache | None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # [B, H + 2 Hkv, T, D]
        q, k, v = heads.split(self.heads, dim=1)
        if positions.rotation is not None:
            q, k = rotate(q, positions.rotation), rotate(k, positions.key_rotation or positions.rotation)
        key_norms = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            if positions.slopes is not None and uses_key_norms("auto", q, k):
                key_norms = cache.key_norms(self.layer)
        scale = positions.logit_factor * self.config.head_dim**-0.5
        dropout = self.config.attention_dropout if self.training else 0.0
        if positions.document_biases is not None:
            mixed = _one_by_one(q, k, v, positions.document_biases, scale, dropout)
        else:
            mixed = self.attend(
                q,
                k,
                v,
                slopes=positions.slopes,
                bias=positions.bias,
                scale=scale,
                window_size=None if cache is None else cache.max_context,
                cu_seqlens=positions.cu_seqlens,
                key_norms=key_norms,
                dropout_p=dropout,
            )
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return projected


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, biases: tuple[Tensor, ...], scale: float, dropout: float) -> Tensor:
    """Attention of documents packed along T, each with a dense bias of its own, (1, H, T, D)."""
    lengths = [bias.shape[-1] for bias in biases]
    documents = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), biases, strict=True)
    parts = [attention(*qkv, bias=bias, scale=scale, dropout_p=dropout) for *qkv, bias in documents]
    return torch.cat(parts, dim=2)


class FeedForward(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)) with gate and up in one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.d_ff or 4 * config.d_model
        self.gated = config.activation == "swiglu"
        self.up = _linear(config, config.d_model, 2 * width if self.gated else width)
        self.down = _residual_linear(config, width)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x)
        down: Tensor = self.down(self.dropout(x))
        return down


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=1e-5)
    return nn.LayerNorm(config.d_model, eps=1e-5, bias=config.bias)


def _linear(config: ModelConfig, inputs: int, outputs: int, std: float = 0.02) -> Linear:
    linear = Linear(inputs, outputs, bias=config.bias)
    nn.init.normal_(linear.weight, std=std)
    if config.bias:
        nn.init.zeros_(linear.bias)
    return linear


def _residual_linear(config: ModelConfig, inputs: int) -> Linear:
    """A layer that adds to the residual stream, smaller at the start the more of them there are (as in GPT-2)."""
    return _linear(config, inputs, config.d_model, std=0.02 / (2 * config.num_layers) ** 0.5)
