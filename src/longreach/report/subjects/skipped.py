"""What could not be measured, and why."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

from longreach.report.grid import Grid
from longreach.report.section import Finding, Section
from longreach.results import Model, Results

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def sections(results: Results) -> Iterator[Section]:
    """What was left out."""
    if results.skipped:
        failed = tuple(
            Finding(f"Work on {model} broke off: {reason}", "The command that asked for it tries it again.")
            for model, reason in results.failures().items()
        )
        yield Section("What was left out", failed, tables=(skipped_grid(results),))


def skipped_grid(results: Results) -> Grid:
    """What could not be evaluated: a row for all models that lack the same measurements for the same reason."""
    skipped: dict[tuple[str, Model], dict[str, set[int]]] = {}
    for entry in results.skipped:
        lengths = skipped.setdefault((entry.reason, entry.model), {})
        lengths.setdefault(entry.protocol or entry.task, set()).add(entry.valid_length)
    alike = _together(
        ((reason, _missed(by), model.train_length, model.name), model) for (reason, model), by in skipped.items()
    )
    models = _together(((reason, missed, n), _named(results, alone)) for (reason, missed, n, _), alone in alike.items())
    rows = _together(((reason, missed, tuple(methods)), n) for (reason, missed, n), methods in models.items())
    return Grid(
        title="Skipped",
        note="",
        columns=(("reason",), ("methods",), ("trained at",), ("measurements, and their validation lengths",)),
        rows=tuple(
            (reason, ", ".join(methods), ", ".join(f"{n:,}" for n in lengths), missed)
            for (reason, missed, methods), lengths in rows.items()
        ),
        text_columns=4,
    )


def _named(results: Results, models: list[Model]) -> str:
    """The method of all models, and their seeds where the method has others."""
    method, train_length = models[0].name, models[0].train_length
    others = [model for model in results.models() if (model.name, model.train_length) == (method, train_length)]
    if len(others) == len(models):
        return method
    seeds = " and ".join(str(model.seed) for model in models)
    return f"{method} (seed{'s' if len(models) > 1 else ''} {seeds})"


def _missed(by_measurement: dict[str, set[int]]) -> str:
    """`cached, positions at 128, 256; offsets at 64`."""
    alike = _together((tuple(sorted(lengths)), measurement) for measurement, lengths in by_measurement.items())
    clauses = ((", ".join(names), ", ".join(f"{n:,}" for n in lengths)) for lengths, names in alike.items())
    return "; ".join(f"{names} at {lengths}" for names, lengths in clauses)


def _together(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """The values of each key, both in order of appearance."""
    found: dict[Key, list[Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found
