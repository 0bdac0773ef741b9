"""Training batches by the number of their step."""

import functools
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from longreach.data.sequences import Blocks, PackedDocuments, Sequences


class BatchSource(ABC):
    """What training reads."""

    description: str = ""
    """What is to be said of them when training begins."""
    steps_per_epoch: float | None = None
    """How many steps see all text once; None where that is not known."""

    @property
    def cut_documents(self) -> int | None:
        """How many documents were longer than a sequence and are cut into pieces, where documents are packed."""
        return None

    @abstractmethod
    def rows(self, step: int, rows: range) -> Sequences:
        """The sequences in these places of the batch of training step `step` >= 0."""

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold to go on with step `step`, the next, in plain values."""
        return {}

    def close(self) -> None:  # noqa: B027  # most have nothing to end
        """End what reads ahead; no rows are read afterwards."""

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027  # most need nothing
        """Go on from what `state` gave, before any rows are read.

        Raises:
            ValueError: it is the state of something else.
        """


class Batches(BatchSource):
    """Batches as a pure function of the seed and the step, so that resuming needs no state.

    An epoch is every sequence once, in an order drawn anew for each; a batch may hold the end of one and the start of
    the next.

    Args:
        text: the sequences that there are.
        batch_size: sequences in a batch, B.
        seed: of the orders.
    """

    def __init__(self, text: Blocks | PackedDocuments, batch_size: int, seed: int) -> None:
        self.description = text.description
        self.steps_per_epoch = len(text) / batch_size
        self._text = text
        self._batch_size = batch_size
        self._seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)  # two: a batch may span two epochs

    @property
    def cut_documents(self) -> int | None:
        """As `BatchSource` has it."""
        return self._text.cut_documents

    def rows(self, step: int, rows: range) -> Sequences:
        """The sequences in these places of the batch of training step `step` >= 0."""
        places = (divmod(step * self._batch_size + row, len(self._text)) for row in rows)
        return self._text.read(np.array([self._order(epoch)[place] for epoch, place in places]))

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._text))
