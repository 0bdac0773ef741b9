"""The nll of every token of a sequence, from any model that gives logits."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.measure.subject import LanguageModel, Nll
from longreach.measure.windows import Window, windows
from longreach.results import Exchanged

LOGITS_PER_CHUNK = 2**24
"""How many logits are held at a time, 64 MiB in float32."""

CACHED_CHUNK = 512
"""How many tokens of a stream go through a model with a cache at a time."""


@dataclass(frozen=True)
class Scores:
    """What each target of a sequence cost, and with how much context it was predicted."""

    nll: np.ndarray
    """(N,) float64, nats."""
    context: np.ndarray
    """(N,) int64: how many tokens the prediction could see."""
    exchanged: Exchanged | None = None
    """What processes that shared each window sent to each other."""


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
    offset: int | None = None,
    nll: Nll | None = None,
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
        offset: position of each window's first token; None leaves positions to the model, which counts from 0.
        nll: scores windows in the place of the model's logits.
        on_scored: called after each batch with how many targets have been scored.

    Returns:
        nll and context of the N targets, in the order of the sequence.

    Raises:
        Unsupported: an offset where the model takes no positions.
    """
    score_batch = partial(token_nll, model.logits) if nll is None else nll
    num_targets = len(tokens) - 1
    found = np.empty(num_targets)
    context = np.empty(num_targets, dtype=np.int64)
    done = 0
    for batch in _batches(windows(num_targets, valid_length, stride), max(1, tokens_per_batch // valid_length)):
        inputs = torch.from_numpy(np.stack([tokens[window.start : window.stop] for window in batch])).to(device)
        positions = None if offset is None else torch.arange(offset, offset + inputs.shape[1], device=device)[None]
        scored = batch[0].scored
        targets = np.stack([tokens[window.stop - scored + 1 : window.stop + 1] for window in batch])
        batch_nll = score_batch(inputs, targets, vocab_size, positions)  # [B, scored]
        for window, row in zip(batch, batch_nll, strict=True):
            new = slice(window.stop - scored, window.stop)
            found[new] = row
            context[new] = np.arange(new.start, new.stop) - window.start + 1
            done += scored
        on_scored(done)
    return Scores(found, context, None if nll is None else nll.exchanged())


@torch.inference_mode()
def score_stream(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    max_context: int | None,
    vocab_size: int,
    device: torch.device,
    shifted: bool = False,
    on_scored: Callable[[int], None] = lambda scored: None,
) -> Scores:
    """Score every token of a sequence but the first in one pass over it, with a KV cache.

    Each token sees exactly its last max_context tokens, itself included, at their true distances. What it reads of
    them was computed when they came, with their own context, so that through the layers more than max_context tokens
    have a part in it.

    Args:
        model: gives logits.
        tokens: (N + 1,) int64 ids.
        max_context: the most tokens that a token sees; None for all.
        vocab_size: V.
        device: where the model is.
        shifted: keep absolute positions within 0 to max_context - 1, which must be given, the naive way: each new token
            takes the last position of the window, while cached keys keep the positions that they came with.
        on_scored: called now and then with how many targets have been scored.

    Returns:
        nll and context of the N targets, in the order of the sequence.

    Raises:
        Unsupported: the model has no cache of that kind, or takes no positions.
    """
    num_targets = len(tokens) - 1
    cache = model.new_cache(num_targets, max_context)
    parts = []
    for start in range(0, num_targets, CACHED_CHUNK):
        stop = min(start + CACHED_CHUNK, num_targets)
        inputs = torch.from_numpy(tokens[start:stop])[None].to(device)
        positions = None
        if shifted:
            assert max_context is not None, "shifted goes with it"
            positions = torch.arange(start, stop, device=device).clamp(max=max_context - 1)[None]
        parts.append(
            token_nll(model.logits, inputs, tokens[None, start + 1 : stop + 1], vocab_size, positions, cache)[0]
        )
        on_scored(stop)
    context = np.arange(1, num_targets + 1)
    return Scores(np.concatenate(parts), context if max_context is None else np.minimum(context, max_context))


def _batches(all_windows: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows that are alike, at most batch_size at a time."""
    for _, alike in itertools.groupby(all_windows, key=lambda window: (window.stop - window.start, window.scored)):
        while batch := list(itertools.islice(alike, batch_size)):
            yield batch


def token_nll(
    logits_of: Callable[..., Iterator[Tensor]],
    inputs: Tensor,
    targets: np.ndarray,
    vocab_size: int,
    positions: Tensor | None = None,
    cache: Any = None,
) -> np.ndarray:
    """Nll of targets (B, n) after the last n of inputs (B, T), (B, n) float64, from logits as `LanguageModel` has them.

    Each comes from a float32 logsumexp over its own logits, so that batching changes nothing else.
    """
    wanted = torch.from_numpy(targets).to(inputs.device)
    chunk_size = max(1, LOGITS_PER_CHUNK // (inputs.shape[0] * vocab_size))
    parts = []
    start = 0
    for logits in logits_of(inputs, chunk_size, last=targets.shape[1], positions=positions, cache=cache):
        stop = start + logits.shape[1]
        parts.append(F.cross_entropy(logits.float().transpose(1, 2), wanted[:, start:stop], reduction="none").double())
        start = stop
    joined: np.ndarray = torch.cat(parts, dim=1).cpu().numpy()
    return joined
