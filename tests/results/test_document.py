import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import (
    ALIBI,
    CONTEXT,
    DECOMPOSITION,
    ENTRIES,
    OFFSET,
    PROVENANCE,
    RESULTS,
    RETRIEVAL,
    SUMMARY,
    TRAINING,
    record,
    skipped,
)

from longreach.results import (
    PROTOCOLS,
    ContextRecord,
    DecompositionRecord,
    Model,
    OffsetRecord,
    Provenance,
    Record,
    Results,
    RetrievalRecord,
    Skipped,
    SummaryRecord,
    TrainingRecord,
    merge,
    over_seeds,
    read_training,
    write_training,
)
from longreach.results.document import pack_entries, unpack_entries

KINDS = {
    "provenance": Provenance,
    "training": TrainingRecord,
    "records": Record,
    "contexts": ContextRecord,
    "decompositions": DecompositionRecord,
    "offsets": OffsetRecord,
    "retrieval": RetrievalRecord,
    "summaries": SummaryRecord,
    "skipped": Skipped,
}


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


names = st.text(min_size=1, max_size=20)
positive = st.integers(1, 2**62)
seeds = st.none() | st.integers(-(2**62), 2**62)
models = st.builds(Model, names, positive, seeds)
amounts = st.floats(0, 1e300)
memory = st.none() | st.integers(0, 2**50)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.builds(
    lambda protocol, stride, valid_length, **fields: record(
        protocol=protocol,
        stride=valid_length if protocol == "nonoverlapping" else stride,
        valid_length=valid_length,
        **fields,
    ),
    method=names,
    train_length=positive,
    seed=seeds,
    valid_length=positive,
    stride=positive,
    protocol=st.sampled_from(PROTOCOLS),
    nll=st.floats(0, 1e12),
    tokens=positive,
    bytes=positive,
    mean_context=amounts,
    seconds=st.floats(1e-9, 1e12),
    peak_memory=memory,
)
trainings = st.builds(
    dataclasses.replace, st.just(TRAINING), model=models, final_loss=amounts, steps=positive, peak_memory=memory
)
ends = st.none() | amounts
signed_ends = st.none() | st.floats(-1e300, 1e300)
shares = st.floats(0, 1)
others = st.one_of(
    st.builds(
        dataclasses.replace,
        st.just(CONTEXT),
        model=models,
        first_context=st.integers(1, 128),
        nll=amounts,
        low=ends,
        high=ends,
    ),
    st.builds(
        dataclasses.replace,
        st.just(DECOMPOSITION),
        model=st.builds(Model, names, st.just(128), seeds),
        valid_length=positive,
        base_nll=amounts,
        relief_low=signed_ends,
        beyond_high=signed_ends,
        resampled=st.text(),
    ),
    st.builds(dataclasses.replace, st.just(OFFSET), model=models, offset=st.integers(0, 2**62), nll=amounts),
    st.builds(
        dataclasses.replace,
        st.just(RETRIEVAL),
        task=names,
        model=models,
        depth=shares,
        cases=st.integers(5, 2**62),
        correct=st.integers(0, 5),
    ),
    st.builds(dataclasses.replace, st.just(SUMMARY), model=models, rouge1=shares, rougeL_low=st.none() | shares),
    st.builds(dataclasses.replace, st.just(skipped()), task=names, stride=st.none() | positive, reason=st.text()),
)


@given(
    st.lists(records, max_size=4, unique_by=lambda entry: entry.cell),
    st.lists(others, max_size=4, unique_by=lambda entry: entry.key),
    st.lists(trainings, max_size=3, unique_by=lambda entry: entry.model),
    st.dictionaries(st.text(), json_values, max_size=4),
)
def test_reading_gives_back_what_was_written(tmp_path_factory, records, others, trainings, config):
    provenance = dataclasses.replace(PROVENANCE, config=config)
    keys = {entry.key for entry in records}
    others = [entry for entry in others if entry.key not in keys]
    results = Results(provenance=provenance).add(*records, *others, *trainings)
    path = tmp_path_factory.mktemp("round") / "results.json"
    results.write(path)
    assert Results.read(path) == results
    # Strict JSON: a parser that refuses Python's extensions reads it.
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_each_kind_of_entry_has_its_list(tmp_path):
    for name, kind in KINDS.items():
        if name != "provenance":
            (entry,) = getattr(RESULTS, name)
            assert type(entry) is kind
    assert RESULTS.entries() == ENTRIES
    RESULTS.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == RESULTS


def test_cells_are_pieces_of_work_of_which_one_may_give_several_entries():
    bins = [dataclasses.replace(CONTEXT, first_context=n) for n in (1, 2)]
    offsets = [dataclasses.replace(OFFSET, offset=n) for n in (0, 1)]
    depths = [dataclasses.replace(RETRIEVAL, depth=n) for n in (0.0, 0.5)]
    results = Results(provenance=PROVENANCE).add(*bins, *offsets, *depths, skipped(), TRAINING)
    assert results.cells() == {
        ("positions", ALIBI, 256, None, None),
        ("offsets", ALIBI, 128, None, None),
        ("lines", ALIBI, 512, None, None),
        ("perplexity", Model("learned", 128, seed=0), 256, 256, "nonoverlapping"),
    }


def test_add_and_lists_in_order():
    results = Results(provenance=PROVENANCE)
    entries = [record("rotary", 256), record("alibi", 512), record("alibi", 128), skipped(), TRAINING]
    full = results.add(*entries[:2]).add(*entries[2:])
    assert results.records == ()
    assert full.methods() == ("alibi", "rotary", "learned")  # trainings come first, then cells as they were measured
    assert full.methods(64) == ()
    assert full.train_lengths() == (128,)
    assert full.valid_lengths(128) == (128, 256, 512)


@pytest.mark.parametrize("again", [*ENTRIES, record(nll=1.0), TRAINING, skipped("alibi", 128)])
def test_no_cell_twice(again):
    with pytest.raises(ValueError, match="appears twice"):
        RESULTS.add(again)


def test_one_method_at_several_seeds():
    again = [record("alibi", 128, seed=seed) for seed in (2, None)]
    results = RESULTS.add(*again, dataclasses.replace(TRAINING, model=Model("alibi", 128, seed=2)))
    assert results.models()[:2] == (ALIBI, Model("alibi", 128, seed=2))
    assert results.methods() == ("alibi", "learned")


def test_one_method_in_several_shapes(tmp_path):
    shaped = [dataclasses.replace(record("alibi", 128), model=Model("alibi", 128, 0, f"2x{n}")) for n in (64, 128)]
    results = RESULTS.add(*shaped)
    assert set(results.methods()) == {"alibi", "learned", "alibi:2x64", "alibi:2x128"}
    assert str(shaped[0].model) == "alibi:2x64 trained at 128, seed 0"
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    assert unpack_entries(pack_entries(shaped)) == shaped
    written = [entry["model"] for entry in json.loads((tmp_path / "results.json").read_text())["records"]]
    assert written[-1] == {"method": "alibi", "train_length": 128, "seed": 0, "shape": "2x128"}
    assert all("shape" not in model for model in written[:-2])


def test_failures_are_told_apart_from_what_cannot_be_done():
    failed = [dataclasses.replace(skipped("t5", n), reason="loss=nan", failed=True) for n in (128, 256)]
    results = RESULTS.add(*failed)
    assert results.failures() == {Model("t5", 128, seed=0): "loss=nan"}
    assert results.without_failures() == RESULTS
    assert RESULTS.failures() == {}


def test_other_skipped_tasks_are_no_perplexities():
    other = dataclasses.replace(skipped("alibi", 8192), task="lines")
    assert RESULTS.add(other).valid_lengths(128) == RESULTS.valid_lengths(128)


def test_the_record_of_a_training_in_a_file_of_its_own(tmp_path):
    path = tmp_path / "training.json"
    write_training(TRAINING, path)
    assert json.loads(path.read_text())["model"] == {"method": "alibi", "train_length": 128, "seed": 0}
    assert read_training(path) == TRAINING
    path.write_text(path.read_text().replace('"seed": 0', '"sead": 0'))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: unknown key 'model\.sead': did you mean seed\?"):
        read_training(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: the whole=\[\]: give a table$"):
        read_training(path)


def test_damaged_text(damage):
    for share in (0, 0.01, 0.5, 0.99):
        assert "not a JSON file" in damage(text=lambda text, share=share: text[: int(share * len(text))])
    assert "'utf-8' codec can't decode byte 0xff" in damage(text=lambda text: text.replace(b"stdlib", b"st\xffdlib"))
    assert "nested too deeply" in damage(text=lambda text: b"[" * 200_000)
    assert "no version" in damage(text=lambda text: b"[]")
    assert "no version" in damage(text=lambda text: b'{"version": true}')
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        message = damage(text=lambda text, constant=constant: text.replace(b"431.75", constant))
        assert re.fullmatch(r"records\[0\]\.nll=(nan|-?inf): give a finite number", message)
    assert "records[0].nll=inf: give a finite number" in damage(text=lambda text: text.replace(b"431.75", b"1e999"))
    assert "'seed' comes twice" in damage(text=lambda text: text.replace(b'"seed"', b'"seed": 1, "seed"'))


def test_unknown_version(damage):
    assert "version 4 is not 3" in damage(lambda document: document.update(version=4, records="elsewhere"))


@pytest.mark.parametrize("section", KINDS)
def test_missing_unknown_and_mistyped_keys(damage, section):
    def entry(document):
        return document[section] if section == "provenance" else document[section][0]

    where = section if section == "provenance" else f"{section}[0]"
    for field in dataclasses.fields(KINDS[section]):
        if field.default is field.default_factory:  # there is neither
            message = damage(lambda document, name=field.name: entry(document).pop(name))
            assert message == f"{where}.{field.name} is missing: give it"
        message = damage(lambda document, name=field.name: entry(document).update({name: [1]}))
        item = "[0]=1" if field.name == "starts" else "=[1]"  # a list is right there, of something else
        assert message.startswith(f"{where}.{field.name}{item}: give ")
    message = damage(lambda document: entry(document).update(colour=1))
    assert message.startswith(f"unknown key '{where}.colour': known are ")
    assert damage(lambda document: document.pop(section)).startswith(f"{section} is missing")
    assert damage(lambda document: document.update({section: 3})).startswith(f"{section}=3: give a ")
    assert damage(lambda document: document.update(plots=[])).startswith("unknown key 'plots'")


def test_a_damaged_model_is_named(damage):
    def change(**fields):
        return damage(lambda document: document["records"][0]["model"].update(fields))

    assert change(train_length=0).startswith("records[0].model: train_length must be positive")
    assert change(depth=1).startswith("unknown key 'records[0].model.depth'")
    message = damage(lambda document: document["training"][0].update(model="alibi"))
    assert message == "training[0].model='alibi': give a table"


def test_a_damaged_start_is_named(damage):
    def change(**fields):
        return damage(lambda document: document["provenance"]["starts"][0].update(fields))

    assert change(pid=0).startswith("provenance.starts[0]: pid must be positive")
    assert change(colour=1).startswith("unknown key 'provenance.starts[0].colour'")
    assert change(time="today").startswith("provenance.starts[0]: time must be UTC")
    message = damage(lambda document: document["provenance"].update(starts=3))
    assert message == "provenance.starts=3: give a list"


def test_contradictory_file(damage):
    derived = damage(lambda document: document["records"][0].update(perplexity=70))
    assert derived.startswith("unknown key 'records[0].perplexity'")
    message = damage(lambda document: document["retrieval"][0].update(correct=11))
    assert message.startswith("retrieval[0].depth=0.25 and 11 of 10 correct")
    assert "a cell appears twice" in damage(lambda document: document["records"].append(document["records"][0]))
    message = damage(lambda document: document["records"][0].update(valid_length=2**62))
    assert message.startswith(f"records[0].stride=128 with records[0].valid_length={2**62}: give ")


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


def test_imports_pydantic_alone():
    new = "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    loaded = [
        set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
        for code in (
            f"import sys; before = set(sys.modules); import longreach.results; {new}",
            f"import sys; before = set(sys.modules); import pydantic; pydantic.TypeAdapter; {new}",
        )
    ]
    assert loaded[0] - loaded[1] - set(sys.stdlib_module_names) == {"longreach"}


@pytest.mark.parametrize("entry", [None, "x", 3, {}, PROVENANCE, [TRAINING]])
def test_what_is_no_entry_is_not_dropped_in_silence(entry):
    with pytest.raises(ValueError, match=r"^entries of \w+: add records, as longreach\.results has them$"):
        RESULTS.add(entry)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: Results(provenance=None), "provenance=None: give "),
        (lambda: Results(provenance=PROVENANCE, records=[record()]), r"records=\[Record.*\.\.\.: give a tuple$"),
        (lambda: Results(provenance=PROVENANCE, records=(1,)), r"records\[0\]=1: give "),
        (lambda: Results(provenance=PROVENANCE, skipped=(record(),)), r"skipped\[0\]=Record"),
        (lambda: Results(provenance=PROVENANCE, version="3"), "version='3': give an integer"),
        (lambda: RESULTS.started(None), "starts=None: give a list"),
        (lambda: Results.read(None), "path of NoneType: give a path"),
        (lambda: Results.read(b"x"), "path of bytes: give a path"),
        (lambda: RESULTS.write(None), "path of NoneType: give a path"),
        (lambda: read_training(3), "path of int: give a path"),
        (lambda: write_training(TRAINING, None), "path of NoneType: give a path"),
        (lambda: merge(None), "comparisons of NoneType: give "),
        (lambda: merge([RESULTS]), "comparisons of list: give "),
        (lambda: merge({"a": None}), r"comparisons\['a'\] of NoneType: give "),
        (lambda: merge({}), "comparisons is empty: give "),
        (lambda: over_seeds(None), "values of NoneType: give a list"),
    ],
)
def test_what_is_no_results_is_named(function, said):
    with pytest.raises((TypeError, ValueError), match=f"^{said}") as raised:
        function()
    assert "\n" not in str(raised.value)


def test_without_a_model_nothing_of_it_stays_and_all_of_the_others():
    assert RESULTS.without(Model("none", 7, seed=7)) == RESULTS
    for model in RESULTS.models():
        left = RESULTS.without(model)
        assert left.models() == tuple(other for other in RESULTS.models() if other != model)
        of_others = tuple(entry for entry in (*RESULTS.training, *RESULTS.entries()) if entry.model != model)
        assert (*left.training, *left.entries()) == of_others
