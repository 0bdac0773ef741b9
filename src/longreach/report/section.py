"""What a subject gives to the page: a section of conclusions, a picture and tables; and how its sentences are built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from longreach.report.drawing import Theme
from longreach.report.grid import Grid
from longreach.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 6
"""So many methods are named one by one in a sentence; the rest are counted."""


@dataclass(frozen=True)
class Finding:
    """A conclusion and what it rests on."""

    sentence: str
    details: str = ""
    """The figures behind it; may be empty."""
    certainty: str = ""
    """How sure one can be of it; may be empty."""


@dataclass(frozen=True)
class Picture:
    """A figure that is still to be drawn, once for each theme."""

    name: str
    """Of its files."""
    draw: Callable[[Theme], Figure]
    alternative: str
    """What it shows, for those who do not see it."""


@dataclass(frozen=True)
class Section:
    """A part of the page: what to conclude, what it is seen in, and the numbers."""

    title: str
    findings: tuple[Finding, ...] = ()
    """What to conclude and how sure one can be; with several training lengths, one for each."""
    picture: Picture | None = None
    reading: str = ""
    """How to read the picture or the tables; may be empty."""
    tables: tuple[Grid, ...] = ()
    further: tuple[Grid, ...] = ()
    """Tables that the page shows after those, and the terminal does not."""
    source: tuple[str, str] | None = None
    """Name and address of what is quoted."""

    @property
    def certainties(self) -> tuple[str, ...]:
        """How sure one can be, each way of saying it once."""
        return tuple(dict.fromkeys(finding.certainty for finding in self.findings if finding.certainty))


Made = TypeVar("Made")


def at_each(
    make: Callable[[Results, int], Made | None], results: Results, lengths: Iterable[int] | None = None
) -> tuple[Made, ...]:
    """What `make` gives at each training length, or at `lengths` alone; where it gives None there is nothing."""
    lengths = results.train_lengths() if lengths is None else lengths
    return tuple(made for length in lengths if (made := make(results, length)) is not None)


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`; of many the first few and how many more."""
    if len(names) > NAMED:
        names = [*names[: NAMED - 1], f"{len(names) - NAMED + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def clauses(verdicts: dict[str, list[str]]) -> str:
    """`falls with alibi; rises with rotary and t5`: each verdict with those that it is passed on."""
    return "; ".join(f"{verdict} {listed(names)}" for verdict, names in verdicts.items() if names)


def first(details: list[str]) -> str:
    """As many as a sentence carries, `a; b; and 3 more`: the tables have the rest."""
    return "; ".join(
        details if len(details) <= NAMED else [*details[: NAMED - 1], f"and {len(details) - NAMED + 1} more"]
    )


def intervals(name: str, resampled: set[str], are_there: bool) -> str:
    """What the intervals that are drawn as `name` were made of, or why there are none."""
    units = listed(sorted(resampled))
    if not are_there:
        return f"There are no intervals, for there was too little to resample ({units})."
    return f"{name}: 95% bootstrap intervals over {units}."
