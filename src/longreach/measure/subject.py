"""A model under test."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longreach.data.tokenizer import Tokenizer
from longreach.measure.score import LanguageModel
from longreach.results import Model


@dataclass(frozen=True)
class Subject:
    """A model with all that evaluation has to know of it, whether it was trained here or elsewhere."""

    identity: Model
    """Which one it is, in results."""
    model: LanguageModel
    """Gives logits."""
    tokenizer: Tokenizer
    """Its own."""
    vocab_size: int
    """V, the width of its logits."""
    device: torch.device
    """Where it is."""
    max_length: int | None
    """The longest length in tokens that it can take at all; None for any."""
    attention: Callable[[int, int, bool], str]
    """Names the attention implementation that runs for so many queries and keys, with a window or without."""

    @property
    def name(self) -> str:
        """What it is called: its position method, or its name where it was trained elsewhere."""
        return self.identity.method

    @property
    def train_length(self) -> int:
        """L, the length in tokens that it was trained at."""
        return self.identity.train_length
