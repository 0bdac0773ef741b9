"""What an output folder was begun with, and whether work may go on in it: one contract for every verb that writes.

A verb first refuses all that can be refused cheaply, then works in three steps:

    with hold(folder, config):                           # nobody else works there, and it is new or has this config
        ...                                              # read text, tokenizer and weights
        starts = begin(folder, config, digests, device)  # what was read is what was read before; from here on, write

A folder is begun once it has its config.toml. Beside that lies folder.toml: the digests, and every start.
"""

import os
import platform
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import tomli_w
import torch

import longreach
from longreach.files import blaming, digest_of, lock, sweep, write_atomically
from longreach.reading import plain_values, read_file
from longreach.results import Start

Config = TypeVar("Config")

LOCK = ".lock"
"""Name of the file that the process which works in a folder keeps locked; the system unlocks it when that dies."""

WRITTEN_INTO = (".", "figures")
"""Folders of an output folder whose leftovers are swept; those of runs inside it are output folders of their own."""


@dataclass(frozen=True)
class _Begun:
    """folder.toml."""

    digests: dict[str, str]
    starts: tuple[Start, ...]


@contextmanager
def hold(folder: Path, config: Config, besides: tuple[str, ...] = ()) -> Iterator[Config | None]:
    """Keep a folder for this process, after checking that work on a configuration may begin or go on there.

    What a killed process was writing there is removed. A new folder is made; if nothing is begun in it, it goes again.

    Args:
        folder: the folder.
        config: the resolved configuration, a dataclass. Fields declared with metadata `may_differ` may differ.
        besides: names of fields that the caller judges.

    Yields:
        The configuration that it was begun with, None if it is new.

    Raises:
        BlockingIOError: another process works there.
        ValueError: it was begun with another configuration, the fields that differ are named; or it is no folder, or
            holds what no verb of ours has begun; or its lock is no file.
        OSError: it cannot be written, or its file system has no locks.
    """
    with _blaming_output(folder):
        made = not folder.exists()
    if not made and not folder.is_dir():
        raise ValueError(f"output={folder}: it is a file, give a folder")
    _git_commit()  # asked before locking: a child process has our lock from its fork to its exec, even if we are killed
    try:
        with _locked(folder):
            for part in WRITTEN_INTO:
                if (folder / part).is_dir():
                    sweep(folder / part)
            yield _checked(folder, config, besides)
    finally:
        if made:
            with suppress(OSError):  # it is not empty any more
                folder.rmdir()


def begin(folder: Path, config: Any, digests: Mapping[str, str], device: torch.device) -> tuple[Start, ...]:
    """Note a start, after checking that what was read is what was read before; returns all starts until now.

    Args:
        folder: the folder, held for `config`.
        config: the resolved configuration, a dataclass.
        digests: of all that was read, by what a message is to call it: text, tokenizer, weights of X.
        device: where it will be computed.

    Raises:
        ValueError: something that was read has changed since. It is named.
        OSError: the folder cannot be written.
    """
    starts: tuple[Start, ...] = (this_start(config, device),)
    if (folder / "config.toml").exists():
        before = _read(folder)
        names = [name for name in {**before.digests, **digests} if before.digests.get(name) != digests.get(name)]
        if names:
            raise ValueError(
                f"output={folder}: it was begun with another {', '.join(names)}; give a new folder, or what was read "
                "then"
            )
        starts = (*before.starts, *starts)
    table = {"digests": dict(digests), "starts": [plain_values(start) for start in starts]}
    write_atomically(folder / "folder.toml", tomli_w.dumps(table).encode())
    write_atomically(folder / "config.toml", tomli_w.dumps(plain_values(config)).encode())
    return starts


def begun_with(folder: Path) -> Mapping[str, str]:
    """The digests of what was read for the work in a folder, as `begin` was given them.

    Raises:
        ValueError: they were not written down, or the file is damaged.
    """
    return _read(folder).digests


def identity(folder: Path) -> str:
    """A word that no other folder has and that it keeps with its name, made of its first start.

    Raises:
        ValueError: as `begun_with`.
    """
    first = _read(folder).starts[0]
    return digest_of(first.time, first.host, str(first.pid), folder.name)[:12]


def this_start(config: Any, device: torch.device) -> Start:
    """What there is to know of the start of this process for a configuration on a device."""
    return Start(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        longreach=longreach.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(device),
        num_threads=torch.get_num_threads(),
        git_commit=_git_commit(),
        host=socket.gethostname(),
        pid=os.getpid(),
        options={name: value for name, value in _leaves(config, may_differ=True) if value is not None},
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder, if need be, and hold its lock file, which says by whom."""
    with _lock_file(folder) as file:
        with blaming(folder / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # gone already
                (folder / LOCK).unlink()  # before it is unlocked, lest it be another's by then


@contextmanager
def _blaming_output(folder: Path) -> Iterator[None]:
    """Have what the system refuses of a folder name the argument."""
    try:
        yield
    except OSError as error:
        message = f"output={folder}: it cannot be written ({error.strerror}), give another folder"
        raise OSError(error.errno, message) from error


def _lock_file(folder: Path) -> BinaryIO:
    """The lock file of a folder, open and locked. Its holder removes it, and a folder that it made, when letting go."""
    while True:
        with _blaming_output(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), _blaming_output(folder):
            if not stat.S_ISREG((folder / LOCK).lstat().st_mode):  # nor a link to a file, which would be emptied
                raise ValueError(f"output={folder}: its {LOCK} is none that longreach made, remove that")
        with suppress(FileNotFoundError), ExitStack() as stack:
            with _blaming_output(folder):
                file = stack.enter_context(open(folder / LOCK, "a+b"))
            _lock(file, folder)
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                stack.pop_all()
                return file


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        lock(file, wait=False)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode(errors="replace") or "another process"
        raise BlockingIOError(
            f"output={folder}: it is in use by {holder}, wait until that has ended, or give another folder"
        ) from None
    except OSError as error:
        message = f"output={folder}: it cannot be locked ({error.strerror}), give a folder on another file system"
        raise OSError(error.errno, message) from error


def _checked(folder: Path, config: Config, besides: tuple[str, ...]) -> Config | None:
    """The configuration that a folder was begun with, None if it is new, after checking that config may go on in it."""
    path = folder / "config.toml"
    if not path.exists():
        if any(other.name not in (LOCK, "folder.toml") for other in folder.iterdir()):
            raise ValueError(f"output={folder}: it is not empty and holds no config.toml, give a new folder")
        return None
    try:
        before = read_file(type(config), path)
    except ValueError as error:
        raise ValueError(f"output={folder}: it holds work of another verb ({error}), give a new folder") from error
    _read(folder)  # damage comes out before anything is read that takes long
    pairs = zip(_leaves(before, may_differ=False), _leaves(config, may_differ=False), strict=True)
    then = [f"{name}={_words(there)}" for (name, there), (_, asked) in pairs if there != asked and name not in besides]
    if then:
        raise ValueError(f"output={folder}: it was begun with {', '.join(then)}; give a new folder, or the same values")
    return before


def _read(folder: Path) -> _Begun:
    try:
        return read_file(_Begun, folder / "folder.toml")
    except FileNotFoundError:
        raise ValueError(f"{folder} has no folder.toml, which says what it was begun with: make it anew") from None
    except ValueError as error:
        raise ValueError(f"{error}; restore it from a backup, or make the folder anew") from error


def _words(value: Any) -> str:
    """A value as it is typed."""
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _leaves(config: Any, *, may_differ: bool) -> Iterator[tuple[str, Any]]:
    """Names and values of the fields of nested dataclasses, either those that may differ or those that may not."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _leaves(value, may_differ=may_differ)
        elif field.metadata.get("may_differ", False) is may_differ:
            yield field.name, value


@cache
def _git_commit() -> str | None:
    """The commit of the checkout that this file is tracked in; None for an installed package."""
    folder = Path(__file__).parent
    try:
        # Installed inside somebody else's checkout, the package is not tracked by it.
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True)
        if tracked.returncode != 0:
            return None
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() or None
