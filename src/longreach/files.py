"""Files that are whole or absent, whatever kills the process or the machine, locks, and digests of what was read."""

import contextlib
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None  # type: ignore[assignment]

MODEL_FILES = (".safetensors", ".bin", ".json", ".py")
"""Suffixes of the files that a model is made from: weights, configuration, tokenizer, and code that comes with it."""

DIGEST_SIZE = hashlib.sha256().digest_size
"""Bytes of a digest that is not written as hexadecimal digits."""

_KINDS = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}
"""What may stand under the name of a file -> whether a mode is that of one."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names of files that are being written, and that a killed process leaves."""


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with blaming(path, temporary):
            with open(temporary, "xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
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


def is_leftover(path: Path) -> bool:
    """Whether a file is one that `replacing` writes to, which nobody does any more when its folder is ours alone."""
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file()


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


def digest_of_start(path: Path, size: int) -> bytes:
    """SHA-256 of the first size bytes of a file, or of all that it holds if that is less."""
    hashed = hashlib.sha256()
    with open_file(path) as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            hashed.update(block)
            size -= len(block)
    return hashed.digest()


class HashingWriter:
    """Passes bytes on to a file and hashes them, so that what is large is never whole in memory twice."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash data."""
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def digest(self) -> bytes:
        """SHA-256 of what was written."""
        return self._hash.digest()
