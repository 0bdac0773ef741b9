"""Checkpoints that no crash leaves a run without: written beside the old one, checked by a digest, renamed."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

_DIGEST_SIZE = hashlib.sha256().digest_size


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Replace the checkpoint at path by state, atomically: a kill at any moment leaves the old or the new one.

    The file is what torch.save writes, followed by its SHA-256: torch itself does not notice a flipped bit.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old checkpoint is untouched.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            hashing = _HashingWriter(file)
            torch.save(state, hashing)  # type: ignore[arg-type]  # it only writes
            file.write(hashing.hash.digest())
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        beside.unlink(missing_ok=True)
        # torch.save hides what stopped it, a full disk or Ctrl-C for instance, behind an error of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        message = f"{cause.strerror} while writing {path}: the checkpoint before it is kept; mend that and run again"
        raise OSError(cause.errno, message) from error
    os.replace(beside, path)
    fsync_folder(path.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    damaged = f"checkpoint {path} is damaged: delete it to train this run from the start"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        remaining = os.path.getsize(path) - _DIGEST_SIZE
        while remaining > 0 and (block := file.read(min(remaining, 2**20))):
            digest.update(block)
            remaining -= len(block)
        if file.read() != digest.digest():
            raise ValueError(damaged)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(damaged) from error
    return state


def fsync_folder(folder: Path) -> None:
    """Make the renames in a folder last, where the system lets one open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _HashingWriter:
    """Passes bytes on and hashes them, so that a checkpoint is never whole in memory twice."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
