import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.evaluate.sweep import EvaluateConfig, evaluate_length


class Uniform:
    """Knows nothing: every token costs ln V."""

    def logits(self, tokens, chunk_size):
        for part in tokens.split(chunk_size, dim=1):
            yield torch.zeros(*part.shape, 32)


def evaluate(valid_length, num_targets=100):
    return evaluate_length(
        Uniform(),
        np.zeros(num_targets + 1, dtype=np.int64),
        method="none",
        train_length=8,
        valid_length=valid_length,
        num_bytes=250,
        vocab_size=32,
        attention="sdpa",
        device=torch.device("cpu"),
        tokens_per_batch=64,
    )


@pytest.mark.parametrize("valid_length", [1, 8, 10, 100])
def test_record_of_a_model_that_knows_nothing(valid_length):
    record = evaluate(valid_length)
    assert record.perplexity == pytest.approx(32, rel=1e-6)
    assert record.bits_per_byte == pytest.approx(100 * 5 / 250, rel=1e-6)
    assert record.nll == pytest.approx(100 * math.log(32), rel=1e-6)
    assert (record.tokens, record.stride, record.protocol) == (100, valid_length, "nonoverlapping")
    contexts = [target % valid_length + 1 for target in range(100)]
    assert record.mean_context == sum(contexts) / 100
    assert record.tokens_per_second > 0


def test_a_window_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match=r"^valid_length=101 with 100 validation tokens"):
        evaluate(101)


@given(st.integers(1, 10**6))
def test_lengths_follow_from_the_training_length(train_length):
    assert EvaluateConfig().resolved(train_length).valid_lengths == tuple(train_length * 2**k for k in range(5))


def test_given_lengths_stay():
    assert EvaluateConfig(valid_lengths=(5, 7)).resolved(128).valid_lengths == (5, 7)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"valid_lengths": (0,)}, "valid_lengths"),
        ({"valid_lengths": (-4, 8)}, "valid_lengths"),
        ({"valid_lengths": (8, 8)}, "valid_lengths"),
        ({"valid_tokens": 0}, "valid_tokens"),
        ({"tokens_per_batch": -1}, "tokens_per_batch"),
    ],
)
def test_contradictions_are_named(values, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        EvaluateConfig(**values)
