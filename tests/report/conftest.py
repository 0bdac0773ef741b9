import math
import zlib
from dataclasses import replace

import pytest
import sample_records
from sample_records import CONTEXT, DECOMPOSITION, OFFSET, PROVENANCE, RETRIEVAL, START, SUMMARY, TRAINING, at_seed

from longreach.results import Model, Results

LENGTHS = (128, 256, 512, 1024, 2048)
CURVES = {
    "sinusoidal": (80.6, 82.9, 93.1, 110.2, 130.5),
    "rotary": (77.2, 77.0, 80.3, 86.9, 94.0),
    "t5": (76.0, 74.9, 75.1, 76.3, 78.0),
    "alibi": (74.9, 73.9, 73.6, 73.5, 73.5),
}


@pytest.fixture
def provenance():
    return replace(
        PROVENANCE,
        starts=(replace(START, git_commit="abc123"),),
        split_seed=7,
        corpus_hash="c0ffee",
        config={"model": {"d_model": 256}},
    )


@pytest.fixture
def record():
    def make(method, valid_length, perplexity, train_length=128):
        nats = 800.0 if perplexity == math.inf else math.log(perplexity)
        return sample_records.record(
            method,
            valid_length,
            train_length=train_length,
            nll=4096 * nats,
            tokens=4096,
            bytes=16000,
            mean_context=(valid_length - 1) / 2,
            seconds=4096 / 41234,
            peak_memory=3 * 2**28,
        )

    return make


@pytest.fixture
def skipped():
    def make(method, valid_length, reason, train_length=128):
        return replace(sample_records.skipped(method, valid_length, train_length=train_length), reason=reason)

    return make


@pytest.fixture
def training():
    def make(method, train_length=128, *, speed=9123.4, peak_memory=3 * 2**29):
        measured = {"tokens": 409600, "parameters": 4213760, "seconds": 409600 / speed, "peak_memory": peak_memory}
        return replace(TRAINING, model=Model(method, train_length, seed=0), **measured)

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


LOSSES = {"sinusoidal": 4.39, "rotary": 4.35, "alibi": 4.32, "bigscience/bloom-1b7": 4.2}
"""At the training length, in nats per token."""
BEYOND = {"sinusoidal": -0.9, "rotary": -0.2, "alibi": 0.004, "bigscience/bloom-1b7": 0.03}
"""Gain for each doubling past the training length."""


@pytest.fixture
def strided(record):
    """A record of any protocol."""

    def make(method, valid_length, perplexity, train_length=128, *, stride=1, protocol="sliding-window", speed=500.0):
        entry = record(method, valid_length, perplexity, train_length)
        seconds = entry.tokens / speed
        return replace(entry, stride=stride, protocol=protocol, seconds=seconds, mean_context=valid_length - 1)

    return make


@pytest.fixture
def context():
    def make(method, valid_length, first, last, loss, train_length=128, half=0.03, resampled="35 documents"):
        return replace(
            CONTEXT,
            model=Model(method, train_length, seed=0),
            valid_length=valid_length,
            first_context=first,
            last_context=last,
            tokens=1000,
            nll=1000 * loss,
            low=None if half is None else loss - half,
            high=None if half is None else loss + half,
            resampled=resampled,
        )

    return make


@pytest.fixture(scope="session")
def decomposed():
    def make(method, valid_length, relief, beyond, train_length=128, *, stride=1, half=0.004, base=4.3):
        def interval(value):
            return (None, None) if half is None else (value - half, value + half)

        return replace(
            DECOMPOSITION,
            model=Model(method, train_length, seed=0),
            valid_length=valid_length,
            stride=stride,
            capped_context=train_length - (stride - 1) / 2,
            tokens=1000,
            base_nll=1000 * base,
            capped_nll=1000 * (base - relief),
            long_nll=1000 * (base - relief - beyond),
            relief_low=interval(relief)[0],
            relief_high=interval(relief)[1],
            beyond_low=interval(beyond)[0],
            beyond_high=interval(beyond)[1],
        )

    return make


@pytest.fixture
def offset():
    def make(method, start, perplexity, train_length=128):
        nll = 4096 * (800.0 if perplexity == math.inf else math.log(perplexity))
        lengths = {"model": Model(method, train_length, seed=0), "valid_length": train_length}
        return replace(OFFSET, **lengths, offset=start, tokens=4096, nll=nll)

    return make


@pytest.fixture
def found():
    """Answers found at one depth."""

    def make(method, valid_length, depth, correct, cases=10, train_length=128, task="lines"):
        lengths = {"valid_length": valid_length, "mean_tokens": 0.97 * valid_length}
        model = Model(method, train_length, seed=0)
        return replace(RETRIEVAL, task=task, model=model, **lengths, depth=depth, cases=cases, correct=correct)

    return make


@pytest.fixture
def summary():
    def make(method, valid_length, rouge1, train_length=128, half=0.02):
        scores = {}
        for name, value in (("rouge1", rouge1), ("rouge2", rouge1 / 4), ("rougeL", rouge1 / 2)):
            low, high = (None, None) if half is None else (value - half, value + half)
            scores |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return replace(SUMMARY, model=Model(method, train_length, seed=0), valid_length=valid_length, **scores)

    return make


@pytest.fixture
def everything(demo, record, training, strided, context, decomposed, offset, found, summary):
    """All kinds of entries, at two training lengths."""
    entries = [training(m, 256, speed=8100.0, peak_memory=2**31) for m in ("alibi", "sinusoidal")]
    for train_length in (128, 256):
        methods = ["sinusoidal", "rotary", "alibi", "bigscience/bloom-1b7"][: 3 if train_length == 128 else 4]
        for method in methods:
            for doublings in range(5):
                length = train_length << doublings
                beyond = doublings * BEYOND[method]
                relief = 0.05 * (1 - 0.5**doublings)
                loss = LOSSES[method] - relief - beyond - (0.1 if train_length == 256 else 0.0)
                if train_length == 256:
                    entry = record(method, length, math.exp(loss), 256)
                    entries.append(replace(entry, words=3000))
                bins = [(1, 1), *((2**k + 1, 2 ** (k + 1)) for k in range(length.bit_length() - 1))]
                for first, last in bins:
                    past = max(0.0, math.log2(last / train_length))
                    value = LOSSES[method] + 2.5 / first**0.6 - past * BEYOND[method]
                    entries.append(context(method, length, first, last, value, train_length, half=0.02 + 0.4 / first))
                if doublings:
                    entries.append(decomposed(method, length, relief, beyond, train_length, stride=16))
                for stride in (1, 64):
                    entries.append(strided(method, length, math.exp(loss - 0.06), train_length, stride=stride))
            window = {"stride": 1, "train_length": train_length}
            level = math.exp(LOSSES[method] - 0.06)
            cached = level if BEYOND[method] > 0 else level * 8
            entries.append(strided(method, train_length, cached, protocol="cached", speed=9000.0, **window))
            shifted = level * (1.3 if BEYOND[method] > 0 else 20)
            entries.append(strided(method, train_length, shifted, protocol="cached-shifted", speed=9100.0, **window))
            entries.append(strided(method, 4096, cached, protocol="cached-unbounded", speed=4000.0, **window))
            for start in (0, 32, 64, 128, 256, 512, 1024, 2048):
                factor = 1.0 if BEYOND[method] > 0 or not start else (start / 16) ** 1.1
                entries.append(offset(method, start, level * factor, train_length))
            for task in ("lines", "passkey"):
                for doublings in range(4):
                    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                        correct = max(0, 10 - int(doublings * (1 if BEYOND[method] > 0 else 4) * (1.2 - depth)))
                        entries.append(found(method, train_length << doublings, depth, correct, 10, train_length, task))
            entries += [summary(method, train_length << k, 0.17 - 0.02 * k, train_length) for k in (0, 1)]
    return demo.add(*entries)


@pytest.fixture
def seeded():
    """Results at several seeds: sums of nll grow by a share of a percent from seed to seed, in an order of each
    method's own.
    """

    def make(results, seeds=(0, 1, 2)):
        def at(entry, seed):
            order = zlib.crc32(entry.method.encode()) % len(seeds)
            factor = 1 + 0.012 * ((seed + order) % len(seeds) - 1)
            sums = ("nll", "base_nll", "capped_nll", "long_nll", "low", "high", "seconds", "final_loss")
            changes = {n: factor * getattr(entry, n) for n in sums if getattr(entry, n, None) is not None}
            return replace(at_seed(entry, seed), **changes)

        empty = Results(provenance=results.provenance)
        return empty.add(*(at(entry, seed) for seed in seeds for entry in (*results.training, *results.entries())))

    return make
