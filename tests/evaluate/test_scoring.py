import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.evaluate import scoring
from longreach.evaluate.scoring import score
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder

VOCAB = 11
CPU = torch.device("cpu")


class ContextOracle:
    """Gives the next token probability 1 - 1 / (2 c), c the number of tokens it sees in its window; the rest evenly."""

    def __init__(self):
        self.chunks = []

    def logits(self, tokens, chunk_size):
        length = tokens.shape[1]
        for start in range(0, length, chunk_size):
            stop = min(start + chunk_size, length)
            context = torch.arange(start + 1, stop + 1, dtype=torch.float64)
            right = 1 - 1 / (2 * context)  # [c]
            wrong = (1 - right) / (VOCAB - 1)
            following = (tokens[:, start:stop] + 1) % VOCAB
            probabilities = wrong[None, :, None].expand(len(tokens), -1, VOCAB).clone()
            probabilities.scatter_(2, following[..., None], right[None, :, None].expand(len(tokens), -1, 1))
            self.chunks.append(probabilities.shape)
            yield probabilities.log().float()


def counting_text(length):
    return np.arange(length, dtype=np.int64) % VOCAB


def run(model, tokens, valid_length, stride=None, tokens_per_batch=64, vocab_size=VOCAB):
    return score(
        model,
        tokens,
        valid_length=valid_length,
        stride=stride or valid_length,
        vocab_size=vocab_size,
        device=CPU,
        tokens_per_batch=tokens_per_batch,
    )


@pytest.mark.parametrize(("valid_length", "stride"), [(8, 8), (8, 3), (8, 1), (100, 100), (33, 33)])
def test_nll_and_context_of_a_model_whose_answer_is_known(valid_length, stride):
    tokens = counting_text(42)
    scores = run(ContextOracle(), tokens, valid_length, stride)
    for target in range(41):
        # By hand: the window that scores a target is the first one that reaches it.
        if target < valid_length:
            start = 0
        else:
            start = (1 + (target - valid_length) // stride) * stride
        context = target - start + 1
        assert scores.context[target] == context
        # Logits are rounded to float32, the largest is ln of the wrong tokens' share, and so are the V terms of the
        # logsumexp: each moves the result by half an ulp of its size.
        rounding = (math.log(2 * context * (VOCAB - 1)) + VOCAB) * 2**-24
        assert scores.nll[target] == pytest.approx(-math.log(1 - 1 / (2 * context)), abs=rounding)


def test_logits_are_made_in_bounded_chunks(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 5 * VOCAB)
    whole = ContextOracle()
    scores = run(whole, counting_text(42), 16, tokens_per_batch=32)
    assert all(batch * chunk <= 5 for batch, chunk, _ in whole.chunks)
    monkeypatch.undo()
    np.testing.assert_array_equal(scores.nll, run(ContextOracle(), counting_text(42), 16).nll)


@pytest.mark.parametrize("method", ["alibi", "rotary", "t5", "sinusoidal"])
def test_batch_and_chunk_size_change_nothing_but_rounding(method, monkeypatch):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, train_length=16, method=method, num_layers=2, num_heads=4, d_model=32)
    model = Decoder(config).eval()
    tokens = np.random.default_rng(0).integers(0, 64, 200)
    single = run(model, tokens, 24, tokens_per_batch=1, vocab_size=64).nll.sum()
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 64 * 7)
    batched = run(model, tokens, 24, tokens_per_batch=1000, vocab_size=64).nll.sum()
    assert batched == pytest.approx(single, rel=1e-6)


def test_the_same_targets_are_scored_at_every_length():
    tokens = counting_text(100)
    for valid_length in (1, 7, 50, 99):
        scores = run(ContextOracle(), tokens, valid_length)
        assert len(scores.nll) == len(scores.context) == 99
        assert np.isfinite(scores.nll).all()


def test_progress_counts_up_to_all_targets():
    done = []
    score(
        ContextOracle(),
        counting_text(50),
        valid_length=8,
        stride=8,
        vocab_size=VOCAB,
        device=CPU,
        tokens_per_batch=16,
        on_scored=done.append,
    )
    assert done == sorted(done)
    assert done[-1] == 49


def test_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"token id 99 with vocab_size=11"):
        run(ContextOracle(), np.array([1, 99, 2]), 2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory can be measured on Linux only")
def test_long_windows_with_a_large_vocabulary_take_bounded_memory():
    # All logits at once would be 8192 * 50257 * 4 bytes, 1.6 GB.
    script = """
import numpy as np, torch
from longreach.evaluate.cost import Cost
from longreach.evaluate.scoring import score
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
torch.set_num_threads(1)
config = ModelConfig(vocab_size=50257, train_length=128, num_layers=1, num_heads=2, d_model=8)
tokens = np.random.default_rng(0).integers(0, 50257, 8193)
arguments = dict(stride=8192, vocab_size=50257, device=torch.device("cpu"), tokens_per_batch=8192)
model = Decoder(config).eval()
with Cost(torch.device("cpu")) as idle:
    pass
with Cost(torch.device("cpu")) as cost:
    score(model, tokens, valid_length=8192, **arguments)
print((cost.peak_memory - idle.peak_memory) / 2**20)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(output) < 500
