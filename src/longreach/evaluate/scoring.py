"""The nll of every token of a sequence, from any model that gives logits."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import Window, windows

LOGITS_PER_CHUNK = 2**24
"""How many logits are held at a time, 64 MiB in float32."""


class LanguageModel(Protocol):
    """All that evaluation knows of a model."""

    def logits(self, tokens: Tensor, chunk_size: int) -> Iterator[Tensor]:
        """Logits after each of tokens (B, T), as consecutive stretches (B, at most chunk_size, V)."""
        ...


@dataclass(frozen=True)
class Scores:
    """What each target of a sequence cost, and with how much context it was predicted."""

    nll: np.ndarray
    """(N,) float64, nats."""
    context: np.ndarray
    """(N,) int64: how many tokens the prediction could see."""


@torch.inference_mode()
def score(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    valid_length: int,
    stride: int,
    vocab_size: int,
    device: torch.device,
    tokens_per_batch: int,
    on_scored: Callable[[int], None] = lambda scored: None,
) -> Scores:
    """Score every token of a sequence but the first, in windows of valid_length.

    Args:
        model: gives logits.
        tokens: (N + 1,) int64 ids.
        valid_length: L_valid.
        stride: S; see `windows`.
        vocab_size: V, which with LOGITS_PER_CHUNK bounds the memory that logits take.
        device: where the model is.
        tokens_per_batch: windows of one length are batched up to about this many tokens.
        on_scored: called after each batch with how many targets have been scored.

    Returns:
        nll and context of the N targets, in the order of the sequence.

    Raises:
        ValueError: a token outside the vocabulary, or a length or stride out of range.
    """
    if tokens.max() >= vocab_size:
        raise ValueError(f"token id {tokens.max()} with vocab_size={vocab_size}: the tokenizer is not the model's")
    num_targets = len(tokens) - 1
    nll = np.empty(num_targets)
    context = np.empty(num_targets, dtype=np.int64)
    done = 0
    for batch in _batches(windows(num_targets, valid_length, stride), max(1, tokens_per_batch // valid_length)):
        inputs = torch.from_numpy(np.stack([tokens[window.start : window.stop] for window in batch])).to(device)
        targets = torch.from_numpy(np.stack([tokens[window.start + 1 : window.stop + 1] for window in batch])).to(
            device
        )
        batch_nll = _nll(model, inputs, targets, vocab_size)  # [B, T]
        for window, row in zip(batch, batch_nll, strict=True):
            new = slice(window.stop - window.scored, window.stop)
            nll[new] = row[-window.scored :]
            context[new] = np.arange(window.stop - window.scored, window.stop) - window.start + 1
            done += window.scored
        on_scored(done)
    return Scores(nll, context)


def _batches(all_windows: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length, at most batch_size at a time."""
    for _, alike in itertools.groupby(all_windows, key=lambda window: window.stop - window.start):
        while batch := list(itertools.islice(alike, batch_size)):
            yield batch


def _nll(model: LanguageModel, inputs: Tensor, targets: Tensor, vocab_size: int) -> np.ndarray:
    """(B, T) float64: each from a float32 logsumexp over its own logits, so that batching changes nothing else."""
    chunk_size = max(1, LOGITS_PER_CHUNK // (inputs.shape[0] * vocab_size))
    parts = []
    start = 0
    for logits in model.logits(inputs, chunk_size):
        stop = start + logits.shape[1]
        parts.append(F.cross_entropy(logits.float().transpose(1, 2), targets[:, start:stop], reduction="none").double())
        start = stop
    joined: np.ndarray = torch.cat(parts, dim=1).cpu().numpy()
    return joined
