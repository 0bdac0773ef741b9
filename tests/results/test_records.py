import dataclasses
import math
from dataclasses import replace

import pytest
from sample_records import (
    ALIBI,
    CONTEXT,
    DECOMPOSITION,
    OFFSET,
    PROVENANCE,
    RETRIEVAL,
    START,
    SUMMARY,
    TRAINING,
    record,
    skipped,
)

from longreach.results import Model


def test_derived_figures_by_hand():
    # Two tokens at probability 1/4 each: perplexity 4; four bits over two bytes.
    two = record(nll=2 * math.log(4), tokens=2, bytes=2)
    assert two.perplexity == pytest.approx(4, rel=1e-15)
    assert two.bits_per_byte == pytest.approx(2, rel=1e-15)


def test_perplexity_overflows_at_709_nats():
    assert record(nll=708.9, tokens=1).perplexity == pytest.approx(math.exp(708.9), rel=1e-12)
    assert record(nll=709.0, tokens=1).perplexity == math.inf


def test_speeds_by_hand():
    assert record(tokens=100, seconds=0.5).tokens_per_second == 200
    assert replace(TRAINING, tokens=1280, seconds=2.0).tokens_per_second == 640


def test_every_entry_tells_its_models_fields():
    for entry in (record(), CONTEXT, DECOMPOSITION, OFFSET, RETRIEVAL, SUMMARY, TRAINING):
        assert (entry.method, entry.train_length, entry.seed) == ("alibi", 128, 0)
        assert entry.model == ALIBI


def test_models_are_told_apart_by_all_three_fields():
    others = [Model("rotary", 128, seed=0), Model("alibi", 64, seed=0), Model("alibi", 128, seed=1)]
    assert len({ALIBI, *others, Model("alibi", 128, seed=None), Model("alibi", 128, seed=0)}) == 5
    assert str(Model("alibi", 1024, seed=3)) == "alibi trained at 1,024, seed 3"
    assert str(Model("bigscience/bloom-560m", 2048, seed=None)) == "bigscience/bloom-560m trained at 2,048"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("", 128, 0), "method must not be empty"),
        ((7, 128, 0), "method=7: give text"),
        (("alibi", 0, 0), "train_length must be positive"),
        (("alibi", 128.0, 0), r"train_length=128\.0: give an integer"),
        (("alibi", 128, "0"), "seed='0': give an integer"),
        (("alibi", 128, True), "seed=True: give an integer"),
    ],
)
def test_a_model_refuses(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Model(*fields)


def test_perplexity_per_word_by_hand():
    # Ten tokens at probability 1/4 make five words: 4 ^ (10 / 5).
    assert record(nll=10 * math.log(4), tokens=10, words=5).word_perplexity == pytest.approx(16)
    assert record(nll=710.0, tokens=100, words=1).word_perplexity == math.inf
    assert record().word_perplexity is None
    assert record(words=0).word_perplexity is None


def test_gain_is_relief_and_beyond():
    assert DECOMPOSITION.gain == pytest.approx(0.05)
    assert DECOMPOSITION.relief == pytest.approx(0.03)
    assert DECOMPOSITION.beyond == pytest.approx(0.02)
    worse = replace(DECOMPOSITION, long_nll=450.0)
    assert worse.beyond == pytest.approx(-0.23)
    assert worse.gain == pytest.approx(worse.relief + worse.beyond)


def test_other_derived_figures():
    assert CONTEXT.loss == 4.25
    assert CONTEXT.perplexity == pytest.approx(math.exp(4.25))
    assert OFFSET.perplexity == pytest.approx(math.exp(4.31))
    assert replace(OFFSET, nll=70900.0).perplexity == math.inf
    assert RETRIEVAL.accuracy == 0.7


def test_keys_tell_entries_of_one_cell_apart():
    for entry, field in ((CONTEXT, "first_context"), (OFFSET, "offset"), (RETRIEVAL, "depth")):
        other = replace(entry, **{field: 0 if field != "first_context" else 1})
        assert other.cell == entry.cell
        assert other.key != entry.key
    for entry in (record(), DECOMPOSITION, SUMMARY, skipped()):
        assert entry.key == entry.cell


def test_a_skipped_cell_is_that_of_what_was_not_measured():
    assert skipped("alibi", 128).cell == record().cell
    assert skipped("alibi", 128, seed=1).cell != record().cell
    assert replace(skipped("alibi", 512), task="lines", stride=None, protocol=None).cell == RETRIEVAL.cell


@pytest.mark.parametrize(
    "changes",
    [
        {"nll": math.nan},
        {"nll": math.inf},
        {"nll": -1.0},
        {"nll": True},
        {"tokens": 0},
        {"tokens": 1.5},
        {"tokens": 10**400},
        {"bytes": -4},
        {"stride": 0},
        {"protocol": "rolling"},
        {"mean_context": math.inf},
        {"seconds": 0.0},
        {"seconds": -1e-9},
        {"peak_memory": 1.5},
        {"peak_memory": -1},
    ],
)
def test_perplexity_refuses(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        record(**changes)


def test_integers_stand_for_numbers_but_not_the_other_way():
    assert type(record(nll=431).nll) is float
    with pytest.raises(ValueError, match=r"valid_length=128\.0: give an integer"):
        record(valid_length=128.0)


@pytest.mark.parametrize("entry", [CONTEXT, DECOMPOSITION, OFFSET, RETRIEVAL, SUMMARY, skipped(), TRAINING])
def test_every_field_is_checked(entry):
    for field in dataclasses.fields(entry):
        with pytest.raises(ValueError, match=rf"^{field.name}=\[1\]: give "):
            replace(entry, **{field.name: [1]})


@pytest.mark.parametrize(
    ("entry", "changes"),
    [
        (CONTEXT, {"first_context": 0}),
        (CONTEXT, {"first_context": 129}),
        (CONTEXT, {"last_context": 257}),
        (CONTEXT, {"tokens": 0}),
        (CONTEXT, {"nll": -1.0}),
        (CONTEXT, {"low": -0.1}),
        (CONTEXT, {"high": math.nan}),
        (DECOMPOSITION, {"stride": 0}),
        (DECOMPOSITION, {"capped_context": 0.0}),
        (DECOMPOSITION, {"capped_context": 128.5}),
        (SUMMARY, {"truncated": 36}),
        (SUMMARY, {"rouge2": 1.01}),
        (DECOMPOSITION, {"capped_nll": -1.0}),
        (DECOMPOSITION, {"beyond_low": math.inf}),
        (OFFSET, {"offset": -1}),
        (OFFSET, {"nll": math.inf}),
        (RETRIEVAL, {"cases": 0}),
        (RETRIEVAL, {"correct": -1}),
        (RETRIEVAL, {"correct": 11}),
        (RETRIEVAL, {"depth": 1.01}),
        (RETRIEVAL, {"depth": -0.01}),
        (RETRIEVAL, {"mean_tokens": 0.0}),
        (SUMMARY, {"cases": 0}),
        (SUMMARY, {"truncated": -1}),
        (SUMMARY, {"rougeL": -0.1}),
        (TRAINING, {"seconds": 0.0}),
    ],
)
def test_other_entries_refuse(entry, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name) as error:
        replace(entry, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", [record(), CONTEXT, DECOMPOSITION, OFFSET, SUMMARY])
def test_a_class_of_one_task_has_no_other(entry):
    with pytest.raises(ValueError, match=f"task is 'kv', a {type(entry).__name__} measures '{entry.task}'"):
        replace(entry, task="kv")


def test_tuples_in_the_configuration_become_lists():
    assert PROVENANCE.config["valid_lengths"] == [128, 256]


@pytest.mark.parametrize("bad", [{"a": math.nan}, {"a": [math.inf]}, {"a": object()}, {1: 2}, {"a": {"b": b""}}])
def test_configuration_that_json_cannot_hold(bad):
    with pytest.raises(ValueError, match=r"^config"):
        dataclasses.replace(PROVENANCE, config=bad)


@pytest.mark.parametrize("time", ["yesterday", "2026-02-03T04:05:06", "2026-02-03T04:05:06+02:00"])
def test_time_that_is_not_utc(time):
    with pytest.raises(ValueError, match="time must be UTC"):
        dataclasses.replace(START, time=time)


def test_results_came_from_starts():
    with pytest.raises(ValueError, match="starts is empty"):
        dataclasses.replace(PROVENANCE, starts=())
    with pytest.raises(ValueError, match=r"^starts=Start.*: give a list$"):
        dataclasses.replace(PROVENANCE, starts=START)
    with pytest.raises(ValueError, match=r"^starts\[0\]='cpu': give "):
        dataclasses.replace(PROVENANCE, starts=("cpu",))


def test_sources_are_names_with_hashes():
    assert replace(PROVENANCE, sources={"a/run": "ab12"}).sources == {"a/run": "ab12"}
    with pytest.raises(ValueError, match=r"^sources\.a/run=3: give text$"):
        replace(PROVENANCE, sources={"a/run": 3})
    with pytest.raises(ValueError, match=r"^sources has the key 3: give text$"):
        replace(PROVENANCE, sources={3: "ab12"})
