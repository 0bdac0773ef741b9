"""Text from any model that evaluation knows, a token at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longreach.measure.subject import Subject, Unsupported


def likeliest(logits: Tensor) -> Tensor:
    """The token id of the highest of each row of logits (B, V), as (B,)."""
    return logits.max(dim=-1).indices


def generate_greedily(
    subject: Subject,
    prompt: Sequence[int],
    max_new_tokens: int,
) -> list[int]:
    """Continue a prompt; see `stream_tokens`, which this collects."""
    return list(stream_tokens(subject, prompt, max_new_tokens))


def stream_tokens(
    subject: Subject, prompt: Sequence[int], max_new_tokens: int, choose: Callable[[Tensor], Tensor] = likeliest
) -> Iterator[int]:
    """Continue a prompt, until eos, which is not given out.

    The prompt goes through the model at once and each new token alone, with a cache. A model that depends on the
    length of the whole sequence is given one constant length, len(prompt) + max_new_tokens.

    Args:
        subject: the model with its tokenizer, whose eos_id ends the text.
        prompt: token ids, at least one.
        max_new_tokens: how many tokens to add at most, at least 1.
        choose: gives the next token id, (1,), for logits (1, V) in float32.

    Returns:
        An iterator over the new token ids.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a value out of range, or a prompt that leaves no
            room for max_new_tokens in what the model can take; at the call, before the first token.
        Unsupported: logits that are no numbers, among which none can be chosen.
    """
    _check(subject, prompt, max_new_tokens)
    return _steps(subject, prompt, max_new_tokens, choose)


@torch.inference_mode()
def _steps(
    subject: Subject, prompt: Sequence[int], max_new_tokens: int, choose: Callable[[Tensor], Tensor]
) -> Iterator[int]:
    cache = subject.model.new_cache(len(prompt) + max_new_tokens)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        inputs = torch.tensor([tokens], device=subject.device)
        (logits,) = subject.model.logits(inputs, 1, last=1, cache=cache)  # [1, 1, V]
        if logits.isnan().any():
            raise Unsupported(f"logits after {len(prompt)} tokens of prompt are no numbers: load it in float32")
        token = int(choose(logits[:, 0].float()))
        if token == subject.tokenizer.eos_id:
            return
        yield token
        tokens = [token]


def _check(subject: Subject, prompt: Sequence[int], max_new_tokens: int) -> None:
    if not prompt:
        raise ValueError("prompt is empty: give at least one token")
    if not 0 <= min(prompt) <= max(prompt) < subject.vocab_size:
        raise ValueError(
            f"prompt holds token ids {min(prompt)} to {max(prompt)} with vocab_size={subject.vocab_size}: "
            "the tokenizer is not the model's"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1")
    needed = len(prompt) + max_new_tokens - 1  # the last token is not read
    if subject.max_length is not None and needed > subject.max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {len(prompt)} tokens needs {needed} positions: "
            f"{subject.name} takes {subject.max_length}; ask for fewer"
        )
