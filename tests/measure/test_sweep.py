import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from ngram_oracle import VOCAB, NgramOracle, random_text
from tiny_subjects import decoder_subject, tokenizer, transformers_subject

from longreach.measure.bootstrap import units
from longreach.measure.material import Material
from longreach.measure.plan import EvaluateConfig
from longreach.measure.prompts import Case
from longreach.measure.retrieval import max_new_tokens
from longreach.measure.score import score
from longreach.measure.subject import Subject
from longreach.measure.summaries import MeetingCase
from longreach.measure.sweep import evaluate, failures
from longreach.measure.text_tasks import Text
from longreach.results import Cell, Model, Skipped

NUM_TARGETS = 160
CPU = torch.device("cpu")
ORACLE = Model("oracle", 8, seed=None)
PERPLEXITY = ("perplexity",)


def silent(stage, done, total):
    pass


def text_of(tokens):
    return Text(tokens=tokens, num_bytes=250, num_words=40, units=units(tokens, eos_id=0, valid_length=64))


TEXT = text_of(random_text(NUM_TARGETS, seed=0))


class Uniform(NgramOracle):
    """Knows nothing: every token costs ln V. Takes positions and a cache without looking at them."""

    def logits(self, tokens, chunk_size, *, last=None, positions=None, cache=None):
        for part in tokens[:, -last if last else 0 :].split(chunk_size, dim=1):
            yield torch.zeros(*part.shape, VOCAB)

    def new_cache(self, length, max_context=None):
        return object()


def subject_of(model, **changes):
    subject = Subject(
        identity=ORACLE,
        model=model,
        tokenizer=tokenizer(),
        vocab_size=VOCAB,
        device=CPU,
        max_length=None,
        attention=lambda queries, keys, windowed: f"{queries}x{keys}{' windowed' if windowed else ''}",
    )
    return replace(subject, **changes)


def measured(subject, config, material=None, done=()):
    resolved = config.resolved(subject.train_length)
    return [
        entry for entries in evaluate(subject, material or Material(TEXT), resolved, done, silent) for entry in entries
    ]


@pytest.mark.parametrize("valid_length", [1, 8, 10, NUM_TARGETS])
def test_record_of_a_model_that_knows_nothing(valid_length):
    (record,) = measured(subject_of(Uniform(1)), EvaluateConfig(tasks=PERPLEXITY, valid_lengths=(valid_length,)))
    assert record.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert record.nll == pytest.approx(NUM_TARGETS * math.log(VOCAB), rel=1e-6)
    assert record.bits_per_byte == pytest.approx(NUM_TARGETS * math.log2(VOCAB) / 250, rel=1e-6)
    assert record.word_perplexity == pytest.approx(VOCAB ** (NUM_TARGETS / 40), rel=1e-5)
    assert (record.tokens, record.stride, record.protocol) == (NUM_TARGETS, valid_length, "nonoverlapping")
    assert record.mean_context == sum(target % valid_length + 1 for target in range(NUM_TARGETS)) / NUM_TARGETS
    assert record.tokens_per_second > 0
    assert record.attention == f"{valid_length}x{valid_length}"


def test_the_grid_of_lengths_strides_and_protocols():
    config = EvaluateConfig(
        tasks=PERPLEXITY,
        valid_lengths=(8, 16),
        strides=(1, 8, 12),
        protocols=("nonoverlapping", "cached", "cached-unbounded"),
    )
    entries = measured(subject_of(Uniform(1)), config)
    assert [(e.protocol, e.valid_length, e.stride) for e in entries] == [
        ("nonoverlapping", 8, 8),
        ("cached", 8, 1),
        ("sliding-window", 8, 1),
        ("sliding-window", 8, 12),
        ("nonoverlapping", 16, 16),
        ("cached", 16, 1),
        ("sliding-window", 16, 1),
        ("sliding-window", 16, 8),
        ("sliding-window", 16, 12),
        ("cached-unbounded", NUM_TARGETS, 1),
    ]
    (skipped,) = (e for e in entries if isinstance(e, Skipped))
    assert skipped.cell == Cell("perplexity", ORACLE, 8, 12, "sliding-window")
    assert skipped.reason == "a stride of 12 leaves gaps between windows of 8"
    by_protocol = {(e.protocol, e.valid_length): e for e in entries if not isinstance(e, Skipped)}
    contexts = [min(target + 1, 16) for target in range(NUM_TARGETS)]
    assert by_protocol["cached", 16].mean_context == sum(contexts) / NUM_TARGETS
    assert by_protocol["cached-unbounded", NUM_TARGETS].mean_context == (NUM_TARGETS + 1) / 2
    assert by_protocol["cached", 16].attention == f"{NUM_TARGETS}x16 windowed"


def test_finished_cells_are_not_measured_again():
    config = EvaluateConfig(tasks=("perplexity", "positions"), valid_lengths=(8, 16), strides=(4,))
    entries = measured(subject_of(Uniform(1)), config)
    cells = list(dict.fromkeys(entry.cell for entry in entries))
    assert len(cells) == 4 + 2 + 1
    for number in range(len(cells) + 1):
        rest = measured(subject_of(Uniform(1)), config, done=cells[:number])
        assert list(dict.fromkeys(entry.cell for entry in rest)) == cells[number:]


@pytest.mark.parametrize("k", [3, 8, 12, 40])
def test_positions_tell_relief_from_longer_context(k):
    config = EvaluateConfig(tasks=("positions",), valid_lengths=(8, 16, 64), capped_stride=1)
    oracle = NgramOracle(k)
    entries = measured(subject_of(oracle), config)
    by_length = {
        length: [e for e in entries if e.task == "positions" and e.valid_length == length] for length in (8, 64)
    }
    for length, bins in by_length.items():
        assert bins[0].first_context == 1
        assert bins[-1].last_context == length
        assert sum(b.tokens for b in bins) == NUM_TARGETS
    for split in (e for e in entries if e.task == "decomposition"):
        assert split.gain == pytest.approx(split.relief + split.beyond, abs=1e-12)
        if k <= 8:
            assert split.beyond == pytest.approx(0, abs=1e-12)
        elif split.valid_length == 64:
            assert split.beyond > 0.01


def test_probes_of_an_absolute_and_a_relative_method():
    tokens = np.random.default_rng(0).integers(1, tokenizer().vocab_size, 101)
    figures = {}
    for method in ("sinusoidal", "alibi"):
        entries = measured(decoder_subject(method), EvaluateConfig(tasks=("probes",)), Material(text_of(tokens)))
        offsets = {e.offset: e.nll for e in entries if e.task == "offsets"}
        assert list(offsets) == [0, 4, 8, 16, 32, 64, 128, 256]
        windowed = {e.protocol: e.nll for e in entries if e.task == "perplexity"}
        assert list(windowed) == ["sliding-window", "cached", "cached-shifted"]
        figures[method] = offsets, windowed
    offsets, windowed = figures["alibi"]
    assert len(set(offsets.values())) == 1
    assert windowed["cached-shifted"] == windowed["cached"]
    offsets, windowed = figures["sinusoidal"]
    assert len(set(offsets.values())) == len(offsets)
    assert windowed["cached-shifted"] != windowed["cached"]


def test_a_table_of_positions_skips_what_it_does_not_hold():
    config = EvaluateConfig(
        tasks=("perplexity", "positions", "probes", "kv"),
        valid_lengths=(16, 32),
        protocols=("nonoverlapping", "cached"),
    )
    tokens = np.random.default_rng(0).integers(1, tokenizer().vocab_size, 101)
    subject = decoder_subject("learned")
    learned = subject.identity
    entries = measured(subject, config, Material(text_of(tokens)))
    assert {e.task for e in entries if not isinstance(e, Skipped)} == {"perplexity", "positions", "offsets"}
    reasons = {e.cell: e.reason for e in entries if isinstance(e, Skipped)}
    assert reasons["perplexity", learned, 32, 32, "nonoverlapping"] == "its table holds 16 positions"
    assert reasons["perplexity", learned, 16, 1, "cached"] == "its table holds 16 positions"
    assert reasons["decomposition", learned, 32, None, None] == "its table holds 16 positions"
    assert "too few for windows from 4, 8, 16, 32, 64, 128, 256" in reasons["offsets", learned, 16, None, None]
    assert "a kv prompt of one record has" in reasons["kv", learned, 16, None, None]
    assert reasons["kv", learned, 32, None, None] == "its table holds 16 positions"


def test_a_table_of_positions_needs_none_for_the_last_token_of_an_answer():
    cases = [Case("passkey", "The pass key is 5. It is", "5", 0.5)]
    config = EvaluateConfig(tasks=("passkey",), cases="cases.jsonl", valid_lengths=(64,), num_depths=1)
    needed = 64 + max_new_tokens(cases, tokenizer()) - 1
    material = Material(cases=cases)
    for short in (0, 1):
        subject = replace(decoder_subject(), max_length=needed - short)
        (entry,) = measured(subject, config, material)
        assert isinstance(entry, Skipped) is bool(short)


def test_what_an_error_left_undone_is_listed_with_its_first_line():
    config = EvaluateConfig(valid_lengths=(8, 16))
    tokens = np.zeros(NUM_TARGETS + 1, dtype=np.int64)
    material = Material(text_of(tokens))
    done = {Cell("perplexity", ORACLE, 8, 8, "nonoverlapping"), Cell("positions", ORACLE, 8)}
    left = failures(ORACLE, config, material, done, RuntimeError("it broke\nfor a reason"))
    assert {entry.cell for entry in left} == {
        Cell("perplexity", ORACLE, 16, 16, "nonoverlapping"),
        Cell("positions", ORACLE, 16),
        Cell("decomposition", ORACLE, 16),
    }
    assert {(entry.reason, entry.failed) for entry in left} == {("it broke", True)}
    assert {entry.reason for entry in failures(ORACLE, config, material, done, MemoryError())} == {"MemoryError"}


def test_what_a_model_of_transformers_cannot_do_is_skipped():
    tokens = np.random.default_rng(0).integers(1, tokenizer().vocab_size, 101)
    config = EvaluateConfig(tasks=("perplexity", "probes"), valid_lengths=(32,), protocols=("nonoverlapping", "cached"))
    entries = measured(transformers_subject("bloom"), config, Material(text_of(tokens)))
    assert {e.protocol for e in entries if e.task == "perplexity" and not isinstance(e, Skipped)} == {
        "nonoverlapping",
        "sliding-window",
        "cached",
    }
    skipped = [e for e in entries if isinstance(e, Skipped)]
    assert {(e.task, e.protocol) for e in skipped} == {("offsets", None), ("perplexity", "cached-shifted")}
    assert all("takes no positions" in e.reason for e in skipped)


def test_out_of_memory_ends_a_cell_and_not_the_grid():
    class Large(Uniform):
        def logits(self, tokens, chunk_size, **options):
            if tokens.shape[1] > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().logits(tokens, chunk_size, **options)

    first, second = measured(subject_of(Large(1)), EvaluateConfig(tasks=PERPLEXITY, valid_lengths=(16, 8)))
    assert (first.valid_length, first.reason) == (16, "out of memory")
    assert second.tokens == NUM_TARGETS


def test_the_cpu_s_allocator_runs_out_of_memory_in_words_of_its_own():
    class Large(Uniform):
        def logits(self, tokens, chunk_size, **options):
            if tokens.shape[1] > 8:
                torch.empty(2**60)
            return super().logits(tokens, chunk_size, **options)

    first, second = measured(subject_of(Large(1)), EvaluateConfig(tasks=PERPLEXITY, valid_lengths=(16, 8)))
    assert (first.valid_length, first.reason) == (16, "out of memory")
    assert second.tokens == NUM_TARGETS


def test_any_other_runtime_error_is_not_swallowed():
    class Broken(Uniform):
        def logits(self, tokens, chunk_size, **options):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        measured(subject_of(Broken(1)), EvaluateConfig(tasks=PERPLEXITY, valid_lengths=(16,)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_overflow_end_a_cell_and_not_the_grid(value):
    class Overflowing(Uniform):
        def logits(self, tokens, chunk_size, **options):
            for part in super().logits(tokens, chunk_size, **options):
                if tokens.shape[1] > 8:
                    part[..., -1] = value
                yield part

    config = EvaluateConfig(
        tasks=("perplexity", "positions"), valid_lengths=(16, 8), protocols=("nonoverlapping", "cached")
    )
    entries = measured(subject_of(Overflowing(1)), config)
    skipped = [entry for entry in entries if isinstance(entry, Skipped)]
    assert [entry.cell[0] for entry in skipped] == ["perplexity"] * 3 + ["positions", "decomposition"]
    assert {entry.reason for entry in skipped} == {
        f"the nll of {NUM_TARGETS} of {NUM_TARGETS} tokens is nan or infinite, as where logits overflow in float16"
    }
    assert {(entry.task, entry.valid_length) for entry in entries if not isinstance(entry, Skipped)} == {
        ("perplexity", 8),
        ("positions", 8),
    }


def test_answers_out_of_logits_that_are_no_numbers_are_no_answers():
    class Overflowing(Uniform):
        def logits(self, tokens, chunk_size, **options):
            for part in super().logits(tokens, chunk_size, **options):
                part[..., 3] = math.nan
                yield part

    subject = replace(decoder_subject("alibi"), model=Overflowing(1))
    config = EvaluateConfig(tasks=("passkey",), valid_lengths=(600,), num_depths=1, cases_per_depth=1)
    (entry,) = measured(subject, config)
    assert re.fullmatch(r"logits after \d+ tokens of prompt are nan or infinite: load it in float32", entry.reason)


def test_a_capped_stride_over_the_training_length_ends_a_cell_and_not_the_grid():
    config = EvaluateConfig(tasks=("positions", "probes"), valid_lengths=(16,), capped_stride=9)
    entries = measured(subject_of(Uniform(1)), config)
    reasons = {entry.cell[0]: entry.reason for entry in entries if isinstance(entry, Skipped)}
    assert reasons["decomposition"] == "capped_stride=9 leaves gaps between windows of L=8"
    assert reasons["perplexity"] == "a stride of 9 leaves gaps between windows of 8"
    assert {entry.task for entry in entries if not isinstance(entry, Skipped)} >= {"positions", "offsets"}


def test_a_length_that_there_are_too_few_names_for_is_skipped(monkeypatch):
    monkeypatch.setattr("longreach.measure.prompts.ADJECTIVES", ("small", "large"))
    monkeypatch.setattr("longreach.measure.prompts.NOUNS", ("cat", "dog", "hat", "map", "sea"))
    config = EvaluateConfig(tasks=("lines",), valid_lengths=(2000, 600), num_depths=1, cases_per_depth=1)
    long, short = measured(decoder_subject("alibi"), config)
    assert long.reason == "more than 10 records are needed and there are 10 names: give a shorter length"
    assert short.cases == 1


def test_retrieval_is_measured_at_lengths_and_depths():
    config = EvaluateConfig(tasks=("passkey", "topics"), valid_lengths=(600, 900), num_depths=3, cases_per_depth=2)
    entries = measured(decoder_subject("alibi"), config)
    assert [(e.task, e.valid_length, e.depth, e.cases) for e in entries if e.task == "passkey"] == [
        ("passkey", length, depth, 2) for length in (600, 900) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(0.8 * e.valid_length < e.mean_tokens <= e.valid_length for e in entries if e.task == "passkey")


def test_cases_of_a_file_go_to_the_length_that_holds_them():
    cases = [Case("passkey", "one two 4 three", "4", 0.5), Case("passkey", "one " * 60 + "7", "7", 0.99)]
    sizes = [len(tokenizer().encode(case.prompt)) for case in cases]
    config = EvaluateConfig(
        tasks=("passkey",), cases="cases.jsonl", valid_lengths=(sizes[0], 50, sizes[1]), num_depths=2
    )
    entries = measured(decoder_subject("alibi"), config, Material(TEXT, cases))
    assert [(e.valid_length, type(e).__name__) for e in entries] == [
        (sizes[0], "RetrievalRecord"),
        (50, "Skipped"),
        (sizes[1], "RetrievalRecord"),
    ]
    assert entries[1].reason == "no case of the file is of this length"


def test_cases_that_are_too_long_for_every_length_are_told_of():
    cases = [Case("passkey", "one two 4 three", "4", 0.5)] * 3 + [Case("passkey", "one " * 60 + "7", "7", 0.99)] * 7
    size = len(tokenizer().encode(cases[0].prompt))
    config = EvaluateConfig(tasks=("passkey",), cases="cases.jsonl", num_depths=1)
    told = "7 of 10 cases of the file are too long for every length"
    first, second = measured(decoder_subject("alibi"), replace(config, valid_lengths=(size,)), Material(TEXT, cases))
    assert (first.cases, second.cell, second.reason) == (3, first.cell, told)
    first, second = measured(
        decoder_subject("alibi"), replace(config, valid_lengths=(size, size + 1)), Material(TEXT, cases)
    )
    assert (first.cases, second.reason) == (3, f"no case of the file is of this length; {told}")


def test_summaries_at_each_length_that_has_room():
    meeting = MeetingCase("here", "A: one two three.\nB: four.", "What was said?", "Numbers were said.")
    config = EvaluateConfig(tasks=("qmsum",), meetings="m.jsonl", valid_lengths=(20, 200), summary_tokens=20)
    short, long = measured(decoder_subject("alibi"), config, Material(None, None, [meeting]))
    assert short.reason == "a summary of 20 tokens leaves no room for a meeting"
    assert (long.cases, long.truncated) == (1, 0)


def test_the_same_scores_serve_perplexity_and_positions(monkeypatch):
    calls = []

    def counting(*arguments, **options):
        calls.append((options["valid_length"], options["stride"]))
        return score(*arguments, **options)

    monkeypatch.setattr("longreach.measure.text_tasks.score", counting)
    config = EvaluateConfig(tasks=("perplexity", "positions"), valid_lengths=(8, 16, 32), strides=(1,), capped_stride=1)
    measured(subject_of(NgramOracle(2)), config)
    assert sorted(calls) == sorted({(8, 8), (16, 16), (32, 32), (8, 1), (16, 1), (32, 1)})
