"""Causal language models of Hugging Face transformers behind the protocol that measurement knows."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from longreach.measure.subject import Unsupported

StateLength = Callable[[int], AbstractContextManager[None]]
"""Says how long the sequence will become of which all forward passes within are a part."""

CACHE_LENGTH = "longreach_length"
"""Name under which a cache holds the length of its stream."""

RELATIVE = frozenset({"bloom", "falcon", "mpt"})
"""Types of models that take no positions because they have ALiBi, for which the order of the keys is enough."""


@dataclass
class BoundedCache:
    """A cache of transformers in which each token sees at most max_context tokens, itself included."""

    cache: Any
    """Holds the keys that the next token sees, each with the position that it came with."""
    max_context: int
    seen: int = 0
    """How many tokens were put in."""

    def forget(self) -> None:
        """Drop what the next token does not see."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                start = max(0, layer.keys.shape[-2] - (self.max_context - 1))
                layer.keys, layer.values = layer.keys[..., start:, :], layer.values[..., start:, :]


class HuggingFaceModel:
    """Any causal language model of transformers behind the protocol `LanguageModel`.

    Where logits are nothing but output embeddings of the last hidden states, the embeddings are applied to one
    stretch at a time, and the logits of a long sequence never lie in memory together. That is tried out on two
    tokens when the object is made. A model that does more, such as scaling or capping logits, gives them all at once.

    Args:
        model: a loaded model, as `AutoModelForCausalLM.from_pretrained` gives it. It is put into evaluation mode.
        max_length: the most tokens that it can take; None for any number.
        state_length: of a model whose positions longreach changed: it is told the length of a stream. None for a model
            as transformers has it.
        heeds_positions: whether it may have a use for positions, which is tried out: an extended one has none.
    """

    def __init__(
        self,
        model: Any,
        max_length: int | None = None,
        state_length: StateLength | None = None,
        *,
        heeds_positions: bool = True,
    ) -> None:
        self.model = model.eval()
        self.max_length = max_length
        self._state_length = state_length
        self._body, self._head = model, None
        tokens = torch.tensor([[0, 1]], device=next(model.parameters()).device)
        with torch.inference_mode():
            logits = model(input_ids=tokens, use_cache=False).logits  # [1, 2, V]
            if logits.isnan().any():
                raise ValueError("its logits are no numbers: its weights or its configuration are damaged")
            if (parts := _body_and_head(model)) is not None:
                body, head = parts
                hidden = body(input_ids=tokens, use_cache=False)[0]
                if hidden.shape[-1] == head.in_features and torch.equal(head(hidden).float(), logits.float()):
                    self._body, self._head = parts
            self._takes_positions = heeds_positions and self._heeds_positions(tokens)
        self.vocab_size: int = logits.shape[-1]

    def logits(
        self,
        tokens: Tensor,
        chunk_size: int,
        *,
        last: int | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Iterator[Tensor]:
        """Logits as `LanguageModel` has them.

        Raises:
            Unsupported: positions for a model that has no use for them.
            ValueError: more positions than it holds.
        """
        if isinstance(cache, BoundedCache):
            yield from self._bounded_logits(tokens, chunk_size, last or tokens.shape[1], positions, cache)
            return
        held = 0 if cache is None else cache.get_seq_length()
        self._check(held + tokens.shape[1], positions)
        inputs = _inputs(tokens, held, positions, cache)
        last = last or tokens.shape[1]
        if self._head is None and "logits_to_keep" in _parameters(self.model):
            inputs["logits_to_keep"] = last
        with self._during(cache):
            output = self._body(**inputs)[0]  # [B, T, C], or the last logits where there is no head
        for stretch in output[:, -last:].split(chunk_size, dim=1):
            yield stretch if self._head is None else self._head(stretch)

    def new_cache(self, length: int, max_context: int | None = None) -> Any:
        """An empty DynamicCache, which grows with what is put into it; a BoundedCache if max_context is below length.

        Raises:
            Unsupported: a model that has no keys and values to cache, or, with a max_context, one whose cache cannot
                drop any or that cannot be told where in the stream a token stands.
        """
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        if "past_key_values" not in _parameters(self.model):
            raise Unsupported(
                f"{type(self.model).__name__} takes no past_key_values: it cannot be used with a cache; score windows"
            )
        if not self._fills_caches:
            raise Unsupported(f"{type(self.model).__name__} puts nothing into a cache of transformers: score windows")
        cache = DynamicCache(config=self.model.config)
        if max_context is None or max_context >= length:
            setattr(cache, CACHE_LENGTH, length)
            return cache
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        placed = self._takes_positions or self._state_length is not None or self.model.config.model_type in RELATIVE
        if not (plain and placed):
            raise Unsupported(
                f"max_context={max_context} with {length} tokens: the cache of {type(self.model).__name__} cannot drop "
                "keys; score a sliding window instead, or with a cache that is unbounded"
            )
        setattr(cache, CACHE_LENGTH, max_context)
        return BoundedCache(cache, max_context)

    def _bounded_logits(
        self, tokens: Tensor, chunk_size: int, last: int, positions: Tensor | None, cache: BoundedCache
    ) -> Iterator[Tensor]:
        """Logits as `logits` has them: all at once while nothing has to be dropped, then a token at a time."""
        length = tokens.shape[1]
        if positions is None and self._takes_positions:
            positions = torch.arange(cache.seen, cache.seen + length, device=tokens.device)[None]
        unwanted = length - last
        start = 0
        while start < length:
            stop = min(length, start + max(1, cache.max_context - cache.seen))
            cache.forget()
            here = None if positions is None else positions[:, start:stop]
            for stretch in self.logits(tokens[:, start:stop], chunk_size, positions=here, cache=cache.cache):
                if unwanted < stretch.shape[1]:
                    yield stretch[:, unwanted:]
                unwanted = max(0, unwanted - stretch.shape[1])
            cache.seen += stop - start
            start = stop

    @cached_property
    def _fills_caches(self) -> bool:
        """Whether a token's keys and values come to lie in a cache that is handed in: old remote code reads tuples."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        token = torch.zeros((1, 1), dtype=torch.long, device=next(self.model.parameters()).device)
        try:
            with torch.inference_mode():
                self._body(**_inputs(token, 0, None, cache))
        except TypeError:  # no Cache has items
            return False
        return bool(cache.get_seq_length())

    def _during(self, cache: Any) -> AbstractContextManager[None]:
        """In force while a forward pass runs."""
        if cache is None or self._state_length is None:
            return nullcontext()
        return self._state_length(getattr(cache, CACHE_LENGTH))

    def _heeds_positions(self, tokens: Tensor) -> bool:
        """Whether positions change anything: some models accept position_ids and never look at them."""
        if "position_ids" not in _parameters(self._body):
            return False
        forwards, backwards = (
            self._body(**_inputs(tokens, 0, torch.tensor([order], device=tokens.device), None))[0]
            for order in ((0, 1), (1, 0))
        )
        return not torch.equal(forwards, backwards)

    def _check(self, total: int, positions: Tensor | None) -> None:
        if positions is not None:
            if not self._takes_positions:
                raise Unsupported(
                    f"{type(self.model).__name__} takes no positions: measure it without offsets or shifted positions"
                )
            total = int(positions.max()) + 1
        if self.max_length is not None and total > self.max_length:
            raise ValueError(
                f"{total} tokens: {type(self.model).__name__} holds {self.max_length} positions; give fewer tokens"
            )


def _inputs(tokens: Tensor, held: int, positions: Tensor | None, cache: Any) -> dict[str, Any]:
    """Arguments of a model's forward for tokens (B, T) that follow `held` tokens in a cache."""
    inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": cache is not None}
    if cache is not None:
        inputs["past_key_values"] = cache
    if positions is not None:
        inputs["position_ids"] = positions.expand_as(tokens)
        # Without a mask, transformers takes positions that do not count up for several sequences in a row.
        inputs["attention_mask"] = tokens.new_ones(tokens.shape[0], held + tokens.shape[1])
    return inputs


def _body_and_head(model: Any) -> tuple[Any, nn.Linear] | None:
    """The part of a model that gives last hidden states and the output embeddings, where it is made of these."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return None  # a wrapper, such as PEFT's, of which only the whole is known
    head = model.get_output_embeddings()
    return (model.base_model, head) if isinstance(head, nn.Linear) else None


def _parameters(module: Any) -> frozenset[str]:
    """Names of the arguments that a model's forward takes."""
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()  # PEFT's wrapper hands on what it does not know
    return frozenset(inspect.signature(module.forward).parameters)
