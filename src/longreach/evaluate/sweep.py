"""Perplexity of one model at many lengths, on the same tokens at each."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from longreach.results import Record

from .cost import Cost
from .scoring import LanguageModel, score


@dataclass(frozen=True)
class EvaluateConfig:
    """How models are tested."""

    valid_lengths: tuple[int, ...] = ()
    """L_valid, the lengths in tokens to test at; 1, 2, 4, 8 and 16 times the training length when none are given."""
    valid_tokens: int = 32768
    """How many tokens are scored, the same at every length: at least the longest length, at most what there is."""
    tokens_per_batch: int = 8192
    """About how many tokens one forward pass of the evaluation holds."""

    def __post_init__(self) -> None:
        for length in self.valid_lengths:
            if length < 1:
                raise ValueError(f"valid_lengths={self.valid_lengths}: give positive integers")
        if len(set(self.valid_lengths)) < len(self.valid_lengths):
            raise ValueError(f"valid_lengths={self.valid_lengths}: give each length once")
        for name in ("valid_tokens", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive integer")

    def resolved(self, train_length: int) -> "EvaluateConfig":
        """With the lengths that follow from the training length, where none are given."""
        if self.valid_lengths:
            return self
        return replace(self, valid_lengths=tuple(multiple * train_length for multiple in (1, 2, 4, 8, 16)))


def evaluate_length(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    method: str,
    train_length: int,
    valid_length: int,
    num_bytes: int,
    vocab_size: int,
    attention: str,
    device: torch.device,
    tokens_per_batch: int,
    on_scored: Callable[[int], None] = lambda scored: None,
) -> Record:
    """Score tokens (N + 1,) in nonoverlapping windows of valid_length, and return the record.

    num_bytes is the number of UTF-8 bytes that the N scored tokens stand for.

    Raises:
        ValueError: fewer than valid_length tokens to score.
    """
    num_targets = len(tokens) - 1
    if num_targets < valid_length:
        raise ValueError(
            f"valid_length={valid_length} with {num_targets} validation tokens: give more text or shorter lengths"
        )
    with Cost(device) as cost:
        scores = score(
            model,
            tokens,
            valid_length=valid_length,
            stride=valid_length,
            vocab_size=vocab_size,
            device=device,
            tokens_per_batch=tokens_per_batch,
            on_scored=on_scored,
        )
    return Record.from_sums(
        method=method,
        train_length=train_length,
        valid_length=valid_length,
        stride=valid_length,
        protocol="nonoverlapping",
        nll=float(scores.nll.sum()),
        tokens=num_targets,
        bytes=num_bytes,
        mean_context=float(scores.context.mean()),
        tokens_per_second=num_targets / cost.seconds,
        seconds=cost.seconds,
        peak_memory=cost.peak_memory,
        attention=attention,
    )
