import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from longreach import files
from longreach.files import digest, digest_of, replacing, sweep, temporary_name, write_atomically


def test_the_rename_is_forced_to_disk_after_what_was_written(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor):
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def seen_replace(source, target):
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def full(path):
    with open("/dev/full", "wb", buffering=0) as disk:
        disk.write(b"x")


@pytest.mark.parametrize(
    ("path", "write", "reason"),
    [
        ("a", full, "No space left on device"),
        ("no folder/a", full, "No such file or directory"),
        ("folder", lambda path: None, "Is a directory"),
        ("a", lambda path: path.unlink(), "No such file or directory"),
        ("a", lambda path: (path.parent / "other").read_bytes(), None),
        ("a", lambda path: os.fsync(10**6), "Bad file descriptor"),
    ],
)
def test_what_fails_is_blamed_on_the_file_and_not_on_the_temporary_one(tmp_path, path, write, reason):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as failed, replacing(tmp_path / path) as temporary:  # noqa: PT011 (its file is compared)
        write(temporary)
    assert failed.value.filename == str(tmp_path / (path if reason else "other"))
    assert failed.value.strerror == (reason or "No such file or directory")
    assert failed.value.filename2 is None


@pytest.mark.parametrize("there_before", [False, True])
def test_the_usual_permissions_whoever_wrote_it(tmp_path, there_before):
    (tmp_path / "plain").write_bytes(b"")
    if there_before:
        (tmp_path / "a").write_bytes(b"")
    with replacing(tmp_path / "a") as temporary:
        temporary.unlink()
        temporary.touch(0o600)  # as safetensors does
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_kill_leaves_is_swept_by_its_name(tmp_path):
    script = (
        "import os, signal; from pathlib import Path; from longreach.files import replacing\n"
        f"with replacing(Path({str(tmp_path / 'config.toml')!r})):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script])
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".config.toml.")
    temporary_name(tmp_path / "checkpoint-5").mkdir()
    (tmp_path / ".link.01234567.tmp").symlink_to(tmp_path)
    others = {"config.toml", "notes.tmp", ".notes.tmp", ".hidden", ".a.0123456.tmp", ".a.0123456x.tmp"}
    for name in others:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others


def test_digest_of_a_model_is_that_of_the_files_it_is_made_from(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    assert digest(tmp_path / "config.json") == hashlib.sha256(b"{}").hexdigest()
    before = digest(tmp_path)
    lines = [f"{name} {digest(tmp_path / name)}\n" for name in ("config.json", "model.safetensors")]
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest()
    (tmp_path / "README.md").write_bytes(b"read by nobody")
    assert digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert digest(tmp_path) != before


def test_digest_of_texts_knows_their_border():
    assert digest_of("ab", "c") != digest_of("a", "bc")


def test_nobody_else_renames_or_forces_to_disk():
    package = Path(files.__file__).parent
    elsewhere = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "files.py" and any(call in path.read_text() for call in ("os.replace(", "os.fsync("))
    ]
    assert elsewhere == ["pretrained/export.py"]  # renames a folder
