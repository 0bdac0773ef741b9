"""What is said over several seeds: derived from the entries of single seeds, and never stored.

A perplexity over seeds is e to the mean of their losses, nll / tokens: perplexities are averaged in log space.
A mean over n seeds comes with the 95% interval of Student's t for n values of unknown spread: mean -+ t s / sqrt(n),
with s their standard deviation and t the quantile for n - 1 degrees of freedom. Two methods are compared by the
differences at each seed that they share, where all that a seed brings to both (the order of batches, weights that both
have) cancels. The interval speaks for other seeds on the same text, that of a bootstrap for other texts and the same
model.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longreach.results.checks import require_kind
from longreach.results.records import Scored, exponentiated

CONFIDENCE = 0.95
"""Share of repetitions in which an interval holds the mean of all seeds, where values are normally distributed."""


@dataclass(frozen=True)
class OverSeeds:
    """A figure over seeds."""

    mean: float
    """Of the values at each seed."""
    low: float | None
    """Lower end of the 95% t interval of the mean; None for one seed, which has no spread."""
    high: float | None
    """Upper end of it."""
    n: int
    """How many seeds."""

    def exponentiated(self) -> "OverSeeds":
        """e to the power of each: a mean of losses becomes a perplexity, a difference of losses a ratio of them.

        Averaged are losses, in nats per token, and never perplexities: of these one bad seed would outweigh all others,
        and the ratio of two means would not be the mean of the ratios at each seed.
        """
        low, high = (None if end is None else exponentiated(end) for end in (self.low, self.high))
        return OverSeeds(exponentiated(self.mean), low, high, self.n)


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """The mean of a figure's values, one for each seed, and its 95% interval of Student's t: mean -+ t s / sqrt(n).

    Args:
        values: of any unit, which mean and interval have too. For perplexities give losses in nats per token:
            `OverSeeds.exponentiated` makes the one of the other.

    Returns:
        The figure over seeds; without an interval where there is one value.

    Raises:
        ValueError: there are none.
        TypeError: they are no list.
    """
    require_kind("values", values, Sequence, "a list of numbers")
    n = len(values)
    if not n:
        raise ValueError("values is empty: give a figure for at least one seed")
    mean = statistics.fmean(values)
    if n == 1:
        return OverSeeds(mean, None, None, n)
    half = t_quantile(CONFIDENCE, n - 1) * statistics.stdev(values, mean) / math.sqrt(n)
    return OverSeeds(mean, mean - half, mean + half, n)


def loss_difference(ours: Iterable[Scored], theirs: Iterable[Scored]) -> OverSeeds | None:
    """The paired difference of two losses, ours - theirs, in nats per token.

    `exponentiated` it is a perplexity over the other. The two are of two methods at one length, or of one at two. None
    where they share no seed, or did not score the same tokens at one that they share.

    Args:
        ours: each of another seed.
        theirs: likewise; seeds that the other has not are left out.

    Raises:
        ValueError: two of one side are of one seed.
    """
    left, right = _by_seed(ours), _by_seed(theirs)
    pairs = [(left[seed], right[seed]) for seed in left if seed in right]
    if not pairs or len({_text_of(entry) for pair in pairs for entry in pair}) > 1:
        return None
    return over_seeds([one.loss - two.loss for one, two in pairs])


def t_quantile(confidence: float, freedom: int) -> float:
    """The t that Student's T with so many degrees of freedom is within, |T| <= t, with this probability below 1.

    For whole degrees of freedom nu the probability is a finite sum in theta = atan(t / sqrt(nu)) (Abramowitz & Stegun,
    1964, 26.7.3 and 26.7.4); it grows with theta, which is found by halving.
    """
    low, high = 0.0, math.pi / 2
    while (theta := (low + high) / 2) not in (low, high):
        if _probability_within(theta, freedom) < confidence:
            low = theta
        else:
            high = theta
    return math.sqrt(freedom) * math.tan(theta)


def _probability_within(theta: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) * tan(theta))."""
    odd = freedom % 2
    total, term = 0.0, math.cos(theta) if odd else 1.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * math.cos(theta) ** 2
    sum_of_terms = math.sin(theta) * total
    return 2 / math.pi * (theta + sum_of_terms) if odd else sum_of_terms


def _by_seed(entries: Iterable[Scored]) -> dict[int | None, Scored]:
    found: dict[int | None, Scored] = {}
    for entry in entries:
        if entry.seed in found:
            raise ValueError(f"entries has seed {entry.seed} twice: give each seed once")
        found[entry.seed] = entry
    return found


def _text_of(entry: Scored) -> tuple[int, int | None]:
    """What tells texts apart: the same number of tokens is more or fewer bytes to another tokenizer."""
    return entry.tokens, getattr(entry, "bytes", None)
