import os
import sys
from functools import partial

import pytest
from harness_task import write_task
from lm_eval import tasks
from lm_eval.api.registry import model_registry
from lm_eval.config import evaluate_config

from longreach.data.prepare import DataConfig
from longreach.models.config import Architecture
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs import harness
from longreach.verbs.train import train_run


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A trained run, whose device is the CPU, and beside it the task `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    config = RunConfig(
        data=DataConfig(data=str(corpus), vocab_size=300, valid_fraction=0.2, cache=str(folder / "cache")),
        model=Architecture(num_layers=1, num_heads=2, d_model=16),
        train=TrainConfig(train_length=16, steps=1, batch_size=4, warmup_steps=1, device="cpu"),
    )
    train_run(config, folder / "run", lambda *stage, **note: None)
    write_task(folder, ["a text of some words"])
    return folder / "run"


@pytest.fixture
def type_words(run, monkeypatch):
    """Runs the harness's command line on the task, and leaves the process as it was."""

    def type_words(*words):
        command = ("harness", "--model", "longreach", "--tasks", "tiny", "--include_path", str(run.parent), *words)
        monkeypatch.setattr("sys.argv", list(command))
        harness.main()

    monkeypatch.setattr(evaluate_config, "EvaluatorConfig", evaluate_config.EvaluatorConfig)
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))  # thousands of files
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM", "true"))
    monkeypatch.setattr("longreach.verbs.harness.set_up", lambda: None)
    yield type_words
    model_registry._objs.pop("longreach", None)


@pytest.mark.parametrize(
    ("words", "device"),
    [((), None), (("--device", "cpu"), "cpu")],
    ids=["not typed", "typed"],
)
def test_a_device_that_is_not_typed_is_that_of_the_run(run, type_words, monkeypatch, capsys, words, device):
    given = []

    def open_subject(run, device=None):
        given.append(device)
        return opened(run, device)

    opened = harness.open_subject
    monkeypatch.setattr(harness, "open_subject", open_subject)
    type_words("--model_args", f"run={run},max_length=16", *words)
    assert given == [device]
    assert "byte_perplexity" in capsys.readouterr().out


def test_the_device_may_stand_among_the_arguments_of_the_model(run, type_words, capsys):
    type_words("--model_args", f"run={run},device=cpu")
    assert "byte_perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("run=nowhere",), "nowhere is not there: give the folder of a trained run"),
        (("run={run},max_length=0",), "max_length=0: give a positive integer"),
        (("run={run}", "--batch_size", "auto"), "batch_size='auto': give a positive integer"),
        (("run={run}", "--device", "tpu9"), "device='tpu9' is "),
        (
            ("max_length=16",),
            "model_args: missing a required argument: 'run'; beside options of the harness it has run, ",
        ),
    ],
    ids=str,
)
def test_errors_of_ours_are_one_line(run, type_words, capsys, words, line):
    with pytest.raises(SystemExit) as end:
        type_words("--model_args", *(word.format(run=run) for word in words))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"longreach.verbs.harness: {line}")
    assert "Traceback" not in said


def test_without_the_harness_the_extra_is_named_in_one_line(type_words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "longreach.measure.lm_eval", None)
    with pytest.raises(SystemExit) as end:
        type_words()
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
