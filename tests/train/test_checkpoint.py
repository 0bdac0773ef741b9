import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longreach.files import sweep
from longreach.foreign import refusing
from longreach.train import shards
from longreach.train.checkpoint import Writer, checkpoints, damaged, last_step, load_tensors, save_checkpoint
from longreach.train.metrics import Log, Step
from longreach.train.shards import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # `Writer` silences it


def save(folder, step, **tensors):
    path = folder / f"checkpoint-{step}"
    save_checkpoint(path, tensors or {"w": torch.full((1000,), float(step))}, {"step": step})
    return path


def load(path):
    """The plain values and the tensors of a checkpoint."""
    with refusing(*damaged(path)):
        manifest = read_manifest(path)
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in manifest.tensors.items()}
    load_tensors(path, manifest, tensors)
    return manifest.values, tensors


def test_round_trip(tmp_path):
    tensors = {
        "weight": torch.randn(3, 5).T,
        "number": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "bytes": torch.get_rng_state()[:4999],
        "half": torch.randn(3).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "whole": torch.arange(3),
    }
    values = {"step": 3, "seconds": 0.1, "batches": {"rest": [1, 2], "place": None, "text": "\u00e9"}}
    path = tmp_path / "checkpoint-3"
    save_checkpoint(path, tensors, values)
    assert names(path) == ["0.safetensors", "checkpoint.json"]
    manifest = read_manifest(path)
    assert manifest.values == values
    read = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    load_tensors(path, manifest, read)
    for loaded in (read, load_file(path / "0.safetensors")):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        assert all(loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("file", ["checkpoint.json", "0.safetensors"])
def test_every_kind_of_damage_is_noticed(tmp_path, file):
    path = save(tmp_path, 3)
    good = (path / file).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (bytes(flipped), good[:-2], good[: len(good) // 2], good[:10], b"", b"x" + good, None):
        (path / file).unlink()
        if bad is not None:
            (path / file).write_bytes(bad)
        with pytest.raises(ValueError, match=r"^checkpoint .*checkpoint-3 is damaged \(.*\); delete it"):
            load(path)


def rewritten(path, change):
    """Change a checkpoint as somebody would who makes its digest right again."""
    file = path / shards.MANIFEST
    content = json.loads(file.read_text())["content"]
    change(content["tensors"]["w"])
    text = json.dumps(content)
    file.write_text(json.dumps({"sha256": shards.digest_of(text), "content": json.loads(text)}))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w: w.update(shape=[10**15]), "Size mismatch"),
        (lambda w: w.update(pieces=[]), "w is not all finite numbers"),
        (lambda w: w["pieces"][0].update(sizes=[999]), "its digest is another"),
        (lambda w: w["pieces"][0].update(offsets=[1]), "not inside of"),
        (lambda w: w["pieces"][0].update(offsets=[-1]), "not inside of"),
        (lambda w: w["pieces"][0].update(sizes=[1, 1]), "longer than argument|shorter than argument"),
        (lambda w: w["pieces"][0].update(rank=1), "1.safetensors: no such file"),
        (lambda w: w["pieces"][0].update(rank="../0"), "give an integer"),
        (lambda w: w["pieces"][0].update(sha256="0"), "w in 0.safetensors: its digest is another"),
    ],
)
def test_pieces_that_do_not_make_the_tensor_are_refused(tmp_path, change, part):
    path = save(tmp_path, 3)
    rewritten(path, change)
    with pytest.raises(ValueError, match=part):
        load_tensors(path, read_manifest(path), {"w": torch.zeros(1000)})


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ({"w": torch.zeros(1000, dtype=torch.float64)}, "w is of torch.float32, not torch.float64"),
        ({"w": torch.zeros(10, 100)}, "Size mismatch"),
        ({"v": torch.zeros(1000)}, "Missing key"),
    ],
)
def test_tensors_that_are_others_are_refused(tmp_path, target, part):
    path = save(tmp_path, 3)
    with pytest.raises(ValueError, match=rf"^checkpoint .* is damaged \({part}.*\); delete it to train this run from"):
        load_tensors(path, read_manifest(path), target)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    # RLIMIT_FSIZE makes the kernel refuse to grow a file, as a full disk would; a process of its own bears it.
    script = f"""
import resource, signal, torch, warnings
from pathlib import Path
from longreach.train.checkpoint import save_checkpoint
warnings.simplefilter("ignore")
folder = Path({str(tmp_path)!r})
save_checkpoint(folder / "checkpoint-1", {{"w": torch.zeros(10)}}, {{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(folder / "checkpoint-2", {{"w": torch.zeros(1_000_000)}}, {{}})
except OSError as error:
    print("refused", error.errno)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output == "refused 27\n"  # EFBIG
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.07])
def test_kill_in_mid_save_leaves_a_good_checkpoint(tmp_path, delay):
    script = f"""
import torch
from pathlib import Path
from longreach.train.checkpoint import Writer
from longreach.train.metrics import Log
folder = Path({str(tmp_path)!r})
with Log(folder / "log", False) as log, Writer(folder, 1, False, log) as writer:
    for step in range(1, 10**9):
        writer.save(step, {{"w": torch.full((500_000,), float(step))}}, {{"step": step}})
        print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            announced = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        announced = max([announced, *map(int, process.stdout.read().split())])
    values, tensors = load(checkpoints(tmp_path)[0])
    assert values["step"] == last_step(tmp_path) >= announced
    assert torch.equal(tensors["w"], torch.full((500_000,), float(values["step"])))
    sweep(tmp_path)
    assert set(names(tmp_path)) <= {"log", *(f"checkpoint-{values['step'] - back}" for back in (0, 1))}


def test_no_folder_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory while writing .*nowhere/checkpoint-1"):
        save(tmp_path / "nowhere", 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["mkdir", "write_text", "is_dir"])
def test_an_interrupt_in_mid_save_stays_one_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, where):
    path = save(tmp_path, 1)

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert load(path)[0]["step"] == 1
    assert names(tmp_path) == ["checkpoint-1"]


def test_of_a_checkpoint_that_is_a_link_the_link_goes(tmp_path):
    elsewhere = save(tmp_path, 1).rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-1").symlink_to(elsewhere)
    with Log(tmp_path / "log", False) as log, Writer(tmp_path, 1, False, log) as writer:
        writer.save(2, {"w": torch.zeros(1)}, {"step": 2})
    assert names(tmp_path) == ["checkpoint-2", "elsewhere", "log"]
    assert names(elsewhere) == ["0.safetensors", "checkpoint.json"]


def test_the_last_checkpoints_are_kept_and_offered_where_the_last_is_damaged(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()  # the user's own
    (tmp_path / "checkpoint-99").touch()

    def write(keep, *steps):
        with Log(tmp_path / "log", False) as log, Writer(tmp_path, keep, False, log) as writer:
            for step in steps:
                writer.save(step, {"w": torch.zeros(1)}, {"step": step})

    write(3, 8, 9, 10, 11)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-10", "checkpoint-9"]
    last = checkpoints(tmp_path)[0]
    (last / "0.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"checkpoint-11 is damaged \(.*\); delete it to go on from checkpoint-10$"):
        load(last)
    write(1, 12)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-99", "checkpoint-best", "log"]


def test_a_checkpoint_of_an_older_version_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of an older version of longreach: finish the run with"):
        last_step(tmp_path)


def test_a_checkpoint_behind_is_of_the_moment_when_it_was_asked_for(tmp_path):
    weights = torch.zeros(1000)
    with Log(tmp_path / "log", False) as log, Writer(tmp_path, 1, True, log) as writer:
        for step in (1, 2, 3):
            writer.save(step, {"w": weights}, {"step": step})
            weights += 1
    values, tensors = load(tmp_path / "checkpoint-3")
    assert (values["step"], tensors["w"].max()) == (3, 2)


@pytest.mark.parametrize("ends_by", [None, KeyboardInterrupt])
def test_an_error_behind_comes_out(tmp_path, ends_by):
    def save_and_end():
        with (
            Log(tmp_path / "log", False) as log,
            Writer(tmp_path / "nowhere", 1, True, log) as writer,
        ):
            writer.save(1, {"w": torch.zeros(1)}, {})
            if ends_by is not None:
                raise ends_by

    with pytest.raises(OSError, match="nowhere"):
        save_and_end()


@pytest.mark.parametrize("behind", [False, True])
def test_a_full_disk_is_told_and_training_goes_on_where_that_is_asked_for(tmp_path, monkeypatch, behind):
    told = []
    path = save(tmp_path, 1)
    monkeypatch.setattr(shards, "_bytes", failing(errno.ENOSPC))
    with Log(tmp_path / "log", True) as log, Writer(tmp_path, 1, behind, log, told.append) as writer:
        writer.save(2, {"w": torch.zeros(1)}, {})
        writer.save(3, {"w": torch.zeros(1)}, {})
    kept = "the checkpoint before it is kept; training goes on"
    assert told == [f"No space left on device while writing {tmp_path / f'checkpoint-{n}'}: {kept}" for n in (2, 3)]
    monkeypatch.setattr(shards, "_bytes", failing(errno.EIO))  # that is no full disk
    with (
        pytest.raises(OSError, match="Input/output error while writing"),
        Log(tmp_path / "log", True) as log,
        Writer(tmp_path, 1, behind, log, told.append) as writer,
    ):
        writer.save(4, {"w": torch.zeros(1)}, {})
    monkeypatch.undo()
    assert load(path)[0]["step"] == 1
    assert names(tmp_path) == ["checkpoint-1", "log"]


def failing(number):
    def write(tensor):
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
    with Log(path, True) as log, Writer(tmp_path, 1, False, log, told.append) as writer:
        room[0] = 20
        log.add(steps[0])
        log.add(steps[1])
        assert path.stat().st_size == 20
        writer.save(2, {"w": torch.zeros(1)}, {})
        assert told == [f"No space left on device while writing {path}; training goes on"]
        assert names(tmp_path) == ["metrics.jsonl"]
        room[0] = 10**6
        log.add(steps[2])
        writer.save(3, {"w": torch.zeros(1)}, {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert last_step(tmp_path) == 3
    room[0] = 0
    with pytest.raises(OSError, match=r"while writing .*metrics\.jsonl; mend that and run"), Log(path, False) as log:
        log.add(steps[0])


def names(folder):
    return sorted(path.name for path in folder.iterdir())
