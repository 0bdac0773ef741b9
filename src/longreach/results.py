"""`results.json`: what was measured, with what it was measured, and what was left out.

One file holds one comparison. Reports are made from it alone, so a record carries the sums (nll, tokens, bytes)
and not only the figures derived from them. The file is strict JSON (no NaN, no Infinity):

    {"version": 1, "provenance": {...}, "training": [{...}], "records": [{...}], "skipped": [{...}]}

with one object per dataclass below and exactly its fields as keys. One value needs a convention: a perplexity
above e^709 does not fit a double, is `math.inf` in Python and `null` in the file. Its nll is there, exact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One evaluation of the grid, measured (`Record`) or not (`Skipped`)."""

    method: str
    """Position method with its options, as the user wrote it: `alibi`, `rotary:scaling=ntk`."""
    train_length: int
    """Tokens per training sequence, the paper's L."""
    valid_length: int
    """Tokens per evaluation window, the paper's L_valid."""
    stride: int
    """Tokens newly scored in each window."""
    protocol: str
    """How the windows were laid: `nonoverlapping` has stride = valid_length."""

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_positive(self, "train_length", "valid_length", "stride")

    @property
    def cell(self) -> tuple[str, int, int, int, str]:
        """What identifies this evaluation: method, train_length, valid_length, stride, protocol."""
        return self.method, self.train_length, self.valid_length, self.stride, self.protocol


@dataclass(frozen=True, kw_only=True)
class Record(Cell):
    """One evaluated cell: a method, trained at one length, scored at another.

    Make one with `Record.from_sums`, which derives `perplexity` and `bits_per_byte`. A record whose derived figures
    contradict its sums is a ValueError, as are values of the wrong type or range.
    """

    nll: float
    """Negative log likelihood summed over the scored tokens, in nats."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes that the scored tokens stand for."""
    perplexity: float
    """exp(nll / tokens): per token. `math.inf` from e^709 on."""
    bits_per_byte: float
    """nll / (ln 2 * bytes): comparable between tokenizers, which perplexity is not."""
    mean_context: float
    """Tokens that a scored token could see before it, averaged over the scored tokens."""
    tokens_per_second: float
    """Scored tokens per second of evaluation."""
    seconds: float
    """Wall-clock time of this cell's evaluation."""
    peak_memory: int | None
    """Peak memory of the evaluation in bytes; None where it could not be measured."""
    attention: str
    """The attention implementation that ran."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tokens", "bytes", "tokens_per_second")
        _require_not_negative(self, "nll", "mean_context", "seconds", "peak_memory")
        for name, expected in _derived(self.nll, self.tokens, self.bytes).items():
            # Both figures come from the same doubles. Another order of operations moves nll / tokens by an ulp, which
            # exp magnifies by nll / tokens; exp itself and the three operations around it give at most an ulp each.
            tolerance = (self.nll / self.tokens + 4) * sys.float_info.epsilon
            if not math.isclose(getattr(self, name), expected, rel_tol=tolerance):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} but nll, tokens and bytes give {expected!r}:"
                    " build the record with Record.from_sums"
                )

    @classmethod
    def from_sums(cls, *, nll: float, tokens: int, bytes: int, **other: Any) -> Record:
        """Derive perplexity = exp(nll / tokens) and bits_per_byte = nll / (ln 2 * bytes), and build the record.

        nll: nats, summed over the `tokens` scored tokens, which stand for `bytes` bytes of UTF-8.
        other: the remaining fields of `Record`.
        Raises ValueError for sums that are not finite, not positive or of the wrong type.
        """
        for name, value, kind in (("nll", nll, float), ("tokens", tokens, int), ("bytes", bytes, int)):
            _checked(value, kind, name)
        if tokens <= 0 or bytes <= 0:
            raise ValueError(f"tokens and bytes must be positive, got {tokens} and {bytes}: score at least one token")
        return cls(nll=nll, tokens=tokens, bytes=bytes, **_derived(nll, tokens, bytes), **other)


@dataclass(frozen=True, kw_only=True)
class Skipped(Cell):
    """One cell that was asked for and could not be evaluated."""

    reason: str
    """Why, in one sentence for the reader of the report."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What training one method took and where it arrived."""

    method: str
    """As in `Record`."""
    train_length: int
    """Tokens per training sequence."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens seen, repeats counted."""
    parameters: int
    """Trainable parameters."""
    final_loss: float
    """Mean training nll over the last logged steps, in nats per token."""
    tokens_per_second: float
    """Training tokens per second, evaluation and checkpoints left out."""
    seconds: float
    """Wall-clock time of the training steps."""
    peak_memory: int | None
    """Peak memory of training in bytes; None where it could not be measured."""
    attention: str
    """The attention implementation that ran."""

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_positive(self, "train_length", "steps", "tokens", "parameters", "tokens_per_second")
        _require_not_negative(self, "final_loss", "seconds", "peak_memory")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What it takes to run the comparison again and to trust that it is the same one."""

    longreach: str
    """Version of this package."""
    torch: str
    """Version of PyTorch."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and machine, as `platform.platform()` gives it."""
    device: str
    """The device that computed: `cpu`, `cuda:0`."""
    num_threads: int
    """Threads that PyTorch computed with."""
    git_commit: str | None
    """Commit of the longreach checkout; None when it was installed as a package."""
    seed: int
    """Seed of initial weights and of the order of batches."""
    corpus: str
    """The corpus as the user named it."""
    corpus_hash: str
    """Hash of the corpus' content."""
    tokenizer_hash: str
    """Hash of the tokenizer."""
    vocab_size: int
    """Size of the tokenizer's vocabulary."""
    created: str
    """When the run began: ISO 8601, UTC."""
    config: dict[str, Any]
    """The resolved configuration, in values that JSON knows; tuples become lists."""

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_positive(self, "num_threads", "vocab_size")
        object.__setattr__(self, "config", _plain(self.config, "config"))
        try:
            offset = datetime.fromisoformat(self.created).utcoffset()
        except ValueError:
            offset = None
        if offset != timedelta(0):
            raise ValueError(
                f"created must be a UTC time in ISO 8601, got {self.created!r}: write it as 2026-01-31T12:00:00+00:00"
            )


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of one comparison. Immutable: `add` returns a new one.

    Two entries for one cell, or two trainings of one method at one length, are a ValueError.
    """

    provenance: Provenance
    """With what it was measured."""
    training: tuple[TrainingRecord, ...] = ()
    """One entry per trained model."""
    records: tuple[Record, ...] = ()
    """The evaluated cells, in the order in which they were measured."""
    skipped: tuple[Skipped, ...] = ()
    """The cells that could not be evaluated."""
    version: int = VERSION
    """Version of the file format."""

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(
                f"version must be {VERSION}, got {self.version!r}: read the file with the longreach that wrote it"
            )
        _require_distinct("a cell", (entry.cell for entry in self._cells()))
        _require_distinct("a training", ((entry.method, entry.train_length) for entry in self.training))

    def add(self, *entries: Record | Skipped | TrainingRecord) -> Results:
        """A copy with the entries at the end of the lists that they belong to."""
        lists: dict[str, Any] = {
            name: getattr(self, name) + tuple(entry for entry in entries if isinstance(entry, kind))
            for name, kind in _LISTS.items()
        }
        return dataclasses.replace(self, **lists)

    def find(
        self,
        method: str,
        train_length: int,
        valid_length: int,
        *,
        stride: int | None = None,
        protocol: str = "nonoverlapping",
    ) -> Record | Skipped | None:
        """The entry of one cell; None when it was never asked for. `stride` is `valid_length` unless given."""
        cell = (method, train_length, valid_length, valid_length if stride is None else stride, protocol)
        return next((entry for entry in self._cells() if entry.cell == cell), None)

    def methods(self, train_length: int | None = None) -> tuple[str, ...]:
        """Names of the methods, trained at `train_length` if given, in order of appearance."""
        trained = ((entry.method, entry.train_length) for entry in (*self.training, *self._cells()))
        return tuple(dict.fromkeys(method for method, length in trained if train_length in (None, length)))

    def train_lengths(self) -> tuple[int, ...]:
        """The training lengths, ascending."""
        return tuple(sorted({entry.train_length for entry in (*self.training, *self._cells())}))

    def valid_lengths(self, train_length: int, protocol: str = "nonoverlapping") -> tuple[int, ...]:
        """The lengths at which models trained at `train_length` were evaluated or skipped, ascending."""
        wanted = (train_length, protocol)
        return tuple(sorted({e.valid_length for e in self._cells() if (e.train_length, e.protocol) == wanted}))

    def _cells(self) -> tuple[Record | Skipped, ...]:
        return (*self.records, *self.skipped)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write strict JSON, whole or not at all. Raises OSError where the system does (the old file then stays)."""
        document: dict[str, Any] = {"version": self.version, "provenance": dataclasses.asdict(self.provenance)}
        for name in _LISTS:
            document[name] = [_encode(entry) for entry in getattr(self, name)]
        write_atomically(Path(path), (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `write` wrote.

        Raises OSError when the file cannot be read, and ValueError, in one line that names the file, the field and
        the mend, when it is damaged, of another version, or holds missing, unknown, mistyped or contradictory values.
        """
        try:
            document = _parse(Path(path).read_bytes())
            if not isinstance(document, dict) or type(document.get("version")) is not int:
                raise ValueError("there is no version: this is not a longreach results file")
            if document["version"] != VERSION:
                raise ValueError(
                    f"version {document['version']} is not {VERSION}: read it with the longreach that wrote it"
                )
            _check_keys(cls, document)
            lists: dict[str, Any] = {}
            for name, kind in _LISTS.items():
                if not isinstance(document[name], list):
                    raise ValueError(f"{name} must be a list: restore the file from a backup or run again")
                lists[name] = tuple(
                    _decode(kind, item, f"{name}[{index}]") for index, item in enumerate(document[name])
                )
            return cls(provenance=_decode(Provenance, document["provenance"], "provenance"), **lists)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


_LISTS: dict[str, type[Any]] = {"training": TrainingRecord, "records": Record, "skipped": Skipped}


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all: written beside it, synced, renamed over it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _derived(nll: float, tokens: int, bytes: int) -> dict[str, Any]:
    # The limit is put on the quotient, which is the same double on every machine; where exp overflows is not.
    nats = nll / tokens
    return {"perplexity": math.exp(nats) if nats < 709 else math.inf, "bits_per_byte": nll / (math.log(2) * bytes)}


_KINDS: dict[Any, tuple[str, tuple[type[Any], ...]]] = {
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
    int | None: ("an integer or null", (int, type(None))),
    str | None: ("a string or null", (str, type(None))),
    dict[str, Any]: ("an object", (dict,)),
}


def _checked(value: Any, kind: Any, name: str) -> Any:
    """`value` itself if it is of the kind; an integer where a number is due becomes a float."""
    description, types = _KINDS[kind]
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{name} must be {description}, got {value!r}: correct the value or run again")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} does not fit 64 bits: correct the value or run again")
    if kind is not float:
        return value
    number = float(value)
    if math.isnan(number) or (math.isinf(number) and name != "perplexity"):
        raise ValueError(f"{name} must be finite, got {number!r}: list the cell as skipped, with the reason")
    return number


def _check_fields(entry: Any) -> None:
    """Check every field's type; integers given for numbers become floats."""
    for name, kind in get_type_hints(type(entry)).items():
        object.__setattr__(entry, name, _checked(getattr(entry, name), kind, name))
    if getattr(entry, "method", "?") == "":
        raise ValueError("method must not be empty: name the position method")


def _require_positive(entry: Any, *names: str) -> None:
    for name in names:
        if getattr(entry, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(entry, name)!r}: correct the value or run again")


def _require_not_negative(entry: Any, *names: str) -> None:
    for name in names:
        value = getattr(entry, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value!r}: correct the value or run again")


def _require_distinct(what: str, keys: Iterable[tuple[Any, ...]]) -> None:
    seen: set[tuple[Any, ...]] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{what} appears twice, {', '.join(map(str, key))}: keep one of the two")
        seen.add(key)


def _plain(value: Any, name: str) -> Any:
    """`value` in JSON's own types, so that a configuration is equal to itself after writing and reading."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}, which is not a string: convert it first")
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}: give a number or leave the setting out")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} is {value!r}, which JSON does not know: convert it to a string or a number first")


def _encode(entry: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(entry)
    if fields.get("perplexity") == math.inf:
        fields["perplexity"] = None
    return fields


Entry = TypeVar("Entry")


def _decode(cls: type[Entry], value: Any, where: str) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object: restore the file from a backup or run again")
    try:
        _check_keys(cls, value)
        if cls is Record and value["perplexity"] is None:
            value = {**value, "perplexity": math.inf}
        return cls(**value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(cls: type[Any], value: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in known:
        if name not in value:
            raise ValueError(f"{name} is missing: restore the file from a backup or run again")
    for name in value:
        if name not in known:
            raise ValueError(f"{name!r} is not a known key: remove it, or choose from {', '.join(known)}")


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object_of_distinct_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"damaged JSON ({error}): restore the file from a backup or run again") from error
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text: restore the file from a backup or run again") from error
    except RecursionError as error:
        raise ValueError("nested too deeply for a results file: restore the file or run again") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON: a perplexity that overflows is written null, nothing else may be infinite")


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {twice!r} appears twice in one object: keep one of the two")
    return keys
