"""Text from any model that evaluation knows, a token at a time, the likeliest or drawn."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longreach.measure.subject import Subject, Unsupported


def likeliest(logits: Tensor) -> Tensor:
    """The token id of the highest of each row of logits (B, V), as (B,)."""
    return logits.max(dim=-1).indices


def sampler(
    device: torch.device, *, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> Callable[[Tensor], Tensor]:
    """What draws one token id for each row of logits (B, V), as (B,).

    Args:
        device: where the logits are.
        temperature: what they are divided by; 0 takes the likeliest token.
        top_k: draw only among the k likeliest tokens.
        top_p: draw only among the likeliest tokens that together hold probability p.
        seed: of the draws.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return lambda logits: _choose(logits, temperature, top_k, top_p, generator)


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One token id for each row of logits (B, V), as (B,)."""
    if temperature == 0.0:
        return likeliest(logits)
    ordered, ids = logits.sort(dim=-1, descending=True)
    # A small temperature cannot overflow, and one that float32 has not would be 0.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(dim=-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    if top_p is not None:
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        before = probabilities.cumsum(dim=-1) - probabilities  # what likelier tokens hold already
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


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
        ValueError: an empty prompt, or one that leaves no room for max_new_tokens in what the model can take; at the
            call, before the first token.
        Unsupported: logits that are no numbers or infinite, among which none can be chosen.
    """
    if not prompt:
        raise ValueError("prompt is empty: give at least one token")
    needed = len(prompt) + max_new_tokens - 1  # the last token is not read
    if subject.max_length is not None and needed > subject.max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {len(prompt)} tokens needs {needed} positions: "
            f"{subject.name} takes {subject.max_length}; ask for fewer"
        )
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
        if not (logits < torch.inf).all():
            raise Unsupported(f"logits after {len(prompt)} tokens of prompt are nan or infinite: load it in float32")
        token = int(choose(logits[:, 0].float()))
        if token == subject.tokenizer.eos_id:
            return
        yield token
        tokens = [token]
