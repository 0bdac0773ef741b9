"""Text from a decoder: greedy or sampled, batched with left padding, token by token."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longreach.models.decoder import Decoder
from longreach.models.kv_cache import KVCache


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Continue each prompt, yielding one token per prompt at a time.

    Prompts of different lengths are padded on the left and hidden by a mask, and each row has a generator of its own,
    so that each is continued as it would be alone: row i as with seed + i. Methods that depend on the length of the
    whole sequence are given one constant length for the call, the longest prompt + max_new_tokens: then decoding with
    the cache equals the full forward pass.

    Args:
        model: the decoder; there is no limit on length but that of its position method.
        prompts: token ids, at least one per prompt.
        max_new_tokens: how many tokens to add at most, at least 1.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw only among the k likeliest tokens.
        top_p: draw only among the likeliest tokens that together hold probability p.
        eos_id: the token that ends a prompt's continuation; it is not given out.
        seed: of the draws of the first row; those that follow have the next ones.

    Returns:
        An iterator that gives, at each step, the next token id of each prompt, or None once it has ended. It stops
        when all have.

    Raises:
        ValueError: no prompt, an empty prompt, or a value out of range; at the call, before the first token.
    """
    _check(model, prompts, max_new_tokens)
    device = next(model.parameters()).device
    choose = sampler(device, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return _steps(model, prompts, max_new_tokens, eos_id, choose)


def sampler(
    device: torch.device, *, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> Callable[[Tensor], Tensor]:
    """What chooses one token id for each row of logits (B, V), as (B,); arguments as `stream` has them.

    Raises:
        ValueError: a value out of range.
    """
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: give 0 for the likeliest token, or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: give at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}: give more than 0 and at most 1")
    generators: list[torch.Generator] = []  # one for each row

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0.0:
            return logits.argmax(dim=-1)
        for row in range(len(generators), len(logits)):
            generators.append(torch.Generator(device).manual_seed((seed + row) % 2**63))
        probabilities, ids = _likeliest_first(logits, temperature, top_k, top_p)
        drawn = [
            torch.multinomial(of_row, 1, generator=generator)
            for of_row, generator in zip(probabilities, generators, strict=True)
        ]
        return ids.gather(-1, torch.stack(drawn))[:, 0]

    return choose


@torch.inference_mode()
def _steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int | None,
    choose: Callable[[Tensor], Tensor],
) -> Iterator[list[int | None]]:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)  # [B]
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = KVCache(length=longest + max_new_tokens)
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        start, stop = cache.length, cache.length + tokens.shape[1]
        hidden = model.hidden(
            tokens,
            positions=(torch.arange(start, stop, device=device) - padding[:, None]).clamp(min=0),
            key_padding_mask=torch.arange(stop, device=device) < padding[:, None] if padding.any() else None,
            cache=cache,
        )
        logits = model.vocabulary.logits(hidden[:, -1]).float()  # [B, V]
        if not logits.isfinite().all():
            raise FloatingPointError(f"the logits after {stop} tokens are not finite: give a model whose weights are")
        tokens = choose(logits)[:, None]
        chosen = tokens[:, 0].tolist()
        ended = [was or token == eos_id for was, token in zip(ended, chosen, strict=True)]
        if all(ended):
            return
        yield [None if end else token for end, token in zip(ended, chosen, strict=True)]


def _likeliest_first(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """Weights and ids to draw from, (B, V) both, of logits (B, V): each row from its likeliest token on."""
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
    return probabilities, ids


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    if not prompts or not all(prompts):
        raise ValueError(f"prompts of lengths {[len(prompt) for prompt in prompts]}: give at least one token in each")
    for prompt in prompts:
        for token in prompt:
            if not 0 <= token < model.config.vocab_size:
                raise ValueError(f"token id {token}: the model's vocabulary has {model.config.vocab_size} tokens")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give at least 1")
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens - 1  # the last token is not read
    if model.positions.max_length is not None and longest > model.positions.max_length:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after the prompt needs {longest} positions: position method "
            f"{model.config.method!r} holds {model.positions.max_length}; ask for fewer tokens"
        )
