"""What a claim of docs/claims.md is made of, and how its numbers are read from results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longreach.report.grid import MISSING, Grid, format_perplexity
from longreach.results import OverSeeds, Record, Results, loss_difference, over_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOLDS, IN_PART, NOT_HERE = "Holds", "Holds in part", "Does not hold here"


@dataclass(frozen=True)
class Judgement:
    """What our numbers say of a claim."""

    verdict: str
    """HOLDS, IN_PART or NOT_HERE."""
    findings: tuple[str, ...]
    """Sentences with the figures that it rests on."""
    tables: tuple[Grid, ...]
    """Our numbers, with intervals over seeds."""


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and how an experiment judges it. `experiments.page` writes it down."""

    title: str
    """Its heading."""
    statement: str
    """What the paper says, with its figures and where they stand."""
    rule: str
    """When it is said to hold here: stated before the numbers."""
    judge: Callable[[Results], Judgement]
    """Judges the results of the experiment."""
    caveats: str
    """What keeps our numbers from speaking for the paper's size."""
    figure: Callable[[Results], Figure] | None = None
    """Draws the numbers, where a picture says more than the tables."""
    caption: str = ""
    """What the figure shows."""


def verdict(parts: Iterable[bool]) -> str:
    """HOLDS where all parts of a claim are borne out, IN_PART where some are."""
    seen = set(parts)
    return HOLDS if seen == {True} else IN_PART if True in seen else NOT_HERE


def records(
    results: Results, method: str, train_length: int, valid_length: int, protocol: str = "nonoverlapping"
) -> list[Record]:
    """Perplexity of one method at one length, a record for each seed."""
    wanted = (method, train_length, valid_length, protocol)
    return [r for r in results.records if (r.method, r.train_length, r.valid_length, r.protocol) == wanted]


def perplexity(entries: list[Record]) -> OverSeeds | None:
    """Perplexity over seeds: e to the mean of losses, with its 95% t interval."""
    return over_seeds([entry.loss for entry in entries]).exponentiated() if entries else None


def ratio(ours: list[Record], theirs: list[Record]) -> OverSeeds:
    """Perplexity over perplexity, paired by seed. ValueError where they share no seed or scored other tokens."""
    difference = loss_difference(ours, theirs)
    if difference is None:
        raise ValueError("ratio: the two share no seed, or did not score the same tokens")
    return difference.exponentiated()


def told(figure: OverSeeds | None, text: Callable[[float], str] = format_perplexity) -> str:
    """`42.1 [41.8, 42.4]`."""
    if figure is None:
        return MISSING
    ends = "" if figure.low is None or figure.high is None else f" [{text(figure.low)}, {text(figure.high)}]"
    return text(figure.mean) + ends


def times(figure: float) -> str:
    """`1.31x`; three decimals, for ratios near to 1 are what many claims are about."""
    return f"{figure:.3f}x" if figure < 10 else f"{format_perplexity(figure)}x"


def is_below(figure: OverSeeds, level: float) -> bool:
    """Whether all of the interval is below a level; of one seed the figure itself."""
    return (figure.mean if figure.high is None else figure.high) < level


def is_above(figure: OverSeeds, level: float) -> bool:
    """Whether all of the interval is above a level; of one seed the figure itself."""
    return (figure.mean if figure.low is None else figure.low) > level


def decomposed(results: Results, method: str, valid_length: int, part: str) -> OverSeeds:
    """A part of the gain, in nats per token over seeds: "gain", "relief" or "beyond"."""
    found = [e for e in results.decompositions if (e.method, e.valid_length) == (method, valid_length)]
    return over_seeds([getattr(entry, part) for entry in found])
