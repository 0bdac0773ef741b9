from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from variants import ARCHITECTURES, DYNAMIC, METHODS

LENGTHS = (3, 1, 8, 5)
BORDERS = torch.tensor([0, *accumulate(LENGTHS)])
LONGEST = max(LENGTHS)


def documents(packed):
    """(1, T, ...) as one (1, n, ...) for each document."""
    return packed.split(LENGTHS, dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [*METHODS, *DYNAMIC])
def test_packed_documents_are_those_that_stand_alone(build, tokens_of, method, architecture):
    model, tokens = build(method, **ARCHITECTURES[architecture]), tokens_of(1, sum(LENGTHS) + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs, cu_seqlens=BORDERS)
    alone = torch.cat([model(document, length=LONGEST) for document in documents(inputs)], dim=1)
    # Equal but for the order of sums: each is one of 8 keys or 32 numbers at most, in float64.
    torch.testing.assert_close(logits, alone, rtol=1e-12, atol=1e-12)
    loss = model.loss(inputs, targets, cu_seqlens=BORDERS)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = F.cross_entropy(alone.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)  # losses are summed in float32
    # The cross-entropy of float32 logits rounds each of its gradients to 2^-24 of the largest.
    for one, other in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["alibi", "t5:num_buckets=6:max_distance=12", "sinusoidal-shifted", "fire:width=8"])
def test_documents_may_stand_at_other_positions(build, tokens_of, method):
    model, tokens = build(method), tokens_of(1, sum(LENGTHS))
    positions = torch.cat([start + torch.arange(n) for start, n in zip((7, 0, 3, 12), LENGTHS, strict=True)])[None]
    logits = model(tokens, positions=positions, cu_seqlens=BORDERS)
    alone = [model(tokens[:, a:b], positions=positions[:, a:b]) for a, b in pairwise(BORDERS.tolist())]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)


def test_targets_of_minus_100_count_for_nothing(build, tokens_of):
    model, tokens, targets = build(), tokens_of(1, 8), tokens_of(1, 8, seed=1)
    hidden = targets.clone()
    hidden[:, 5:] = -100
    torch.testing.assert_close(model.loss(tokens, hidden), model.loss(tokens[:, :5], targets[:, :5]))


def test_what_cannot_be_packed_is_refused(build, tokens_of):
    model = build("learned:table_length=8")
    with pytest.raises(ValueError, match=r"^cu_seqlens with B=2 or a cache: give documents packed along T"):
        model(tokens_of(2, 17), cu_seqlens=BORDERS)
    with pytest.raises(ValueError, match=r"^cu_seqlens with B=1 or a cache"):
        model(tokens_of(1, 17), cu_seqlens=BORDERS, cache=model.new_cache(17))
    model(tokens_of(1, 17), cu_seqlens=BORDERS)
    with pytest.raises(ValueError, match=r"^9 tokens: position method .* holds 8 positions"):
        model(tokens_of(1, 9), cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="cu_seqlens ends with 16"):
        build()(tokens_of(1, 17), positions=torch.arange(17)[None], cu_seqlens=torch.tensor([0, 9, 16]))
