"""Checkpoints that no crash leaves a run without: written beside the old one, checked by a digest, renamed."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from longreach.files import DIGEST_SIZE, HashingWriter, digest_of_start, open_file, replacing
from longreach.foreign import refusing
from longreach.stopping import Terminated
from longreach.train.metrics import Log, having_room


def save_checkpoint(state: dict[str, Any], path: Path, keep: int = 1) -> None:
    """Replace the checkpoint at path by state, atomically: a kill at any moment leaves the old or the new one.

    The file is what torch.save writes, followed by its SHA-256: torch itself does not notice a flipped bit.

    Args:
        state: tensors and plain values, among them `step`.
        path: the file.
        keep: of how many steps checkpoints stay. More than this one have a second name, checkpoint-STEP.pt.

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
        if isinstance(cause, KeyboardInterrupt | Terminated):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        message = f"{cause.strerror} while writing {path}: the checkpoint before it is kept"
        raise OSError(cause.errno, message) from error
    if keep > 1:
        named = path.with_stem(f"{path.stem}-{state['step']}")
        named.unlink(missing_ok=True)
        os.link(path, named)
    for older in numbered(path)[keep if keep > 1 else 0 :]:
        older.unlink()


def numbered(path: Path) -> list[Path]:
    """The checkpoints of single steps that were kept beside path, the last first."""
    steps = {file: file.stem.removeprefix(f"{path.stem}-") for file in path.parent.glob(f"{path.stem}-*{path.suffix}")}
    return sorted((file for file in steps if steps[file].isdecimal()), key=lambda file: -int(steps[file]))


def remove_checkpoints(path: Path) -> None:
    """Remove the checkpoint at path and those of single steps."""
    for file in (*numbered(path), path):
        file.unlink(missing_ok=True)


class Writer:
    """Saves checkpoints at once, or in a thread while training goes on, one at a time; done when the block ends.

    Args:
        path: the file.
        keep: as `save_checkpoint` has it.
        behind: whether in a thread, from a copy of the state.
        log: of the steps, without which a checkpoint is worth nothing: it is on disk before that is.
        on_full_disk: told what could not be written because a disk is full; that is an error when None.
    """

    def __init__(
        self, path: Path, keep: int, behind: bool, log: Log, on_full_disk: Callable[[str], None] | None = None
    ) -> None:
        self._path, self._keep = path, keep
        self._log, self._on_full_disk = log, on_full_disk
        self._threads = ThreadPoolExecutor(1) if behind else None
        self._saving: Future[None] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            if error is None or not isinstance(error, Exception):  # a signal leaves a checkpoint, or says why not
                with having_room(self._on_full_disk):
                    self._wait()

    def save(self, state: dict[str, Any]) -> None:
        """Save a state, as `save_checkpoint` does, whose errors come out here, or at the next time behind."""
        with having_room(self._on_full_disk):
            self._wait()
        with having_room(self._on_full_disk):
            self._log.sync()
            if self._threads is None:
                save_checkpoint(state, self._path, self._keep)
            else:
                self._saving = self._threads.submit(save_checkpoint, _copied(state), self._path, self._keep)

    def _wait(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()


def _copied(state: Any) -> Any:
    """A state that training does not change, on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    with refusing(*damaged(path)):
        with open_file(path) as file:
            size = max(0, os.path.getsize(path) - DIGEST_SIZE)
            file.seek(size)
            if file.read() != digest_of_start(path, size):
                raise ValueError("its digest is another")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def damaged(path: Path) -> tuple[str, str]:
    """What is wrong with a checkpoint that no run can go on from, and the mend, as `refusing` takes them."""
    before = [file.name for file in numbered(path) if not file.samefile(path)]
    instead = f"put {before[0]} in its place, or " if before else ""
    return f"checkpoint {path} is damaged", f"{instead}delete it to train this run from the start"
