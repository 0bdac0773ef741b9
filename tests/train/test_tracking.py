"""Trackers: TensorBoard itself; the two services as far as their interface goes, which has no account here."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from longreach.cli import main
from longreach.results import Model, Record, Skipped
from longreach.train import tracking
from longreach.train.tracking import Tracked, Tracking, check_trackers, evaluated

CONFIG = {"method": "alibi", "train": {"steps": 8}}


class Interrupted(Exception):
    pass


class Service(ModuleType):
    """What trackio and wandb have in common: `init` gives a run, which logs and is finished."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options):
        print("* a service speaks")
        self.begun.append(options)
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        print("* a service speaks")
        self.finished += 1


@pytest.fixture(params=["trackio", "wandb"])
def service(request, monkeypatch):
    module = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def tracked(folder):
    return Tracked(folder, "0123abcd", CONFIG)


def follow(names, folder, steps, interrupt=False):
    with Tracking(names, tracked(folder)) as track:
        for step in steps:
            track(step, {"training/loss": 1 / step, "training/sample": f"text {step}"})
        if interrupt:
            raise Interrupted


def test_tensorboard_shows_each_step_once_after_an_interruption(tmp_path, events):
    with pytest.raises(Interrupted):
        follow(["tensorboard"], tmp_path, range(1, 6), interrupt=True)
    follow(["tensorboard"], tmp_path, range(4, 9))
    scalars, texts = events(tmp_path)
    assert scalars == {"training/loss": {step: pytest.approx(1 / step) for step in range(1, 9)}}
    assert texts["training/sample"] == {step: f"text {step}" for step in range(1, 9)}
    assert 'method = "alibi"\n\n[train]\nsteps = 8\n' in texts["configuration"][1]


def test_a_service_goes_on_with_its_run(tmp_path, service, capsys):
    for steps in (range(1, 6), range(4, 9)):
        follow([service.__name__], tmp_path / "run", steps)
    first, second = service.begun
    assert first == second
    assert (first["name"], first["resume"], first["config"]) == ("run-0123abcd", "allow", CONFIG)
    assert first["project"] == "longreach"
    if service.__name__ == "wandb":
        assert (first["id"], first["dir"]) == ("0123abcd", str(tmp_path / "run"))
    assert [step for step, _ in service.logged] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert service.logged[0][1] == {"training/loss": 1.0, "training/sample": "text 1"}
    assert service.finished == 2
    assert capsys.readouterr().out == ""  # what a command prints is its own


def test_a_run_is_finished_whatever_ends_it_and_none_begins_without_figures(tmp_path, service):
    with pytest.raises(Interrupted):
        follow([service.__name__], tmp_path, [1], interrupt=True)
    assert service.finished == 1
    follow([service.__name__], tmp_path, [])
    assert len(service.begun) == service.finished == 1


def test_what_a_service_refuses_is_one_line_with_the_mend(tmp_path, service):
    def refuse(**options):
        raise RuntimeError("no API key configured\nlog in first")

    service.init = refuse
    name = service.__name__
    mend = f"log in, set {name.upper()}_MODE=offline, or leave it out"
    with pytest.raises(ValueError, match=rf"^track={name} cannot be begun \(no API key configured\): {mend}$"):
        follow([name], tmp_path, [1])


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, name):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"^track={name} needs the package {name}: pip install 'longreach\[{name}\]'$"
    ):
        check_trackers([name])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--track", "mlflow"], "--track='mlflow': give 'tensorboard', 'trackio' or 'wandb'"),
        (["--track", "wandb,wandb"], "--track=wandb,wandb: give each once"),
        (["--sample-every", "0"], "--sample-every=0: give a positive integer"),
        (["--peak-flops", "0"], "--peak-flops=0.0: give a number from 1 to 1e30"),
        (["--on-full-disk", "wait"], "--on-full-disk='wait': give 'stop' or 'continue'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, words, part):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--output", str(tmp_path / "run"), *words])
    assert capsys.readouterr().err.startswith(f"longreach train: {part}")
    assert not (tmp_path / "run").exists()


def test_figures_are_named_by_what_they_were_measured_at():
    model = Model("alibi", 64, 0)
    of_record = {"bytes": 9, "words": None, "mean_context": 1.0, "seconds": 1.0, "peak_memory": None, "attention": "x"}
    entries = [
        Record(model=model, valid_length=128, stride=32, protocol="sliding-window", tokens=2, nll=0.0, **of_record),
        Skipped(task="kv", model=model, valid_length=128, reason="too long"),
    ]
    assert evaluated(entries) == {"perplexity/128/32/sliding-window": 1.0}
