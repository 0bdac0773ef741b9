"""Which model an entry is of."""

from dataclasses import dataclass

from longreach.reading import check_fields
from longreach.results.checks import require_positive


@dataclass(frozen=True)
class Model:
    """The identity of a model under test, which all entries refer to: equal where all fields are equal."""

    method: str
    """Position method with its options, as the user wrote it: `alibi`, `rotary:scaling=ntk`. Of a model that was
    trained elsewhere the name that the user gave. After a colon the scaling that it was tested under, where that is not
    as it was trained: `rotary:ntk`."""
    train_length: int
    """Tokens per training sequence, the paper's L."""
    seed: int | None
    """Of the initial weights and of the order of batches; None for a model that was trained elsewhere."""
    shape: str | None = None
    """Layers x width, as in 2x128, in a comparison of several shapes; None where there is one."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.method:
            raise ValueError("method must not be empty: name the position method")
        require_positive(self, "train_length")

    @property
    def name(self) -> str:
        """What tables call it: its method, after a colon its shape where there are several."""
        return self.method if self.shape is None else f"{self.method}:{self.shape}"

    def __str__(self) -> str:
        seeded = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.name} trained at {self.train_length:,}{seeded}"
