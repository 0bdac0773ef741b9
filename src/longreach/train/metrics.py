"""metrics.jsonl: one line for each step of a run, and the only place that reads and writes it."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from longreach.files import open_file, sync, write_atomically
from longreach.reading import parse_json, read_values

FINAL_STEPS = 20
"""Over how many of the last steps `final_loss` is the mean."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors by which a system says that there is no room for what is written."""


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl, and what trackers are told of a step."""

    step: int
    """Number of this step, from 1."""
    loss: float
    """Mean nll of the batch in nats per token, before the update."""
    learning_rate: float
    """Of this update."""
    gradient_norm: float
    """Of all gradients together, before clipping."""
    tokens: int
    """Tokens trained on so far."""
    seconds: float
    """Time spent training so far, over all sessions of the run."""
    tokens_per_second: float | None = None
    """Of this step, over all processes."""
    flops_per_second: float | None = None
    """Of this step, over all processes, as `longreach.train.flops` counts them."""
    utilisation: float | None = None
    """flops_per_second over what the devices can reach, where that is known: model FLOP utilisation."""
    exchanged: int | None = None
    """Bytes that all processes sent each other in the step, where several share each sequence: `Exchanged.total`."""
    all_gather: int | None = None
    """Bytes that an all-gather of keys and values and a reduce-scatter of their gradients would have had them send."""
    ring: int | None = None
    """Bytes that a ring would have had them send."""
    memory: int | None = None
    """Highest memory in bytes until now, of the first process, where the system tells it."""
    valid_loss: float | None = None
    """Mean nll on the validation text after the update, in nats per token, where it was measured."""
    sample: str | None = None
    """A text that the model wrote after the update, where it was asked for one."""

    def figures(self) -> dict[str, Any]:
        """Name -> value of all that is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Log:
    """metrics.jsonl as it grows. Lines are whole in it when the block ends, or when they are synced, by any thread.

    Args:
        path: the file.
        patient: whether a line that a full disk has no room for is written with a later one, instead of ending all.
    """

    def __init__(self, path: Path, patient: bool) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._patient = patient
        self._left = b""
        self._turn = Lock()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write()
        finally:
            os.close(self._file)

    def add(self, step: Step) -> None:
        """Write the line of a step."""
        with having_room((lambda message: None) if self._patient else None):
            self._write((json.dumps(step.figures()) + "\n").encode())

    def sync(self) -> None:
        """Force all lines to disk."""
        self._write()
        sync(self._path)

    def _write(self, line: bytes = b"") -> None:
        with self._turn:
            self._left += line
            try:
                while self._left:
                    self._left = self._left[os.write(self._file, self._left) :]
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} while writing {self._path}") from error


@contextmanager
def having_room(on_full_disk: Callable[[str], None] | None) -> Iterator[None]:
    """A full disk inside of the block is told to a function where there is one, and training goes on; else it ends."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        if on_full_disk is None:
            raise OSError(error.errno, f"{error.strerror}; mend that and run again") from error
        on_full_disk(f"{error.strerror}; training goes on")


def keep_first(path: Path, steps: int) -> None:
    """Drop what an interrupted session logged after its last checkpoint, a torn last line included.

    Raises:
        ValueError: what is left is not the log of so many steps, found before a run goes on and not at its end.
    """
    if not steps and not path.exists():
        return
    kept = _lines(path)[:steps]
    _losses(path, kept, first=1)
    if len(kept) < steps:
        raise _damaged(path, f"it has {len(kept)} of {steps} steps")
    write_atomically(path, "".join(kept).encode())


def final_loss(path: Path) -> float:
    """The mean loss of the last `FINAL_STEPS` steps. ValueError where the file is damaged."""
    lines = _lines(path)
    losses = _losses(path, lines[-FINAL_STEPS:], first=max(1, len(lines) - FINAL_STEPS + 1))
    return sum(losses) / len(losses)


def _lines(path: Path) -> list[str]:
    with open_file(path) as file:
        return file.read().decode(errors="replace").splitlines(keepends=True)


def _losses(path: Path, lines: list[str], first: int) -> list[float]:
    """The losses of lines of metrics.jsonl, those of consecutive steps."""
    losses = []
    for number, line in enumerate(lines, start=first):
        try:
            step = read_values(Step, parse_json(line))
            if step.step != number:
                raise ValueError(f"step={step.step}")
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"line {number}: {error}") from error
        losses.append(step.loss)
    return losses


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): delete its folder to train this run again")
