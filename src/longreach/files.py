"""Files that are whole or absent, whatever kills the process or the machine, locks, and digests of what was read."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None  # type: ignore[assignment]

MODEL_FILES = (".safetensors", ".bin", ".json", ".py")
"""Suffixes of the files that a model is made from: weights, configuration, tokenizer, and code that comes with it."""

_KINDS = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}
"""What may stand under the name of a file -> whether a mode is that of one."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names of files and folders that are being written, and that a killed process leaves."""


def write_atomically(path: Path, data: bytes) -> None:
    """Put data at path whole or not at all, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside path, for the caller to write, that takes the place of path when the caller is done.

    It is forced to disk, renamed, and the rename forced to disk, so that a kill or a power cut at any moment leaves the
    old file or the new one. When the caller raises, the old file stays and the new one is removed. It has the usual
    permissions, though some libraries write files that only their owner may read.
    """
    temporary = temporary_name(path)
    try:
        with blaming(path, temporary):
            with open(temporary, "xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Force a file or a folder to disk, give it the name path, and force that to disk."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def blaming(path: Path, *temporary: Path) -> Iterator[None]:
    """Have what the system refuses name its file: what is open has no name there, and other names are temporary."""
    try:
        yield
    except OSError as error:
        unnamed = error.errno is not None and error.strerror == os.strerror(error.errno)
        if unnamed and (error.filename is None or Path(error.filename) in temporary):
            error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Force to disk what a file holds, or which names a folder does, where the system lets one open a folder."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Where to make what will be renamed to path: beside it, under a name by which `sweep` knows it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it, or a link to one; at no moment is a part of it left under its name."""
    going = temporary_name(path)
    path.rename(going)
    _remove(going)


def sweep(folder: Path) -> None:
    """Remove what a killed process was writing into a folder, which must be ours alone."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a folder and all in it, or a link, which leaves what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lock(file: IO[bytes], *, wait: bool) -> None:
    """Keep an open file from everyone else until it is closed or its process dies, where the system has such locks.

    Raises:
        BlockingIOError: somebody else keeps it, and `wait` is false.
        OSError: its file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_file(path: Path) -> BufferedReader:
    """Open a file to read its bytes, and nothing else: a pipe would be waited for, and a device has no end.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is something else, or may not be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror}; mend that or give another file") from error
    except ValueError:  # a zero byte is in the name
        raise FileNotFoundError(f"{str(path)!r}: no file can have this name; give another") from None
    kind = next((name for name, is_such in _KINDS.items() if is_such(mode)), "of an unknown kind")
    raise OSError(f"{path} is {kind}: give a file")


def expanded(name: str | Path) -> Path:
    """A path with the home of a user in place of ~, where the system knows of one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user, or one without a home
        return Path(name)


def digest(path: Path) -> str:
    """SHA-256 (hex) of a file, or of all in a folder that a model is made from, which may be larger than memory."""
    if not path.is_dir():
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file())
    return hashlib.sha256("".join(f"{file.name} {digest(file)}\n" for file in files).encode()).hexdigest()


def digest_of(*parts: str) -> str:
    """SHA-256 (hex) of texts, with a line feed between them."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
