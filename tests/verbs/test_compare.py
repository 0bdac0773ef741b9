import json
import os
import shutil
import signal
import sys
import warnings
from dataclasses import replace

import pytest

from longreach.cli import main
from longreach.data.prepare import DataConfig
from longreach.measure.plan import EvaluateConfig
from longreach.models.config import Architecture
from longreach.reading import read_file
from longreach.results import Model, Results, TrainingRecord
from longreach.train.config import RunConfig, TrainConfig
from longreach.train.loop import read_training_record
from longreach.verbs.compare import CompareConfig, compare, run_name
from longreach.verbs.evaluate import measure
from longreach.verbs.train import train_run

pytestmark = pytest.mark.usefixtures("unrendered")


def silent(stage, done, total, note=""):
    pass


@pytest.fixture
def config(corpus, tmp_path):
    return CompareConfig(
        methods=("alibi", "rotary:base=500", "learned"),
        data=DataConfig(data=str(corpus), vocab_size=300, valid_fraction=0.2, cache=str(tmp_path / "cache")),
        model=Architecture(num_layers=1, num_heads=2, d_model=16),
        train=TrainConfig(train_length=16, steps=6, batch_size=4, warmup_steps=2, checkpoint_every=2, device="cpu"),
        evaluate=EvaluateConfig(valid_lengths=(16, 64), valid_tokens=256),
    )


def timeless(results):
    """All that two runs must agree on: everything but the time they took and the memory they found."""
    return (
        [replace(r, seconds=1.0, peak_memory=None) for r in results.training],
        [replace(r, seconds=1.0, peak_memory=None) for r in results.records],
        list(results.skipped),
        replace(results.provenance, starts=(replace(results.provenance.starts[0], time="2026-01-01T00:00:00+00:00"),)),
    )


def test_everything_a_user_gets(config, tmp_path):
    output = tmp_path / "out"
    results = compare(config, output, silent)
    assert results == Results.read(output / "results.json")
    assert [training.method for training in results.training] == list(config.methods)
    assert [(r.method, r.valid_length) for r in results.records] == [
        ("alibi", 16),
        ("alibi", 64),
        ("rotary:base=500", 16),
        ("rotary:base=500", 64),
        ("learned", 16),
    ]
    reason = "its table holds 16 positions"
    assert [(s.task, s.method, s.valid_length, s.reason) for s in results.skipped] == [
        (task, "learned", 64, reason) for task in ("perplexity", "positions", "decomposition")
    ]
    assert [(d.method, d.valid_length) for d in results.decompositions] == [("alibi", 64), ("rotary:base=500", 64)]
    assert {record.tokens for record in results.records} == {256}
    assert len({record.bytes for record in results.records}) == 1
    for method in config.methods:
        names = {path.name for path in (output / run_name(method)).iterdir()}
        assert names >= {"config.toml", "metrics.jsonl", "model.safetensors", "config.json", "tokenizer.json"}
    figures = {path.suffix for path in (output / "figures").iterdir()}
    assert figures == {".svg", ".png"}
    assert "rotary:base=500" in (output / "report.html").read_text(encoding="utf-8")


def test_models_are_trained_on_packed_documents_by_a_curriculum_and_called_by_its_longest(config, tmp_path):
    train = replace(config.train, packing="documents", curriculum=("8:50%", "16:50%"))
    results = compare(replace(config, train=train, methods=("alibi",)), tmp_path / "out", silent)
    (training,) = results.training
    assert (training.model.train_length, training.steps) == (16, config.train.steps)
    assert 0 < training.tokens <= config.train.steps * config.train.batch_size * 16
    assert training.cut_documents > 0
    assert results.provenance.config["train"]["curriculum"] == ["8:50%", "16:50%"]
    assert results == Results.read(tmp_path / "out" / "results.json")


def test_bytes_are_those_of_the_scored_text(config, tmp_path):
    from longreach.data.prepare import prepare

    record = compare(replace(config, methods=("none",)), tmp_path / "out", silent).records[0]
    prepared = prepare(config.data, config.train.seed)
    tokens = prepared.valid.read(0, 257)
    text = prepared.tokenizer.decode([token for token in tokens[1:] if token != prepared.tokenizer.eos_id])
    assert record.bytes == len(text.encode())


def test_methods_see_identical_batches_and_start_alike(config, tmp_path):
    # None of these adds to the embeddings, so the first loss tells whether batch and initial weights are the same.
    compare(replace(config, methods=("none", "rotary", "rotary:base=500")), tmp_path / "out", silent)
    first = {
        folder: json.loads((tmp_path / "out" / folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for folder in ("none", "rotary", "rotary_base=500")
    }
    # At the start attention is nearly uniform whatever the rotation, so the losses agree far beyond the spread
    # between batches or initial weights, about 0.05.
    assert first["rotary"] == pytest.approx(first["none"], abs=2e-3)
    assert first["rotary_base=500"] == pytest.approx(first["none"], abs=2e-3)


def test_same_seed_same_numbers_and_another_seed_others(config, tmp_path):
    first = compare(config, tmp_path / "first", silent)
    assert timeless(compare(config, tmp_path / "second", silent)) == timeless(first)
    other = compare(replace(config, train=replace(config.train, seed=1)), tmp_path / "third", silent)
    assert other.training[0].final_loss != first.training[0].final_loss


def test_each_model_is_told_of_as_soon_as_it_is_measured(config, tmp_path):
    stages, told = [], []

    def note(results, model):
        lengths = [record.valid_length for record in results.records if record.model == model]
        told.append((model.method, lengths, f"training {config.methods[-1]}" in stages))

    compare(config, tmp_path / "out", lambda stage, *_: stages.append(stage), note)
    assert told == [("alibi", [16, 64], False), ("rotary:base=500", [16, 64], False), ("learned", [16], True)]


def test_run_again_skips_what_is_finished(config, tmp_path):
    first = compare(config, tmp_path / "out", silent)
    stages = []
    assert compare(config, tmp_path / "out", lambda stage, *_: stages.append(stage)) == first
    assert not [stage for stage in stages if stage.startswith(("training ", "testing "))]


def test_another_configuration_is_refused(config, tmp_path):
    compare(replace(config, methods=("none",)), tmp_path / "out", silent)
    with pytest.raises(ValueError, match=r"was begun with methods=none; give a new folder"):
        compare(replace(config, methods=("alibi",)), tmp_path / "out", silent)


def test_changed_data_is_refused(config, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text(f"some words of document {number}. " * 100)
    config = replace(config, methods=("none",), data=replace(config.data, data=str(text), valid_fraction=0.3))
    compare(config, tmp_path / "out", silent)
    (text / "0.txt").write_text("other words. " * 200)
    with pytest.raises(ValueError, match=r"out: it was begun with another text; give .*, or what was read then$"):
        compare(config, tmp_path / "out", silent)


def test_too_little_text_for_the_longest_length(config, tmp_path):
    config = replace(config, evaluate=EvaluateConfig(valid_lengths=(16, 10**6)))
    with pytest.raises(ValueError, match=r"^valid_lengths=1000000: the validation text has \d+ tokens"):
        compare(config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_damaged_results_are_named(config, tmp_path):
    compare(replace(config, methods=("none",)), tmp_path / "out", silent)
    (tmp_path / "out" / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json"):
        compare(replace(config, methods=("none",)), tmp_path / "out", silent)


@pytest.mark.parametrize(
    ("methods", "message"), [((), "methods is empty"), (("alibi", "alibi"), "methods=alibi,alibi: give each once")]
)
def test_methods_that_make_no_comparison(methods, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(methods=methods)


def test_several_training_lengths_make_a_grid(config, tmp_path):
    config = replace(
        config, methods=("alibi", "learned"), train_lengths=(16, 32), evaluate=EvaluateConfig(valid_tokens=256)
    )
    results = compare(config, tmp_path / "out", silent)
    assert results.train_lengths() == (16, 32)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {
        *("alibi-16", "alibi-32", "learned-16", "learned-32"),
        "figures",
    }
    for train_length in (16, 32):
        assert results.valid_lengths(train_length) == tuple(train_length * 2**k for k in range(5))
    by_length = {training.train_length: training for training in results.training if training.method == "alibi"}
    assert by_length[16].tokens == by_length[32].tokens  # as many tokens in a batch
    assert {record.tokens for record in results.records} == {512}
    assert compare(config, tmp_path / "out", silent) == results


def test_several_seeds_differ_in_weights_and_batches_alone(config, tmp_path):
    config = replace(config, methods=("none", "rotary"), seeds=(0, 1))
    results = compare(config, tmp_path / "out", silent)
    names = ["none-seed0", "none-seed1", "rotary-seed0", "rotary-seed1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["figures", *names]
    runs = {name: read_file(RunConfig, tmp_path / "out" / name / "config.toml") for name in names}
    assert {run.data.split_seed for run in runs.values()} == {0}
    assert [run.train.seed for run in runs.values()] == [0, 1, 0, 1]
    tokenizers = {(tmp_path / "out" / name / "tokenizer.json").read_bytes() for name in names}
    assert len(tokenizers) == 1
    assert results.models() == tuple(Model(m, 16, seed) for seed in (0, 1) for m in ("none", "rotary"))
    records = [r for r in results.records if (r.method, r.valid_length) == ("none", 64)]
    assert len({(record.tokens, record.bytes) for record in records}) == 1
    assert len({record.nll for record in records}) == 2
    # At the start attention is nearly uniform: the first loss tells whether batch and initial weights are the same.
    first = {
        name: json.loads((tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in names
    }
    for seed in (0, 1):
        assert first[f"rotary-seed{seed}"] == pytest.approx(first[f"none-seed{seed}"], abs=2e-3)
    assert abs(first["none-seed0"] - first["none-seed1"]) > 1e-2
    assert compare(config, tmp_path / "out", silent) == results


def test_a_seed_among_several_gives_the_numbers_that_it_gives_alone(config, tmp_path):
    config = replace(config, methods=("alibi",))
    alone = compare(config, tmp_path / "alone", silent)
    several = compare(replace(config, seeds=(4, 0)), tmp_path / "several", silent)
    assert [r.nll for r in several.records if r.seed == 0] == [r.nll for r in alone.records]
    other = compare(replace(config, seeds=(4,)), tmp_path / "other", silent)  # the split stays that of seed 0
    assert (tmp_path / "other" / "alibi").is_dir()
    assert [r.nll for r in several.records if r.seed == 4] == [r.nll for r in other.records]


def test_several_shapes_stand_in_one_file(config, tmp_path):
    config = replace(config, methods=("alibi", "sinusoidal"), shapes=("1x16", "2x24"))
    results = compare(config, tmp_path / "out", silent)
    names = [f"{method}-{shape}" for method in ("alibi", "sinusoidal") for shape in ("1x16", "2x24")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == sorted([*names, "figures"])
    shapes = {name: read_file(RunConfig, tmp_path / "out" / name / "config.toml").model for name in names}
    assert {(name[-4:], model.num_layers, model.d_model, model.num_heads) for name, model in shapes.items()} == {
        ("1x16", 1, 16, 2),
        ("2x24", 2, 24, 2),
    }
    models = tuple(Model(m, 16, 0, shape) for shape in ("1x16", "2x24") for m in ("alibi", "sinusoidal"))
    assert results.models() == models
    assert tuple(entry.model for entry in results.training) == models
    assert results.methods() == ("alibi:1x16", "sinusoidal:1x16", "alibi:2x24", "sinusoidal:2x24")
    assert compare(config, tmp_path / "out", silent) == results
    assert Results.read(tmp_path / "out" / "results.json") == results
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in results.methods())
    alone = compare(replace(config, shapes=("2x24",)), tmp_path / "alone", silent)
    assert alone.models() == tuple(Model(m, 16, 0) for m in ("alibi", "sinusoidal"))  # as where no shapes are given
    assert [r.nll for r in alone.records] == [r.nll for r in results.records if r.model.shape == "2x24"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (("1x16", "2x24", "1x16"), "shapes=1x16,2x24,1x16: give each once"),
        (("2",), "shapes='2': give layers x width, as in 2x128"),
        (("0x16",), "shapes='0x16': give layers x width"),
        (("2x16x4",), "shapes='2x16x4': give layers x width"),
        (("2x17",), "shapes='2x17': num_heads=2 does not divide d_model=17: change one of them"),
    ],
)
def test_shapes_that_make_no_comparison(config, shapes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(config, shapes=shapes)


def test_seeds_that_make_no_comparison(config):
    with pytest.raises(ValueError, match=r"^seeds=1,2,1: give each once"):
        replace(config, seeds=(1, 2, 1))
    with pytest.raises(ValueError, match=r"^seeds=-1: give at least 0"):
        replace(config, seeds=(0, -1))


@pytest.mark.parametrize("error", [FloatingPointError("step 3: loss=nan; stopped"), RuntimeError("no kernel\nfor it")])
def test_a_model_that_fails_leaves_the_others_and_is_tried_again(config, tmp_path, monkeypatch, error):
    config = replace(config, methods=("none", "rotary"), seeds=(0, 1))
    whole = compare(config, tmp_path / "whole", silent)

    def failing(run, *arguments):
        if run.identity == failed:
            raise error
        return train_run(run, *arguments)

    failed = Model("none", 16, seed=1)
    monkeypatch.setattr("longreach.verbs.compare.train_run", failing)
    results = compare(config, tmp_path / "out", silent)
    reason = str(error).splitlines()[0]
    assert results.failures() == {failed: reason}
    assert results == Results.read(tmp_path / "out" / "results.json")
    assert [entry.model for entry in results.training] == [m for m in whole.models() if m != failed]
    assert {(e.task, e.valid_length) for e in results.skipped} == {
        *(("perplexity", 16), ("perplexity", 64), ("positions", 16), ("positions", 64), ("decomposition", 64)),
    }
    assert results.cells() == whole.cells()
    assert reason in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    monkeypatch.undo()
    again = compare(config, tmp_path / "out", silent)
    assert not again.failures()
    assert {r.key: r.nll for r in again.records} == {r.key: r.nll for r in whole.records}


def test_a_failure_of_measuring_keeps_what_was_measured(config, tmp_path, monkeypatch):
    config = replace(config, methods=("none", "rotary"))

    def failing(subject, *arguments):
        for number, results in enumerate(measure(subject, *arguments)):
            if subject.name == "none" and number == 1:
                raise RuntimeError("the device is gone")
            yield results

    monkeypatch.setattr("longreach.verbs.compare.measure", failing)
    results = compare(config, tmp_path / "out", silent)
    assert results.failures() == {Model("none", 16, seed=0): "the device is gone"}
    assert [(r.method, r.valid_length) for r in results.records] == [("none", 16), ("rotary", 16), ("rotary", 64)]
    assert [entry.method for entry in results.training] == ["none", "rotary"]


@pytest.mark.parametrize("missing", [False, True], ids=["finished", "with a length to measure"])
def test_a_run_whose_folder_was_deleted_is_trained_and_measured_anew(config, tmp_path, missing):
    config = replace(config, methods=("none", "rotary"))
    output = tmp_path / "out"
    before = compare(config, output, silent)
    kept = before
    if missing:
        kept = replace(before, records=before.records[1:])
        kept.write(output / "results.json")
    shutil.rmtree(output / "none")
    stages = []
    results = compare(config, output, lambda stage, *_: stages.append(stage))
    assert not results.failures()
    (dropping,) = (stage for stage in dict.fromkeys(stages) if stage.startswith("dropping"))
    assert dropping == "dropping what was measured of none trained at 16, seed 0, whose training is gone"
    assert not [stage for stage in stages if stage.startswith("testing rotary")]
    assert results == Results.read(output / "results.json")
    now, then = ({entry.key: entry for entry in (*of.training, *of.entries())} for of in (results, before))
    assert now.keys() == then.keys()
    assert all(now[key] == then[key] for key in then if then[key].method == "rotary")
    timed = [entry.key for entry in (*before.training, *before.records) if entry.method == "none"]
    assert all(now[key].seconds != then[key].seconds for key in timed)
    (training,) = (entry for entry in results.training if entry.method == "none")
    assert training == read_training_record(output / "none" / "training.json")
    assert compare(config, output, silent) == results


def test_of_a_run_whose_folder_was_deleted_and_that_fails_nothing_stays(config, tmp_path, monkeypatch):
    config = replace(config, methods=("none",))
    compare(config, tmp_path / "out", silent)
    shutil.rmtree(tmp_path / "out" / "none")

    def failing(*arguments):
        raise FloatingPointError("step 3: loss=nan")

    monkeypatch.setattr("longreach.verbs.compare.train_run", failing)
    results = compare(config, tmp_path / "out", silent)
    assert results.failures() == {Model("none", 16, seed=0): "step 3: loss=nan"}
    assert not (*results.training, *results.records)
    assert results == Results.read(tmp_path / "out" / "results.json")


def test_a_mistake_in_the_books_is_no_failure_of_a_model(config, tmp_path, monkeypatch):
    def refusing(results, *entries, add=Results.add):
        if any(isinstance(entry, TrainingRecord) for entry in entries):
            raise ValueError("appears twice")
        return add(results, *entries)

    monkeypatch.setattr(Results, "add", refusing)
    with pytest.raises(ValueError, match=r"^appears twice$"):
        compare(replace(config, methods=("none",)), tmp_path / "out", silent)


def test_an_interrupt_is_no_failure_of_a_model(config, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("longreach.verbs.compare.train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "out", silent)
    assert not (tmp_path / "out" / "results.json").exists()


def test_too_little_text_to_train_on_is_refused_before_anything_is_written(config, tmp_path):
    config = replace(config, train_lengths=(16, 2**20), train=replace(config.train, batch_size=2**16))
    config = replace(config, evaluate=replace(config.evaluate, tasks=("perplexity",)))
    with pytest.raises(ValueError, match=r"^train_lengths=1048576 needs 1048577 tokens, the training text has \d+"):
        compare(config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((16, 24), "train_lengths=24: it does not divide the 64 tokens of a batch"),
        ((0,), "train_lengths=0"),
        ((16, 16), "train_lengths=16,16: give each once"),
    ],
)
def test_training_lengths_that_do_not_fit_are_refused(config, lengths, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(config, train_lengths=lengths)


def test_a_curriculum_is_of_one_training_length(config):
    train = replace(config.train, curriculum=("8:50%", "16:50%"))
    message = r"^curriculum=8:50%,16:50%: it is for one training length, .*, and train_lengths=16,32: leave one of them"
    with pytest.raises(ValueError, match=message):
        replace(config, train=train, train_lengths=(16, 32))
    assert len(replace(config, train=train, train_lengths=(16,)).runs()) == len(config.methods)
    with pytest.raises(ValueError, match=r"^curriculum=8:50%,16:50%: its longest is 16 and train_lengths=32: give the"):
        replace(config, train=train, train_lengths=(32,))


def test_every_task_that_needs_no_file(config, tmp_path):
    asked = EvaluateConfig(
        tasks=("perplexity", "positions", "probes", "retrieval"),
        valid_lengths=(16, 64),
        valid_tokens=256,
        strides=(8,),
        protocols=("nonoverlapping", "cached"),
        cases_per_depth=1,
        num_depths=2,
    )
    config = replace(config, methods=("alibi", "sinusoidal"), evaluate=asked)
    results = compare(config, tmp_path / "out", silent)
    assert {entry.task for entry in results.entries()} == {
        *("perplexity", "positions", "decomposition", "offsets", "retrieval"),
    }
    assert results == Results.read(tmp_path / "out" / "results.json")
    assert (tmp_path / "out" / "report.html").exists()


def stopped_at_a_write(words, stop, write, errors):
    """The exit status of the command line, which sends itself a signal when it is about to give the n-th file its name.

    A process of its own, forked, so that nothing is loaded again. What it says as an error goes to a file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where pytest-xdist has threads
        process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status, replace_file, left = 99, os.replace, write

    def stopping(*paths):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), stop)
        return replace_file(*paths)

    try:
        # Shells start what runs in the background with SIGINT ignored, which processes hand down.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.replace = stopping
        sys.stdout = sys.stderr = errors.open("w")
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def test_killed_at_any_write_it_goes_on_to_the_same_numbers(config, tmp_path):
    config = replace(config, train=replace(config.train, steps=60, checkpoint_every=7))
    whole = compare(config, tmp_path / "whole", silent)
    words = ["compare", "--output", str(tmp_path / "parts"), "--data", config.data.data]
    words += ["--cache", config.data.cache, "--vocab-size", "300", "--valid-fraction", "0.2"]
    words += ["--methods", ",".join(config.methods), "--num-layers", "1", "--num-heads", "2", "--d-model", "16"]
    words += ["--train-length", "16", "--steps", "60", "--batch-size", "4", "--warmup-steps", "2"]
    words += ["--checkpoint-every", "7", "--device", "cpu", "--valid-lengths", "16,64", "--valid-tokens", "256"]
    for stop, write, status in (
        (signal.SIGKILL, 1, -signal.SIGKILL),
        (signal.SIGINT, 6, 130),
        (signal.SIGKILL, 9, -signal.SIGKILL),
        (signal.SIGINT, 17, 130),
        (signal.SIGKILL, 0, 0),  # never
    ):
        errors = tmp_path / "errors"
        assert stopped_at_a_write(words, stop, write, errors) == status, errors.read_text()
        if status == 130:
            assert errors.read_text().endswith("interrupted; run the same command again to go on\n")
    assert timeless(Results.read(tmp_path / "parts" / "results.json"))[1:3] == timeless(whole)[1:3]
    assert [t.final_loss for t in Results.read(tmp_path / "parts" / "results.json").training] == [
        t.final_loss for t in whole.training
    ]
    assert os.path.exists(tmp_path / "parts" / "report.html")
