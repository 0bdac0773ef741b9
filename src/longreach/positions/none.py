"""No position method: the causal mask alone tells tokens apart (Haviv et al., 2022, arXiv 2203.16634)."""

from dataclasses import dataclass

from longreach.positions.method import ModelSize, PositionMethod


@dataclass(frozen=True)
class NoneOptions:
    """No options."""


class NonePositions(PositionMethod):
    """Adds nothing anywhere."""

    def __init__(self, options: NoneOptions, size: ModelSize):
        super().__init__()
