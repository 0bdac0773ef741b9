"""Checkpoints that no crash leaves a run without: written beside the old one, checked by a digest, renamed."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from longreach.files import DIGEST_SIZE, HashingWriter, digest_of_start, replacing


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Replace the checkpoint at path by state, atomically: a kill at any moment leaves the old or the new one.

    The file is what torch.save writes, followed by its SHA-256: torch itself does not notice a flipped bit.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old checkpoint is untouched.
    """
    try:
        with replacing(path) as beside, open(beside, "wb") as file:
            hashing = HashingWriter(file)
            torch.save(state, hashing)  # type: ignore[arg-type]  # it only writes
            file.write(hashing.digest())
    except BaseException as error:
        # torch.save hides what stopped it, a full disk or Ctrl-C for instance, behind an error of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        message = f"{cause.strerror} while writing {path}: the checkpoint before it is kept; mend that and run again"
        raise OSError(cause.errno, message) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    damaged = f"checkpoint {path} is damaged: delete it to train this run from the start"
    with open(path, "rb") as file:
        size = max(0, os.path.getsize(path) - DIGEST_SIZE)
        file.seek(size)
        if file.read() != digest_of_start(path, size):
            raise ValueError(damaged)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(damaged) from error
    return state
