"""`results.json`: what was measured, with what it was measured, and what was left out.

One file holds one comparison, and reports are made from it alone. The file is strict JSON (no NaN, no Infinity): an
object with `version`, `provenance` and one list for each kind of entry in `records.py`, each entry an object with
exactly the fields of its dataclass as keys; `model` and each of `starts` is an object again. Sums alone are
stored: what follows from them is computed when it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from longreach.files import write_atomically
from longreach.reading import check_fields, parse_file, parse_json, read_file, read_values
from longreach.results.checks import require_distinct, require_kind
from longreach.results.model import Model
from longreach.results.records import (
    Cell,
    ContextRecord,
    DecompositionRecord,
    Entry,
    OffsetRecord,
    Provenance,
    Record,
    RetrievalRecord,
    Skipped,
    SummaryRecord,
    TrainingRecord,
)
from longreach.results.start import Start

VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of one comparison. Immutable: `add` returns a new one.

    Two entries of one key, or two trainings of one model, are a ValueError.
    """

    provenance: Provenance
    """With what it was measured."""
    training: tuple[TrainingRecord, ...] = ()
    """One entry per trained model."""
    records: tuple[Record, ...] = ()
    """Perplexity, in the order in which it was measured, as all that follows is."""
    contexts: tuple[ContextRecord, ...] = ()
    """Loss by context."""
    decompositions: tuple[DecompositionRecord, ...] = ()
    """Where gains past the training length come from."""
    offsets: tuple[OffsetRecord, ...] = ()
    """Loss at shifted positions."""
    retrieval: tuple[RetrievalRecord, ...] = ()
    """Answers found in long prompts."""
    summaries: tuple[SummaryRecord, ...] = ()
    """Summaries of meetings."""
    skipped: tuple[Skipped, ...] = ()
    """What could not be evaluated."""
    version: int = VERSION
    """Version of the file format."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.version != VERSION:
            raise ValueError(
                f"version must be {VERSION}, got {self.version!r}: read the file with the longreach that wrote it"
            )
        require_distinct("a cell", (entry.key for entry in self.entries()))
        require_distinct("a training", (entry.key for entry in self.training))

    def add(self, *entries: Entry | TrainingRecord) -> Results:
        """A copy with the entries at the end of the lists that they belong to. ValueError for what belongs to none."""
        for entry in entries:
            if not isinstance(entry, tuple(_LISTS.values())):
                raise ValueError(f"entries of {type(entry).__name__}: add records, as longreach.results has them")
        lists: dict[str, Any] = {
            name: getattr(self, name) + tuple(entry for entry in entries if isinstance(entry, kind))
            for name, kind in _LISTS.items()
        }
        return dataclasses.replace(self, **lists)

    def started(self, starts: tuple[Start, ...]) -> Results:
        """A copy that came from these starts."""
        return dataclasses.replace(self, provenance=dataclasses.replace(self.provenance, starts=starts))

    def entries(self) -> tuple[Entry, ...]:
        """All that was evaluated or skipped."""
        return tuple(entry for name in _LISTS if name != "training" for entry in getattr(self, name))

    def cells(self) -> set[Cell]:
        """The pieces of work that are finished, measured or skipped."""
        return {entry.cell for entry in self.entries()}

    def failures(self) -> dict[Model, str]:
        """The models that work broke off at with an error, and the error."""
        return {entry.model: entry.reason for entry in self.skipped if entry.failed}

    def without(self, model: Model) -> Results:
        """A copy without anything of a model."""
        lists: dict[str, Any] = {
            name: tuple(entry for entry in getattr(self, name) if entry.model != model) for name in _LISTS
        }
        return dataclasses.replace(self, **lists)

    def without_failures(self) -> Results:
        """A copy without what broke off with an error, to try it again."""
        return dataclasses.replace(self, skipped=tuple(entry for entry in self.skipped if not entry.failed))

    def models(self) -> tuple[Model, ...]:
        """All models, in order of appearance."""
        return tuple(dict.fromkeys(entry.model for entry in (*self.training, *self.entries())))

    def methods(self, train_length: int | None = None) -> tuple[str, ...]:
        """Names of the methods, trained at `train_length` if given, in order of appearance."""
        models = (model for model in self.models() if train_length in (None, model.train_length))
        return tuple(dict.fromkeys(model.name for model in models))

    def train_lengths(self) -> tuple[int, ...]:
        """The training lengths, ascending."""
        return tuple(sorted({model.train_length for model in self.models()}))

    def valid_lengths(self, train_length: int) -> tuple[int, ...]:
        """The lengths at which perplexity in nonoverlapping windows of models trained at `train_length` was measured or
        skipped, ascending.
        """
        wanted = ("perplexity", train_length, "nonoverlapping")
        entries: tuple[Record | Skipped, ...] = (*self.records, *self.skipped)
        return tuple(sorted({e.valid_length for e in entries if (e.task, e.train_length, e.protocol) == wanted}))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write strict JSON, whole or not at all.

        Raises:
            OSError: the system does; the old file then stays.
            TypeError: path is none.
        """
        path = _path(path)
        document: dict[str, Any] = {"version": self.version, "provenance": dataclasses.asdict(self.provenance)}
        for name in _LISTS:
            document[name] = list(map(_table, getattr(self, name)))
        write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `write` wrote.

        Raises OSError when the file cannot be read, and ValueError, in one line that names the file, the field and
        the mend, when it is damaged, of another version, or holds missing, unknown, mistyped or contradictory values;
        TypeError for what is no path.
        """
        path = _path(path)
        try:
            document = parse_file(path)
            if not isinstance(document, dict) or type(document.get("version")) is not int:
                raise ValueError("there is no version: this is not a longreach results file")
            if document["version"] != VERSION:
                raise ValueError(
                    f"version {document['version']} is not {VERSION}: read it with the longreach that wrote it"
                )
            if missing := [name for name in _LISTS if name not in document]:
                raise ValueError(f"{missing[0]} is missing: restore the file from a backup or run again")
            return read_values(cls, document)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


_LISTS: dict[str, type[Any]] = {
    name: get_args(hint)[0] for name, hint in get_type_hints(Results).items() if get_origin(hint) is tuple
}
"""Name of each list of `Results` -> kind of its entries."""


def _path(path: str | os.PathLike[str]) -> Path:
    require_kind("path", path, (str, os.PathLike), "a path")
    return Path(path)


def _table(entry: Any) -> dict[str, Any]:
    """The fields of an entry, those of its model without a shape where it has none."""
    fields = dataclasses.asdict(entry)
    if fields["model"]["shape"] is None:
        del fields["model"]["shape"]
    return fields


def pack_entries(entries: Sequence[Entry]) -> str:
    """Entries as JSON, for another process."""
    of_kinds = {name: [entry for entry in entries if isinstance(entry, kind)] for name, kind in _LISTS.items()}
    return json.dumps({name: list(map(_table, listed)) for name, listed in of_kinds.items()})


def unpack_entries(text: str) -> list[Entry]:
    """What `pack_entries` was given, kind by kind."""
    lists = parse_json(text)
    return [read_values(kind, values) for name, kind in _LISTS.items() for values in lists[name]]


def write_training(training: TrainingRecord, path: str | os.PathLike[str]) -> None:
    """Write the record of one training as JSON, whole or not at all.

    Args:
        training: the record.
        path: of the file, as a run has it: training.json.

    Raises:
        OSError: the system does; the old file then stays.
        TypeError: path is none.
    """
    write_atomically(_path(path), (json.dumps(_table(training), indent=2) + "\n").encode())


def read_training(path: str | os.PathLike[str]) -> TrainingRecord:
    """Read what `write_training` wrote.

    Args:
        path: of the file, as a run has it: training.json.

    Returns:
        The record of the training.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged, or holds missing, unknown, mistyped or contradictory values.
        TypeError: path is none.
    """
    return read_file(TrainingRecord, _path(path))
