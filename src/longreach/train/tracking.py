"""Figures shown by TensorBoard, trackio or Weights & Biases while work goes on: the only file that knows of them."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import tomli_w

from longreach.foreign import first_line
from longreach.results import (
    ContextRecord,
    DecompositionRecord,
    Entry,
    OffsetRecord,
    Record,
    RetrievalRecord,
    SummaryRecord,
)

Figures = Mapping[str, float | str]
"""Name -> number or text."""

EVALUATED: dict[type[Entry], tuple[str, ...]] = {
    Record: ("perplexity",),
    ContextRecord: ("loss",),
    DecompositionRecord: ("relief", "beyond"),
    OffsetRecord: ("loss",),
    RetrievalRecord: ("accuracy",),
    SummaryRecord: ("rouge1", "rouge2", "rougeL"),
}
"""Kind of entry of results -> the figures of it that are shown."""


@dataclass(frozen=True)
class Tracked:
    """What is tracked."""

    folder: Path
    """Where it is written to, and what may be tracked too."""
    identity: str
    """A word that no other has, and that it has when work on it goes on."""
    config: Mapping[str, Any]
    """Its configuration, in plain values."""

    @property
    def name(self) -> str:
        """What it is called where all of a project stands in one list."""
        return f"{self.folder.name}-{self.identity}"


class Tracker(Protocol):
    """What figures are sent to."""

    def log(self, figures: dict[str, Any], step: int) -> None:
        """Show figures of a step, which never falls."""
        ...

    def finish(self) -> None:
        """Write all that was logged."""
        ...


class Tracking:
    """Sends figures to trackers, which are begun, or gone on with, at the first of them; done when the block ends.

    Args:
        names: the trackers.
        tracked: what is tracked.
    """

    def __init__(self, names: Sequence[str], tracked: Tracked) -> None:
        self._names, self._tracked = names, tracked
        self._trackers: list[Tracker] | None = None
        self._open = ExitStack()

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with redirect_stdout(sys.stderr):
            self._open.close()

    def __call__(self, step: int, figures: Figures) -> None:
        """Show figures of a step; ValueError where a tracker cannot be begun."""
        if self._trackers is None:
            self._trackers = [self._begun(name, step) for name in self._names]
        for tracker in self._trackers:
            tracker.log(dict(figures), step)

    def _begun(self, name: str, step: int) -> Tracker:
        tracker: Tracker
        with redirect_stdout(sys.stderr):  # trackio prints
            try:
                tracker = _TensorBoard(self._tracked, step) if name == "tensorboard" else _service(name, self._tracked)
            except Exception as error:
                mend = "" if name == "tensorboard" else f"log in, set {name.upper()}_MODE=offline, or "
                raise ValueError(f"track={name} cannot be begun ({first_line(error)}): {mend}leave it out") from error
        self._open.callback(tracker.finish)
        return tracker


class _TensorBoard:
    """Event files in the folder itself, so that TensorBoard calls a run by the name of its folder."""

    def __init__(self, tracked: Tracked, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps from this one on that an interrupted session wrote after its last checkpoint are hidden.
        self._writer = SummaryWriter(str(tracked.folder), purge_step=step)
        config = tomli_w.dumps(dict(tracked.config))
        self._writer.add_text("configuration", f"```toml\n{config}```", step)

    def log(self, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _service(name: str, tracked: Tracked) -> Tracker:
    """A run of trackio or Weights & Biases, which have one interface: the first resumes by name, the other by id."""
    options = {"id": tracked.identity, "dir": str(tracked.folder)} if name == "wandb" else {}
    run: Tracker = import_module(name).init(
        project=os.environ.get(f"{name.upper()}_PROJECT", "longreach"),  # a name of theirs
        name=tracked.name,
        config=dict(tracked.config),
        resume="allow",
        **options,
    )
    return run


def check_trackers(names: Iterable[str]) -> None:
    """ModuleNotFoundError where a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"track={name} needs the package {name}: pip install 'longreach[{name}]'")


def evaluated(entries: Iterable[Entry]) -> dict[str, float]:
    """Figures of what was measured: the name of each begins with its task and ends with what it was measured at."""
    figures = {}
    for entry in entries:
        task, _, *places = entry.key
        place = "/".join(str(part) for part in places if part is not None)
        for figure in EVALUATED.get(type(entry), ()):
            figures[f"{task}/{figure}/{place}" if figure != task else f"{task}/{place}"] = getattr(entry, figure)
    return figures
