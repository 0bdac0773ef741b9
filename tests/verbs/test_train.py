import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from longreach.cli import main
from longreach.data.prepare import DataConfig
from longreach.measure.plan import EvaluateConfig
from longreach.models.config import Architecture
from longreach.models.files import load_model
from longreach.results import Results
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs.compare import CompareConfig, compare
from longreach.verbs.evaluate import EvaluationConfig, evaluate_models
from longreach.verbs.start import check_held_out, starting_config
from longreach.verbs.train import train_run

EVALUATE = EvaluateConfig(tasks=("perplexity",), valid_lengths=(16,), valid_tokens=64)
CONSTANT = {"warmup_steps": 2, "final_learning_rate": 1.0}


class Interrupted(Exception):
    pass


def silent(stage, done, total, note=""):
    pass


def until(step):
    """Progress that interrupts training after a step."""

    def progress(stage, done, total, note=""):
        if stage.startswith("training ") and done == step and "tokenizer" not in stage:
            raise Interrupted

    return progress


@pytest.fixture
def text(tmp_path):
    """A folder of six documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        write(folder, number)
    return folder


def write(folder, number, word="sum"):
    lines = [
        f"document {number} line {line}: the {word} of {line} and {number} is {line + number}.\n" for line in range(20)
    ]
    (folder / f"{number:02}.txt").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def config(text, tmp_path):
    return RunConfig(
        data=DataConfig(data=str(text), vocab_size=280, valid_fraction=0.3, cache=str(tmp_path / "cache")),
        model=Architecture(num_layers=1, num_heads=2, d_model=16),
        train=TrainConfig(train_length=16, steps=6, batch_size=4, warmup_steps=2, checkpoint_every=2, device="cpu"),
    )


def test_the_output_may_be_the_cache(config, tmp_path):
    config = replace(config, data=replace(config.data, cache=str(tmp_path / "run")))
    assert train_run(config, tmp_path / "run", silent).steps == 6


def comparison(config):
    return CompareConfig(
        methods=("alibi", "none"), data=config.data, model=config.model, train=config.train, evaluate=EVALUATE
    )


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# What was read has changed


def test_training_does_not_go_on_with_another_text(config, text, tmp_path):
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "run", until(3))
    for number in range(6):
        write(text, number, "product")
    with pytest.raises(ValueError, match=r"run: it was begun with another text, tokenizer; give a new folder, or what"):
        train_run(config, tmp_path / "run", silent)
    for number in range(6):
        write(text, number)
    assert train_run(config, tmp_path / "run", silent).steps == 6


def test_a_comparison_never_has_two_tokenizers(config, text, tmp_path):
    with pytest.raises(Interrupted):
        compare(comparison(config), tmp_path / "out", until(3))  # before there are any results
    assert not (tmp_path / "out" / "results.json").exists()
    for number in range(6):
        write(text, number, "product")
    with pytest.raises(ValueError, match=r"out: it was begun with another text, tokenizer; give a new folder, or what"):
        compare(comparison(config), tmp_path / "out", silent)


def test_weights_that_a_run_started_from_must_stay(config, tmp_path):
    train_run(config, tmp_path / "first", silent)
    second = replace(starting_config(str(tmp_path / "first")), train=config.train)
    with pytest.raises(Interrupted):
        train_run(second, tmp_path / "second", until(3))
    train_run(replace(config, method="none"), tmp_path / "other", silent)
    os.replace(tmp_path / "other" / "model.safetensors", tmp_path / "first" / "model.safetensors")
    message = rf"second: it was begun with another weights of {tmp_path / 'first'}; give a new folder, or what was read"
    with pytest.raises(ValueError, match=message):
        train_run(second, tmp_path / "second", silent)


# What was trained on is not tested on


def test_documents_that_were_trained_on_are_never_scored(config, text, tmp_path):
    train_run(config, tmp_path / "run", silent)
    evaluation = EvaluationConfig(models=(str(tmp_path / "run"),), evaluate=EVALUATE)
    evaluate_models(evaluation, None, silent)
    for number in range(6, 9):
        write(text, number)
    with pytest.raises(
        ValueError, match=r"^models: the text of .*run has changed since .*: give the text as it was, or"
    ):
        evaluate_models(evaluation, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()
    (tmp_path / "new.txt").write_text("something else altogether. " * 40)
    evaluate_models(replace(evaluation, data=str(tmp_path / "new.txt")), tmp_path / "out", silent)


@pytest.mark.parametrize("by", ["text", "split_seed", "valid_fraction"])
def test_what_a_run_starts_from_has_seen_none_of_what_is_held_out(config, text, tmp_path, by):
    train_run(config, tmp_path / "first", silent)
    second = replace(starting_config(str(tmp_path / "first")), train=config.train)
    train_run(with_train(second, seed=3), tmp_path / "same", silent)
    if by == "text":
        for number in range(6, 9):
            write(text, number)
        message = (
            r"^data=.*text' has changed since start_from=.*first' was trained on it.*: give it as it was, or text of"
        )
    elif by == "split_seed":
        second = replace(second, data=replace(second.data, split_seed=3))
        message = r"^split_seed=3: start_from=.*first' was trained on the same text with 0 and saw .*: give 0, or text"
    else:
        second = replace(second, data=replace(second.data, valid_fraction=0.5))
        message = r"^valid_fraction=0\.5: start_from=.*first' was trained on the same text with 0\.3 and saw"
    with pytest.raises(ValueError, match=message):
        train_run(second, tmp_path / "second", silent)
    assert not (tmp_path / "second").exists()
    (tmp_path / "new.txt").write_text("something else altogether. " * 40)
    second = replace(second, data=replace(second.data, valid_data=str(tmp_path / "new.txt")))
    assert train_run(second, tmp_path / "second", silent).steps == 6


def test_the_default_text_of_another_python_is_named_as_such(tmp_path, monkeypatch):
    (tmp_path / "config.toml").touch()
    monkeypatch.setattr("longreach.verbs.start.read_file", lambda kind, path: kind())
    monkeypatch.setattr("longreach.verbs.start.begun_with", lambda folder: {"text": "another"})
    prepared = SimpleNamespace(split_off=True, corpus_hash="this")
    with pytest.raises(ValueError, match=r"^the default text, of this Python's own library, has changed since"):
        check_held_out(RunConfig(start_from=str(tmp_path)), prepared)


# What does not change results


def test_a_device_that_is_refused_blocks_nothing(config, tmp_path):
    for verb, kind in ((train_run, config), (compare, comparison(config))):
        with pytest.raises(ValueError, match=r"^device='cuda:77' is not to be had here"):
            verb(with_train(kind, device="cuda:77"), tmp_path / "run", silent)
        assert not (tmp_path / "run").exists()


def test_cache_device_and_checkpoints_may_differ_and_every_start_is_noted(config, tmp_path, monkeypatch):
    whole = train_run(config, tmp_path / "whole", silent)
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "run", until(3))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    later = with_train(config, device="cpu:0", checkpoint_every=5)
    later = replace(later, data=replace(later.data, cache=str(tmp_path / "elsewhere")))
    assert train_run(later, tmp_path / "run", silent).final_loss == whole.final_loss
    first, second = tomllib.loads((tmp_path / "run" / "folder.toml").read_text())["starts"]
    assert second["torch"] == "9.9.9" != first["torch"]
    assert (first["device"], second["device"]) == ("cpu", "cpu:0")
    assert second["options"]["cache"] == str(tmp_path / "elsewhere")


def test_results_say_all_the_starts_that_they_came_from(config, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        compare(comparison(config), tmp_path / "out", until(3))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    results = compare(comparison(config), tmp_path / "out", silent)
    first, second = results.provenance.starts
    assert first.torch != second.torch == "9.9.9"
    assert first.num_threads != second.num_threads == 7
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"cpu, {first.num_threads} threads; then cpu, 7 threads" in page
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert (
        compare(comparison(config), tmp_path / "out", silent)
        == results
        == Results.read(tmp_path / "out" / "results.json")
    )
    assert (tmp_path / "out" / "results.json").read_bytes() == before  # a start with nothing to do adds nothing


# What is tracked


def test_what_is_tracked_is_what_the_lines_of_metrics_have(config, tmp_path, events):
    config = with_train(config, track=("tensorboard",), sample_every=2, validate_every=3, peak_flops=1e12)
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "run", until(3))  # goes on after step 2
    train_run(config, tmp_path / "run", silent)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scalars, texts = events(tmp_path / "run")
    for name in lines[-1].keys() - {"step", "sample"}:
        expected = {line["step"]: pytest.approx(line[name]) for line in lines if name in line}
        assert scalars[f"training/{name}"] == expected, name
    assert texts["training/sample"] == {line["step"]: line["sample"] for line in lines if "sample" in line}
    assert list(texts["training/sample"]) == [2, 4, 6]
    assert 'method = "alibi"' in texts["configuration"][1]
    assert all(line["utilisation"] == line["flops_per_second"] / 1e12 for line in lines)


def test_what_is_measured_at_the_end_is_tracked_too(config, tmp_path, events):
    tracked = replace(comparison(with_train(config, track=("tensorboard",))), methods=("alibi",))
    (record,) = compare(tracked, tmp_path / "out", silent).records
    scalars, _ = events(tmp_path / "out" / "alibi")
    assert scalars["perplexity/16/16/nonoverlapping"] == {6: pytest.approx(record.perplexity)}
    evaluation = EvaluationConfig(models=(str(tmp_path / "out" / "alibi"),), evaluate=EVALUATE, track=("tensorboard",))
    with pytest.raises(ValueError, match=r"^track=tensorboard: it goes on in the folder of output: give that too"):
        evaluate_models(evaluation, None, silent)
    for _ in range(2):  # the second time there is nothing left to show
        evaluate_models(evaluation, tmp_path / "evaluation", silent)
    scalars, _ = events(tmp_path / "evaluation")
    assert scalars == {f"{record.model}/perplexity/16/16/nonoverlapping": {0: pytest.approx(record.perplexity)}}
    assert len(list((tmp_path / "evaluation").glob("events.*"))) == 1


# Longer runs


@pytest.mark.parametrize("stop_after", [None, 1, 5])
def test_a_run_at_a_constant_rate_is_made_longer(config, tmp_path, stop_after):
    config = with_train(config, **CONSTANT)
    whole = train_run(with_train(config, steps=11), tmp_path / "whole", silent)
    if stop_after is None:
        train_run(config, tmp_path / "run", silent)
    else:
        with pytest.raises(Interrupted):
            train_run(config, tmp_path / "run", until(stop_after))
    with pytest.raises(Interrupted):
        train_run(with_train(config, steps=11), tmp_path / "run", until(9))
    record = train_run(with_train(config, steps=11), tmp_path / "run", silent)
    assert (record.steps, record.tokens, record.final_loss) == (11, whole.tokens, whole.final_loss)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    one, other = (load_model(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"^steps=6: output=.*run was begun with steps=11: give as many, or a new"):
        train_run(config, tmp_path / "run", silent)


def test_a_run_in_its_warm_up_is_made_longer(config, tmp_path):
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "run", until(3))  # its checkpoint is that of step 2, the last of the warm-up
    train_run(with_train(config, steps=9), tmp_path / "run", silent)
    train_run(with_train(config, steps=9), tmp_path / "whole", silent)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("stop_after", "first"), [(None, ""), (5, "finish it with steps=6, then ")])
def test_a_run_whose_rate_falls_to_its_end_says_how_to_go_on(config, tmp_path, stop_after, first):
    if stop_after is None:
        train_run(config, tmp_path / "run", silent)
    else:
        with pytest.raises(Interrupted):
            train_run(config, tmp_path / "run", until(stop_after))
    run = tmp_path / "run"
    message = rf"^steps=9: output={run} was begun with steps=6 .*: {first}go on from it .* \(--from {run}\)$"
    with pytest.raises(ValueError, match=message):
        train_run(with_train(config, steps=9), run, silent)
    train_run(config, run, silent)
    assert train_run(replace(starting_config(str(run)), train=config.train), tmp_path / "next", silent).steps == 6


def test_a_run_with_a_curriculum_is_not_made_longer(config, tmp_path):
    length = config.train.train_length
    config = with_train(config, **CONSTANT, curriculum=(f"{length // 2}:50%", f"{length}:50%"))
    train_run(config, tmp_path / "run", silent)
    with pytest.raises(ValueError, match=r"^steps=9: .* and a curriculum of shares of them, so that a longer run is"):
        train_run(with_train(config, steps=9), tmp_path / "run", silent)


def test_a_finished_run_without_its_checkpoint_says_how_to_go_on(config, tmp_path):
    config = with_train(config, **CONSTANT)
    train_run(config, tmp_path / "run", silent)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    with pytest.raises(ValueError, match=r"^steps=9: .* its checkpoint is gone: go on from it into a new folder"):
        train_run(with_train(config, steps=9), tmp_path / "run", silent)


# Two processes


def command(verb, config, output):
    """The command line of a long training."""
    start = "import torch; torch.set_num_threads(1); from longreach.cli import main; main()"
    words = [sys.executable, "-c", start, verb, "--output", str(output)]
    words += ["--data", config.data.data, "--cache", config.data.cache, "--device", "cpu", "--steps", "1000000"]
    words += ["--vocab-size", "280", "--valid-fraction", "0.3", "--num-layers", "1", "--num-heads", "2"]
    words += ["--d-model", "16", "--train-length", "16", "--batch-size", "4"]
    return [*words, "--methods" if verb == "compare" else "--method", "none"]


def test_a_second_process_is_refused_at_once_and_leaves_the_first_alone(config, tmp_path, capsys):
    output, run = tmp_path / "out", tmp_path / "out" / "none"
    with subprocess.Popen(command("compare", config, output), stderr=subprocess.PIPE, text=True) as first:
        try:
            while first.poll() is None and not (run / "metrics.jsonl").exists():
                time.sleep(0.01)
            for verb, folder in (("compare", output), ("train", run)):
                with pytest.raises(SystemExit, match="2"):
                    main(command(verb, config, folder)[3:])
                holder = f"process {first.pid} on {socket.gethostname()}"
                mend = "wait until that has ended, or give another folder"
                said = capsys.readouterr().err.splitlines()[-1]
                assert said == f"longreach {verb}: --output={folder}: it is in use by {holder}, {mend}"
        finally:
            first.send_signal(signal.SIGKILL)
    *whole, _ = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in whole] == list(range(1, len(whole) + 1))
