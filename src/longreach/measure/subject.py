"""All that measurement knows of a model: that it gives logits, and what belongs to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longreach.data.tokenizer import Tokenizer
from longreach.results import Exchanged, Model


class Unsupported(ValueError):
    """What is asked cannot be done with this model or at this length; other things can."""


class LanguageModel(Protocol):
    """All that evaluation knows of a model."""

    def logits(
        self,
        tokens: Tensor,
        chunk_size: int,
        *,
        last: int | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Iterator[Tensor]:
        """Logits after each of tokens (B, T), as consecutive stretches (B, at most chunk_size, V).

        Args:
            tokens: (B, T) int64 ids; with a cache, those that follow what it holds.
            chunk_size: the most positions of a stretch.
            last: give the logits of that many last tokens alone.
            positions: (B, T) or (1, T) int64 absolute positions; `Unsupported` where a model takes none.
            cache: from `new_cache`, appended to in place.
        """
        ...

    def new_cache(self, length: int, max_context: int | None = None) -> Any:
        """An empty cache for a stream that will have `length` tokens.

        With max_context each token sees at most that many tokens, itself included; `Unsupported` where a model cannot.
        """
        ...


class Nll(Protocol):
    """How several processes have the nll of tokens from a model, where not by `longreach.measure.score` from logits."""

    def __call__(self, inputs: Tensor, targets: np.ndarray, vocab_size: int, positions: Tensor | None) -> np.ndarray:
        """Nll of targets (B, n) after the last n of inputs (B, T), (B, n) float64; positions as in `logits`."""
        ...

    def exchanged(self) -> Exchanged:
        """What they have sent to each other since it was last asked for."""
        ...


@dataclass(frozen=True)
class Subject:
    """A model with all that evaluation has to know of it, whether it was trained here or elsewhere."""

    identity: Model
    """Which one it is, in results."""
    model: LanguageModel
    tokenizer: Tokenizer
    vocab_size: int
    """V, the width of its logits."""
    device: torch.device
    max_length: int | None
    """The longest length in tokens that it can take at all; None for any."""
    attention: Callable[[int, int, bool], str]
    """Names the attention implementation that runs for so many queries and keys, with a window or without."""
    nll: Nll | None = None
    """How windows are scored where several processes share them; from the logits when None."""

    @property
    def name(self) -> str:
        """What it is called: its position method, or its name where it was trained elsewhere."""
        return self.identity.name

    @property
    def train_length(self) -> int:
        """L, the length in tokens that it was trained at."""
        return self.identity.train_length
