import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.measure import score as scoring
from longreach.measure.score import score, score_stream
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder

VOCAB = 11
CPU = torch.device("cpu")


class ContextOracle:
    """Gives the next token probability 1 - 1 / (2 c), c the number of tokens it sees in its window; the rest evenly."""

    def __init__(self):
        self.chunks = []

    def logits(self, tokens, chunk_size, *, last=None, positions=None, cache=None):
        length = tokens.shape[1]
        for start in range(length - (last or length), length, chunk_size):
            stop = min(start + chunk_size, length)
            context = torch.arange(start + 1, stop + 1, dtype=torch.float64)
            right = 1 - 1 / (2 * context)  # [c]
            wrong = (1 - right) / (VOCAB - 1)
            following = (tokens[:, start:stop] + 1) % VOCAB
            probabilities = wrong[None, :, None].expand(len(tokens), -1, VOCAB).clone()
            probabilities.scatter_(2, following[..., None], right[None, :, None].expand(len(tokens), -1, 1))
            self.chunks.append(probabilities.shape)
            yield probabilities.log().float()


def small_model(method):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, train_length=16, method=method, num_layers=2, num_heads=4, d_model=32)
    return Decoder(config).eval()


def counting_text(length):
    return np.arange(length, dtype=np.int64) % VOCAB


def run(model, tokens, valid_length, stride=None, tokens_per_batch=64, vocab_size=VOCAB, **options):
    return score(
        model,
        tokens,
        valid_length=valid_length,
        stride=stride or valid_length,
        vocab_size=vocab_size,
        device=CPU,
        tokens_per_batch=tokens_per_batch,
        **options,
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
    model = small_model(method)
    tokens = np.random.default_rng(0).integers(0, 64, 200)
    single = run(model, tokens, 24, tokens_per_batch=1, vocab_size=64).nll.sum()
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 64 * 7)
    batched = run(model, tokens, 24, tokens_per_batch=1000, vocab_size=64).nll.sum()
    assert batched == pytest.approx(single, rel=1e-6)


def test_only_the_logits_that_are_scored_are_made():
    oracle = ContextOracle()
    run(oracle, counting_text(42), 16, stride=2, tokens_per_batch=64)
    first, *rest = oracle.chunks
    assert first == (1, 16, VOCAB)
    assert {chunk[1] for chunk in rest} == {2, 1}  # the last window has one target left
    assert max(chunk[0] for chunk in rest) == 4


@pytest.mark.parametrize("method", ["alibi", "rotary", "none"])
@pytest.mark.parametrize("stride", [1, 5])
def test_any_stride_in_any_batch_gives_the_windows_one_by_one(method, stride):
    model = small_model(method)
    tokens = np.random.default_rng(1).integers(0, 64, 90)
    one_by_one = run(model, tokens, 24, stride, tokens_per_batch=1, vocab_size=64)
    together = run(model, tokens, 24, stride, tokens_per_batch=1000, vocab_size=64)
    assert together.nll.sum() == pytest.approx(one_by_one.nll.sum(), rel=1e-6)
    np.testing.assert_array_equal(together.context, one_by_one.context)


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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory can be measured on Linux only")
def test_long_windows_with_a_large_vocabulary_take_bounded_memory():
    # All logits at once would be 4096 * 50257 * 4 bytes, 785 MiB.
    script = """
import numpy as np, torch
from longreach.cost import Cost
from longreach.measure.score import score, score_stream
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
torch.set_num_threads(1)
config = ModelConfig(vocab_size=50257, train_length=128, num_layers=1, num_heads=2, d_model=8)
tokens = np.random.default_rng(0).integers(0, 50257, 4097)
arguments = dict(stride=4096, vocab_size=50257, device=torch.device("cpu"), tokens_per_batch=4096)
model = Decoder(config).eval()
with Cost(torch.device("cpu")) as idle:
    pass
with Cost(torch.device("cpu")) as cost:
    score(model, tokens, valid_length=4096, **arguments)
print((cost.peak_memory - idle.peak_memory) / 2**20)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(output) < 500


def stream(model, tokens, max_context, **options):
    return score_stream(model, tokens, max_context=max_context, vocab_size=64, device=CPU, **options)


@pytest.mark.parametrize("method", ["alibi", "rotary", "sinusoidal", "t5"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_an_unbounded_stream_is_one_long_window(method, chunk, monkeypatch):
    monkeypatch.setattr(scoring, "CACHED_CHUNK", chunk)
    model = small_model(method)
    tokens = np.random.default_rng(2).integers(0, 64, 60)
    whole = run(model, tokens, 59, vocab_size=64)
    streamed = stream(model, tokens, None)
    np.testing.assert_allclose(streamed.nll, whole.nll, rtol=1e-5)
    np.testing.assert_array_equal(streamed.context, whole.context)


@pytest.mark.parametrize("method", ["alibi", "rotary", "sinusoidal"])
def test_a_bounded_stream_does_not_depend_on_its_chunks(method, monkeypatch):
    model = small_model(method)
    tokens = np.random.default_rng(3).integers(0, 64, 60)
    scores = stream(model, tokens, 9)
    monkeypatch.setattr(scoring, "CACHED_CHUNK", 4)
    np.testing.assert_allclose(stream(model, tokens, 9).nll, scores.nll, rtol=1e-5)
    assert scores.context.tolist() == [*range(1, 9), *[9] * 51]


def test_shifted_positions_hurt_absolute_methods_alone():
    tokens = np.random.default_rng(4).integers(0, 64, 60)
    for method, hurt in (("alibi", False), ("none", False), ("sinusoidal", True), ("rotary", True)):
        model = small_model(method)
        shifted, plain = stream(model, tokens, 9, shifted=True), stream(model, tokens, 9)
        np.testing.assert_array_equal(shifted.nll[:9], plain.nll[:9])
        assert np.array_equal(shifted.nll, plain.nll) != hurt


def test_a_stream_reports_its_progress(monkeypatch):
    monkeypatch.setattr(scoring, "CACHED_CHUNK", 4)
    done = []
    stream(small_model("alibi"), np.arange(11), 3, on_scored=done.append)
    assert done == [4, 8, 10]


def test_offsets_move_absolute_positions_alone():
    tokens = np.random.default_rng(5).integers(0, 64, 40)
    for method, moved in (("alibi", False), ("t5", False), ("sinusoidal", True)):
        model = small_model(method)
        nll = [run(model, tokens, 8, vocab_size=64, offset=offset).nll for offset in (None, 0, 32)]
        np.testing.assert_array_equal(nll[0], nll[1])
        assert np.array_equal(nll[0], nll[2]) != moved
    # Rotations are relative: only rounding of larger angles is left.
    model = small_model("rotary")
    np.testing.assert_allclose(
        run(model, tokens, 8, vocab_size=64, offset=32).nll, run(model, tokens, 8, vocab_size=64).nll, rtol=1e-4
    )
