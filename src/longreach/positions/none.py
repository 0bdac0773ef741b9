"""No position method: the causal mask alone tells tokens apart (Haviv et al., 2022, arXiv 2203.16634)."""

from longreach.positions.method import ModelSize, NoOptions, PositionMethod


class NonePositions(PositionMethod):
    """Adds nothing anywhere."""

    def __init__(self, options: NoOptions, size: ModelSize):
        super().__init__()
