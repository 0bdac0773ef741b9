"""A language model whose loss is known exactly and which uses exactly its last k tokens."""

import itertools

import numpy as np
import torch

VOCAB = 13
"""Ids of a text are 1 to VOCAB - 1; the model bets on 0, which never comes."""

DULL = 64.0
"""Loss of a token of which nothing helped to predict it."""


class NgramOracle:
    """nll(target; c) = DULL - sum over d < min(k, c) of help[d, token d before the last, target] + harm(c).

    With a logit of 0 for the token 0, and logits of at most -40 for all others, the log-sum-exp is 0 in any precision
    that has fewer than 50 bits, and a token's nll is its logit. All terms are multiples of 1/64, so that every sum of
    them is exact in float32.

    Args:
        k: how many tokens it uses.
        breaks_past: L; with c > L tokens of context it does worse by (c - L) / 64, up to 8. Never when None.
        seed: of help.
    """

    def __init__(self, k, breaks_past=None, seed=0):
        self.k = k
        self.breaks_past = breaks_past
        most = 64 * 24 // k  # so that at most 24 of DULL is ever helped away
        self.help = np.random.default_rng(seed).integers(0, most + 1, (k, VOCAB, VOCAB)) / 64  # [k, seen, target]

    def logits(self, tokens, chunk_size, *, last=None, positions=None, cache=None):
        assert positions is None
        assert cache is None
        length = tokens.shape[1]
        help_ = torch.from_numpy(self.help)
        nll = torch.full((*tokens.shape, VOCAB), DULL, dtype=torch.float64)  # [B, T, V]
        for distance in range(min(self.k, length)):
            nll[:, distance:] -= help_[distance, tokens[:, : length - distance]]
        context = torch.arange(1, length + 1)
        if self.breaks_past is not None:
            nll += ((context - self.breaks_past).clamp(0, 512) / 64)[:, None]
        logits = -nll
        logits[..., 0] = 0
        yield from logits[:, length - (last or length) :].float().split(chunk_size, dim=1)

    def loss(self, tokens, target, context):
        """nll of token target + 1 when exactly the `context` tokens before it are given, from the definition."""
        helped = [
            self.help[distance, tokens[target - distance], tokens[target + 1]]
            for distance in range(min(self.k, context))
        ]
        broken = 0 if self.breaks_past is None else min(512, max(0, context - self.breaks_past)) / 64
        return DULL - sum(helped) + broken

    def mean_loss(self, tokens, contexts):
        """Mean of `loss` over all targets, with a number of tokens of context for each."""
        return sum(itertools.starmap(lambda t, c: self.loss(tokens, t, c), enumerate(contexts))) / len(contexts)


def random_text(num_targets, seed=0):
    """(num_targets + 1,) ids."""
    return np.random.default_rng([seed, 1]).integers(1, VOCAB, num_targets + 1)
