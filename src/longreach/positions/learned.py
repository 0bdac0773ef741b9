"""Learned position embeddings: a table with a row for every position, and no row past its end."""

from dataclasses import dataclass

from torch import Tensor, nn

from longreach.positions.method import ModelSize, PositionMethod


@dataclass(frozen=True)
class LearnedOptions:
    """Options of `learned`."""

    table_length: int | None = None
    """Number of positions that the table holds; the training length when None."""

    def __post_init__(self) -> None:
        if self.table_length is not None and self.table_length < 1:
            raise ValueError(f"table_length={self.table_length}: give at least 1")


class Learned(PositionMethod):
    """x_t + table[t]. It cannot be used past its table, which is what `max_length` tells the model."""

    def __init__(self, options: LearnedOptions, size: ModelSize):
        super().__init__()
        self.max_length = options.table_length or size.train_length
        if self.max_length < size.train_length:
            raise ValueError(
                f"table_length={self.max_length} is below train_length={size.train_length}: give at least that"
            )
        self.table = nn.Embedding(self.max_length, size.d_model)
        nn.init.normal_(self.table.weight, std=size.d_model**-0.5)

    def embed(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Add the table's rows."""
        return embeddings + self.table(positions).to(embeddings.dtype)
