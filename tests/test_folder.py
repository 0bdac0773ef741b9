import os
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace

import pytest
import torch

from longreach import folder as folder_module
from longreach.folder import begin, begun_with, hold
from longreach.reading import read_file
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs.compare import CompareConfig
from longreach.verbs.evaluate import EvaluationConfig

CPU = torch.device("cpu")
READ = {"text": "a", "tokenizer": "b", "weights of runs/x": "c"}


def start(path, config=RunConfig(), digests=READ):  # noqa: B008
    with hold(path, config):
        return begin(path, config, digests, CPU)


def names(path):
    return sorted(child.name for child in path.iterdir())


def test_a_folder_says_what_it_was_begun_with(tmp_path):
    start(tmp_path / "run")
    assert names(tmp_path / "run") == ["config.toml", "folder.toml"]
    assert read_file(RunConfig, tmp_path / "run" / "config.toml") == RunConfig()
    assert begun_with(tmp_path / "run") == READ


def test_another_configuration_is_refused_by_the_names_of_the_fields(tmp_path):
    start(tmp_path / "run")
    other = RunConfig(method="rotary", train=TrainConfig(steps=7, warmup_steps=0, device="cpu"))
    with pytest.raises(ValueError, match=r"run: it was begun with method=alibi, steps=600, warmup_steps=40; give"):
        start(tmp_path / "run", other)
    assert read_file(RunConfig, tmp_path / "run" / "config.toml") == RunConfig()


@pytest.mark.parametrize("changed", [("text",), ("text", "weights of runs/x")])
def test_what_was_read_must_be_what_is_read(tmp_path, changed):
    start(tmp_path / "run")
    before = (tmp_path / "run" / "folder.toml").read_bytes()
    with pytest.raises(
        ValueError, match=rf"run: it was begun with another {', '.join(changed)}; give a new folder, or what"
    ):
        start(tmp_path / "run", digests=READ | dict.fromkeys(changed, "other"))
    assert (tmp_path / "run" / "folder.toml").read_bytes() == before
    start(tmp_path / "run")


def test_what_changes_no_result_may_differ_and_is_noted_for_each_start(tmp_path, monkeypatch):
    start(tmp_path / "run", RunConfig(train=TrainConfig(device="cpu")))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    later = RunConfig(train=TrainConfig(device="auto", checkpoint_every=9))
    later = replace(later, data=replace(later.data, cache=str(tmp_path)))
    first, second = start(tmp_path / "run", later)
    assert (first.options["device"], second.options["device"]) == ("cpu", "auto")
    assert (second.options["checkpoint_every"], second.options["cache"]) == (9, str(tmp_path))
    assert first.torch != second.torch == "9.9.9"
    assert first.num_threads != second.num_threads == 7
    assert (second.host, second.pid, second.device) == (socket.gethostname(), os.getpid(), "cpu")
    assert read_file(RunConfig, tmp_path / "run" / "config.toml") == later
    table = tomllib.loads((tmp_path / "run" / "folder.toml").read_text())
    assert [start["torch"] for start in table["starts"]] == [first.torch, "9.9.9"]


def free(kind):
    """Names of the fields that may differ in a configuration class and in those it is made of."""
    config = kind(models=("a",)) if kind is EvaluationConfig else kind()
    for entry in fields(config):
        if is_dataclass(getattr(config, entry.name)):
            yield from free(type(getattr(config, entry.name)))
        elif entry.metadata:
            yield entry.name


def test_what_may_differ_is_this_alone():
    assert set(free(RunConfig)) == {
        *("cache", "device", "parallel", "compile", "recompute"),
        *("checkpoint_every", "keep_checkpoints", "async_checkpoint", "validate_every", "sample_every"),
        *("on_full_disk", "track", "peak_flops", "context_parallel"),
    }
    assert set(free(CompareConfig)) == set(free(RunConfig))
    assert set(free(EvaluationConfig)) == {"device", "track", "context_parallel"}


@dataclass(frozen=True)
class Other:
    colour: str = field(default="red")


def test_work_of_another_verb_is_refused(tmp_path):
    start(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: it holds work of another verb \(.*\), give a new folder"):
        start(tmp_path / "run", Other())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"it is not empty and holds no config\.toml"):
        start(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"thesis\.tex: it is a file, give a folder"):
        start(tmp_path / "thesis.tex")


def test_what_is_refused_before_it_was_begun_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(ValueError, match="no such text"), hold(tmp_path / name, RunConfig()):
            raise ValueError("no such text")
    assert names(tmp_path) == ["there"]
    assert names(tmp_path / "there") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "run has no folder.toml, which says what it was begun with: make it anew"),
        (
            "digests = 3\nstarts = []",
            r"folder\.toml: digests=3: give .*; restore it from a backup, or make the folder anew",
        ),
        ("[digests]", r"folder\.toml: starts is missing"),
        ("starts = [{torch = 3}]\n[digests]", r"folder\.toml: starts\[0\]"),
        ("[dig", r"folder\.toml: not a TOML file"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, text, message):
    start(tmp_path / "run")
    (tmp_path / "run" / "folder.toml").unlink()
    if text is not None:
        (tmp_path / "run" / "folder.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        begun_with(tmp_path / "run")


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to("/dev/full"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("../precious"),
    ],
)
def test_a_lock_that_is_no_file_is_not_written_to(tmp_path, make):
    (tmp_path / "precious").write_text("theirs")
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / ".lock")
    with pytest.raises(ValueError, match=r"run: its \.lock is none that longreach made, remove that$"):
        start(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "theirs"


def test_leftovers_of_a_kill_neither_block_a_folder_nor_stay(tmp_path):
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    for name in (".config.toml.01234567.tmp", ".folder.toml.89abcdef.tmp", "folder.toml", ".lock"):
        (run / name).write_text("torn")
    (run / "figures" / ".a.svg.01234567.tmp").write_text("torn")
    with pytest.raises(ValueError, match="is not empty"):  # for the folder of figures, which no start leaves alone
        start(run)
    assert names(run / "figures") == []
    (run / "figures").rmdir()
    start(run)
    assert names(run) == ["config.toml", "folder.toml"]
    (run / ".notes.tmp").write_text("the user's own")
    start(run)
    assert names(run) == [".notes.tmp", "config.toml", "folder.toml"]


HOLDER = """
import sys
from pathlib import Path
from longreach.folder import hold
from longreach.train.config import RunConfig
with hold(Path(sys.argv[1]), RunConfig()):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    run = tmp_path / "run"
    with holder(run) as process:
        message = rf"run: it is in use by process {process.pid} on {socket.gethostname()}, wait until that has ended"
        with pytest.raises(BlockingIOError, match=message):
            start(run)
        process.stdin.close()
        assert process.wait() == 0
    assert not run.exists()
    start(run)


def test_a_killed_process_blocks_nobody(tmp_path):
    run = tmp_path / "run"
    with holder(run) as process:
        process.kill()
    assert names(run) == [".lock"]
    start(run)
    assert names(run) == ["config.toml", "folder.toml"]


def test_a_lock_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    lock = folder_module._lock

    def lock_late(file, folder):
        monkeypatch.setattr(folder_module, "_lock", lock)
        (run / ".lock").unlink()  # by the holder, between our opening it and its letting go
        lock(file, folder)

    monkeypatch.setattr(folder_module, "_lock", lock_late)
    with hold(run, RunConfig()):
        assert names(run) == [".lock"]
        with pytest.raises(BlockingIOError):
            start(run)


def test_systems_without_locks_work_without_them(tmp_path):
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from longreach.folder import hold; from longreach.train.config import RunConfig; from pathlib import Path\n"
        f"with hold(Path({str(tmp_path / 'run')!r}), RunConfig()): print('held')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "held\n", result.stderr


STARTER = """
import os, signal, sys
from pathlib import Path
import torch
from longreach.folder import begin, hold
from longreach.train.config import RunConfig

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def start(run):
    with hold(run, RunConfig()):
        begin(run, RunConfig(), {"text": "a"}, torch.device("cpu"))

def start_and_die(run, change):
    changes = []
    def count(event, arguments):
        if event in CHANGES and str(arguments[0]).startswith(str(run)):
            changes.append(event)
            if len(changes) == change:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    start(run)
    os._exit(0)

start(Path(sys.argv[1]) / "once")
killed, change = True, 0
while killed:
    change += 1
    run = Path(sys.argv[1]) / str(change)
    child = os.fork() or start_and_die(run, change)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    start(run)
    print(*sorted(path.name for path in run.iterdir()), flush=True)
"""


def test_killed_at_any_change_that_a_start_makes_the_same_may_start_again(tmp_path):
    result = subprocess.run([sys.executable, "-c", STARTER, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.splitlines()) == {"config.toml folder.toml"}
    assert len(result.stdout.splitlines()) > 8
