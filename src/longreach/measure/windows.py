"""Which tokens are scored in which window: the protocols of evaluation as arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A stretch of a token sequence: inputs start <= t < stop, of which each predicts token t + 1."""

    start: int
    stop: int
    scored: int
    """How many of its last predictions are scored here; those before were scored in earlier windows."""


def windows(num_targets: int, valid_length: int, stride: int) -> Iterator[Window]:
    """Windows of at most valid_length inputs that score every target once.

    Stride S is the number of tokens newly scored in each window but the first, which scores all of its own.
    S = L_valid is nonoverlapping evaluation, S < L_valid a sliding window (Press et al., 2022, appendix B). The
    last window may be shorter.

    Args:
        num_targets: how many tokens there are to predict, at least 1: one less than there are tokens.
        valid_length: L_valid, the number of inputs of a window, at least 1.
        stride: S, at least 1 and at most valid_length.
    """
    stop = min(valid_length, num_targets)
    yield Window(0, stop, stop)
    while stop < num_targets:
        start = stop + stride - valid_length
        scored = min(stride, num_targets - stop)
        stop += scored
        yield Window(start, stop, scored)
