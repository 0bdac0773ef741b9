import errno
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from longreach.files import HashingWriter
from longreach.train.checkpoint import Writer, load_checkpoint, remove_checkpoints, save_checkpoint
from longreach.train.metrics import Log, Step


def state(value):
    return {"model": {"w": torch.full((1000,), float(value))}, "step": value, "random_state": torch.get_rng_state()}


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(3), path)
    loaded = load_checkpoint(path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], torch.full((1000,), 3.0))
    assert torch.equal(loaded["random_state"], torch.get_rng_state())
    assert list(tmp_path.iterdir()) == [path]


def test_every_kind_of_damage_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(3), path)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (bytes(flipped), good[:-1], good[: len(good) // 2], good[:10], b"", good + b"x"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"checkpoint .*checkpoint\.pt is damaged \(.*\); delete it"):
            load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    # RLIMIT_FSIZE makes the kernel refuse to grow a file, as a full disk would; a process of its own bears it.
    script = f"""
import resource, signal, torch
from pathlib import Path
from longreach.train.checkpoint import Writer, load_checkpoint, remove_checkpoints, save_checkpoint
path = Path({str(tmp_path / "checkpoint.pt")!r})
save_checkpoint({{"step": 1, "w": torch.zeros(10)}}, path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint({{"step": 2, "w": torch.zeros(1_000_000)}}, path)
except OSError as error:
    print("refused", error.errno)
print(load_checkpoint(path)["step"], [p.name for p in path.parent.iterdir()])
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == ["refused 27", "1 ['checkpoint.pt']"]  # 27 is EFBIG


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.07])
def test_kill_in_mid_save_leaves_a_good_checkpoint(tmp_path, delay):
    path = tmp_path / "checkpoint.pt"
    script = f"""
import torch
from pathlib import Path
from longreach.train.checkpoint import save_checkpoint
for step in range(10**9):
    save_checkpoint({{"step": step, "w": torch.full((500_000,), float(step))}}, Path({str(path)!r}))
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            announced = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        announced = max([announced, *map(int, process.stdout.read().split())])
    loaded = load_checkpoint(path)
    assert loaded["step"] >= announced
    assert torch.equal(loaded["w"], torch.full((500_000,), float(loaded["step"])))


def test_no_folder_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        save_checkpoint(state(1), tmp_path / "nowhere" / "checkpoint.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_an_interrupt_in_mid_save_stays_one_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, at):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(state(1), path)

    write, calls = HashingWriter.write, []

    def interrupted(self, data):
        calls.append(data)
        if len(calls) == at:
            raise KeyboardInterrupt
        return write(self, data)

    monkeypatch.setattr("longreach.files.HashingWriter.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(state(2), path)
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_checkpoints_are_kept_and_offered_where_the_last_is_damaged(tmp_path):
    path = tmp_path / "checkpoint.pt"
    (tmp_path / "checkpoint-best.pt").touch()  # the user's own
    for step in (8, 9, 10, 11):
        save_checkpoint(state(step), path, keep=3)
    assert names(tmp_path) == [
        *("checkpoint-10.pt", "checkpoint-11.pt", "checkpoint-9.pt", "checkpoint-best.pt", "checkpoint.pt")
    ]
    path.write_bytes(b"torn")  # the same file as that of step 11
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt is damaged \(.*\); put checkpoint-10\.pt in its place, or delete it"
    ):
        load_checkpoint(path)
    (tmp_path / "checkpoint-10.pt").replace(path)
    assert load_checkpoint(path)["step"] == 10
    save_checkpoint(state(11), path, keep=1)
    assert names(tmp_path) == ["checkpoint-best.pt", "checkpoint.pt"]
    remove_checkpoints(path)
    assert names(tmp_path) == ["checkpoint-best.pt"]


def test_a_checkpoint_behind_is_of_the_moment_when_it_was_asked_for(tmp_path):
    path = tmp_path / "checkpoint.pt"
    weights = torch.zeros(1000)
    with Log(tmp_path / "log", False) as log, Writer(path, 1, True, log) as writer:
        for step in range(3):
            writer.save({"step": step, "w": weights, "list": [{"w": weights}]})
            weights += 1
    loaded = load_checkpoint(path)
    assert (loaded["step"], loaded["w"].max(), loaded["list"][0]["w"].max()) == (2, 2, 2)


@pytest.mark.parametrize("ends_by", [None, KeyboardInterrupt])
def test_an_error_behind_comes_out(tmp_path, ends_by):
    def save_and_end():
        with (
            Log(tmp_path / "log", False) as log,
            Writer(tmp_path / "nowhere" / "checkpoint.pt", 1, True, log) as writer,
        ):
            writer.save(state(1))
            if ends_by is not None:
                raise ends_by

    with pytest.raises(OSError, match="nowhere"):
        save_and_end()


@pytest.mark.parametrize("behind", [False, True])
def test_a_full_disk_is_told_and_training_goes_on_where_that_is_asked_for(tmp_path, monkeypatch, behind):
    path, told = tmp_path / "checkpoint.pt", []
    save_checkpoint(state(1), path)
    monkeypatch.setattr(HashingWriter, "write", failing(errno.ENOSPC))
    with Log(tmp_path / "log", True) as log, Writer(path, 1, behind, log, told.append) as writer:
        writer.save(state(2))
        writer.save(state(3))
    message = f"No space left on device while writing {path}: the checkpoint before it is kept; training goes on"
    assert told == [message] * 2
    assert load_checkpoint(path)["step"] == 1
    monkeypatch.setattr(HashingWriter, "write", failing(errno.EIO))  # that is no full disk
    with (
        pytest.raises(OSError, match="Input/output error while writing"),
        Log(tmp_path / "log", True) as log,
        Writer(path, 1, behind, log, told.append) as writer,
    ):
        writer.save(state(4))


def failing(number):
    def write(self, data):
        raise OSError(number, os.strerror(number))

    return write


def test_lines_that_had_no_room_are_written_later_and_no_checkpoint_before_them(tmp_path, monkeypatch):
    room, told, write = [0], [], os.write

    def write_what_fits(file, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr("longreach.train.metrics.os.write", write_what_fits)
    steps = [Step(number, 1.0, 0.1, 1.0, 8 * number, 1.0) for number in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    with Log(path, True) as log, Writer(tmp_path / "checkpoint.pt", 1, False, log, told.append) as writer:
        room[0] = 20
        log.add(steps[0])
        log.add(steps[1])
        assert path.stat().st_size == 20
        writer.save(state(2))
        assert told == [f"No space left on device while writing {path}; training goes on"]
        assert names(tmp_path) == ["metrics.jsonl"]
        room[0] = 10**6
        log.add(steps[2])
        writer.save(state(3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    room[0] = 0
    with pytest.raises(OSError, match=r"while writing .*metrics\.jsonl; mend that and run"), Log(path, False) as log:
        log.add(steps[0])


def names(folder):
    return sorted(path.name for path in folder.iterdir())
