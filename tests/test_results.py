import dataclasses
import json
import math
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.results import Provenance, Record, Results, Skipped, TrainingRecord, write_atomically

PROVENANCE = Provenance(
    longreach="0.1.0",
    torch="2.13.0",
    python="3.12.3",
    platform="Linux",
    device="cpu",
    num_threads=2,
    git_commit=None,
    seed=0,
    corpus="stdlib",
    corpus_hash="c0",
    tokenizer_hash="70",
    vocab_size=4096,
    created="2026-02-03T04:05:06+00:00",
    config={"valid_lengths": (128, 256), "data": None, "lr": 1e-3},
)


def record(method="alibi", valid_length=128, **changes):
    fields = {
        "method": method,
        "train_length": 128,
        "valid_length": valid_length,
        "stride": valid_length,
        "protocol": "nonoverlapping",
        "nll": 431.75,
        "tokens": 100,
        "bytes": 400,
        "mean_context": 63.5,
        "tokens_per_second": 1e4,
        "seconds": 0.01,
        "peak_memory": None,
        "attention": "sdpa",
    }
    return Record.from_sums(**(fields | changes))


def skipped(method="learned", valid_length=256):
    return Skipped(
        method=method,
        train_length=128,
        valid_length=valid_length,
        stride=valid_length,
        protocol="nonoverlapping",
        reason="its table ends at 128",
    )


TRAINING = TrainingRecord(
    method="alibi",
    train_length=128,
    steps=10,
    tokens=1280,
    parameters=1000,
    final_loss=4.5,
    tokens_per_second=900.0,
    seconds=1.4,
    peak_memory=2**20,
    attention="sdpa",
)
RESULTS = Results(provenance=PROVENANCE).add(TRAINING, record(), skipped())


@pytest.fixture
def damage(tmp_path):
    """Write RESULTS, let the test change the parsed document or the text, read it, return the error's message."""

    def read_damaged(change=None, text=None):
        path = tmp_path / "results.json"
        RESULTS.write(path)
        if change is not None:
            document = json.loads(path.read_text())
            change(document)
            path.write_text(json.dumps(document))
        if text is not None:
            path.write_bytes(text(path.read_bytes()))
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the messages are compared by the tests)
            Results.read(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")

    return read_damaged


def test_derived_figures_by_hand():
    # Two tokens at probability 1/4 each: perplexity 4; four bits over two bytes.
    two = record(nll=2 * math.log(4), tokens=2, bytes=2)
    assert two.perplexity == pytest.approx(4, rel=1e-15)
    assert two.bits_per_byte == pytest.approx(2, rel=1e-15)


def test_perplexity_overflows_at_709_nats_and_is_stored_as_null(tmp_path):
    finite, infinite = record(nll=708.9, tokens=1), record("rotary", nll=709.0, tokens=1)
    assert finite.perplexity == pytest.approx(math.exp(708.9), rel=1e-12)
    assert infinite.perplexity == math.inf
    results = Results(provenance=PROVENANCE, records=(finite, infinite))
    results.write(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["records"][1]["perplexity"] is None
    assert Results.read(tmp_path / "r.json") == results


names = st.text(min_size=1, max_size=20)
positive = st.integers(1, 2**62)
amounts = st.floats(0, 1e300)
memory = st.none() | st.integers(0, 2**50)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.builds(
    record,
    method=names,
    train_length=positive,
    valid_length=positive,
    stride=positive,
    protocol=names,
    nll=st.floats(0, 1e12),
    tokens=positive,
    bytes=positive,
    mean_context=amounts,
    tokens_per_second=st.floats(1e-9, 1e12),
    seconds=amounts,
    peak_memory=memory,
)
trainings = st.builds(
    dataclasses.replace, st.just(TRAINING), method=names, final_loss=amounts, steps=positive, peak_memory=memory
)


@given(
    st.lists(records, max_size=4, unique_by=lambda entry: entry.cell),
    st.lists(trainings, max_size=3, unique_by=lambda entry: entry.method),
    st.dictionaries(st.text(), json_values, max_size=4),
)
def test_reading_gives_back_what_was_written(tmp_path_factory, records, trainings, config):
    provenance = dataclasses.replace(PROVENANCE, config=config)
    results = Results(provenance=provenance).add(*records, *trainings)
    path = tmp_path_factory.mktemp("round") / "results.json"
    results.write(path)
    assert Results.read(path) == results
    # Strict JSON: a parser that refuses Python's extensions reads it.
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_tuples_in_the_configuration_become_lists():
    assert PROVENANCE.config["valid_lengths"] == [128, 256]


@pytest.mark.parametrize("bad", [{"a": math.nan}, {"a": [math.inf]}, {"a": object()}, {1: 2}, {"a": {"b": b""}}])
def test_configuration_that_json_cannot_hold(bad):
    with pytest.raises(ValueError, match=r"^config"):
        dataclasses.replace(PROVENANCE, config=bad)


@pytest.mark.parametrize("created", ["yesterday", "2026-02-03T04:05:06", "2026-02-03T04:05:06+02:00"])
def test_time_that_is_not_utc(created):
    with pytest.raises(ValueError, match="created must be a UTC time"):
        dataclasses.replace(PROVENANCE, created=created)


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
        {"method": ""},
        {"method": 7},
        {"mean_context": math.inf},
        {"tokens_per_second": 0.0},
        {"seconds": -1e-9},
        {"peak_memory": 1.5},
        {"peak_memory": -1},
    ],
)
def test_record_refuses(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        record(**changes)


def test_record_refuses_figures_that_contradict_its_sums():
    good = record()
    for name in ("perplexity", "bits_per_byte"):
        value = getattr(good, name)
        assert dataclasses.replace(good, **{name: math.nextafter(value, math.inf)})
        with pytest.raises(ValueError, match=f"{name} is .* give"):
            dataclasses.replace(good, **{name: value * (1 + 1e-13)})
    with pytest.raises(ValueError, match="perplexity is inf"):
        dataclasses.replace(good, perplexity=math.inf)


def test_integers_stand_for_numbers_but_not_the_other_way():
    assert type(record(nll=431).nll) is float
    with pytest.raises(ValueError, match="valid_length must be an integer"):
        record(valid_length=128.0)


def test_add_find_and_lists_in_order():
    results = Results(provenance=PROVENANCE)
    entries = [record("rotary", 256), record("alibi", 512), record("alibi", 128), skipped(), TRAINING]
    full = results.add(*entries[:2]).add(*entries[2:])
    assert results.records == ()
    assert full.methods() == ("alibi", "rotary", "learned")  # trainings come first, then cells as they were measured
    assert full.methods(64) == ()
    assert full.train_lengths() == (128,)
    assert full.valid_lengths(128) == (128, 256, 512)
    assert full.valid_lengths(128, protocol="sliding") == ()
    assert full.find("alibi", 128, 512) is entries[1]
    assert full.find("learned", 128, 256) is entries[3]
    assert full.find("alibi", 128, 512, stride=1) is None
    assert full.find("alibi", 128, 512, protocol="sliding") is None


@pytest.mark.parametrize("again", [record(nll=1.0), skipped(), TRAINING, skipped("alibi", 128)])
def test_no_cell_twice(again):
    with pytest.raises(ValueError, match="appears twice"):
        RESULTS.add(again)


def test_damaged_text(damage):
    for share in (0, 0.01, 0.5, 0.99):
        assert "damaged JSON" in damage(text=lambda text, share=share: text[: int(share * len(text))])
    assert "not UTF-8" in damage(text=lambda text: text.replace(b"stdlib", b"st\xffdlib"))
    assert "nested too deeply" in damage(text=lambda text: b"[" * 200_000)
    assert "no version" in damage(text=lambda text: b"[]")
    assert "no version" in damage(text=lambda text: b'{"version": true}')
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        assert "is not JSON" in damage(text=lambda text, constant=constant: text.replace(b"431.75", constant))
    assert "must be finite" in damage(text=lambda text: text.replace(b"431.75", b"1e999"))
    assert "'seed' appears twice" in damage(text=lambda text: text.replace(b'"seed"', b'"seed": 1, "seed"'))


def test_unknown_version(damage):
    assert "version 2 is not 1" in damage(lambda document: document.update(version=2, records="elsewhere"))


@pytest.mark.parametrize("section", ["provenance", "training", "records", "skipped"])
def test_missing_unknown_and_mistyped_keys(damage, section):
    def entry(document):
        return document[section] if section == "provenance" else document[section][0]

    where = section if section == "provenance" else f"{section}[0]"
    kind = {"provenance": Provenance, "training": TrainingRecord, "records": Record, "skipped": Skipped}[section]
    for field in dataclasses.fields(kind):
        message = damage(lambda document, name=field.name: entry(document).pop(name))
        assert message.startswith(f"{where}: {field.name} is missing")
        message = damage(lambda document, name=field.name: entry(document).update({name: [1]}))
        assert message.startswith(f"{where}: {field.name} must be")
    assert damage(lambda document: entry(document).update(colour=1)).startswith(f"{where}: 'colour' is not a known key")
    assert damage(lambda document: document.pop(section)).startswith(f"{section} is missing")
    assert damage(lambda document: document.update({section: 3})).startswith(f"{section} must be")
    assert damage(lambda document: document.update(plots=[])).startswith("'plots' is not a known key")


def test_contradictory_file(damage):
    assert "records[0]: perplexity is 70.0" in damage(lambda document: document["records"][0].update(perplexity=70))
    assert "a cell appears twice" in damage(lambda document: document["records"].append(document["records"][0]))


def test_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Results.read(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        RESULTS.write(tmp_path / "none" / "results.json")


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    RESULTS.write(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Results(provenance=PROVENANCE).write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


def test_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_imports_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import longreach.results;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(*(new - set(sys.stdlib_module_names)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["longreach"]
