import math

import pytest

from longreach.results import Provenance, Record, Results, Skipped, TrainingRecord

LENGTHS = (128, 256, 512, 1024, 2048)
CURVES = {
    "sinusoidal": (80.6, 82.9, 93.1, 110.2, 130.5),
    "rotary": (77.2, 77.0, 80.3, 86.9, 94.0),
    "t5": (76.0, 74.9, 75.1, 76.3, 78.0),
    "alibi": (74.9, 73.9, 73.6, 73.5, 73.5),
}


@pytest.fixture
def provenance():
    return Provenance(
        longreach="0.1.0",
        torch="2.13.0",
        python="3.12.3",
        platform="Linux",
        device="cpu",
        num_threads=2,
        git_commit="abc123",
        seed=7,
        corpus="stdlib",
        corpus_hash="c0ffee",
        tokenizer_hash="70ken",
        vocab_size=4096,
        created="2026-02-03T04:05:06+00:00",
        config={"model": {"d_model": 256}},
    )


@pytest.fixture
def record():
    def make(method, valid_length, perplexity, train_length=128):
        nats = 800.0 if perplexity == math.inf else math.log(perplexity)
        return Record.from_sums(
            method=method,
            train_length=train_length,
            valid_length=valid_length,
            stride=valid_length,
            protocol="nonoverlapping",
            nll=4096 * nats,
            tokens=4096,
            bytes=16000,
            mean_context=(valid_length - 1) / 2,
            tokens_per_second=41234.0,
            seconds=0.1,
            peak_memory=3 * 2**28,
            attention="sdpa",
        )

    return make


@pytest.fixture
def skipped():
    def make(method, valid_length, reason, train_length=128):
        return Skipped(
            method=method,
            train_length=train_length,
            valid_length=valid_length,
            stride=valid_length,
            protocol="nonoverlapping",
            reason=reason,
        )

    return make


@pytest.fixture
def training():
    def make(method, train_length=128):
        return TrainingRecord(
            method=method,
            train_length=train_length,
            steps=200,
            tokens=409600,
            parameters=4213760,
            final_loss=4.31,
            tokens_per_second=9123.4,
            seconds=44.9,
            peak_memory=3 * 2**29,
            attention="sdpa",
        )

    return make


@pytest.fixture
def empty(provenance):
    return Results(provenance=provenance)


@pytest.fixture
def demo(empty, record, skipped, training):
    """What the demo gives, and a learned table that ends at its training length."""
    entries = [training(method) for method in CURVES]
    for method, curve in CURVES.items():
        entries += [record(method, length, value) for length, value in zip(LENGTHS, curve, strict=True)]
    entries.append(record("learned", 128, 81.2))
    entries += [skipped("learned", length, "its table holds 128 positions") for length in LENGTHS[1:]]
    return empty.add(*entries)
