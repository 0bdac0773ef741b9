"""Synthetic sequences among the training text: `retrieval=0.2` makes a fifth of all sequences retrieval ones."""

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from longreach.data.batches import BatchSource
from longreach.data.sequences import Sequences
from longreach.data.synthetic import RetrievalSequences
from longreach.data.tokenizer import Tokenizer

SEQUENCES = {"retrieval": RetrievalSequences}
"""What can be mixed in, by name."""


def parse_mix(mix: Sequence[str]) -> dict[str, float]:
    """The share of all sequences that each of NAME=SHARE asks for.

    Raises:
        ValueError: a name is unknown or comes twice, or a share is not positive or exceeds 1.
    """
    shares: dict[str, float] = {}
    for item in mix:
        name, _, number = item.partition("=")
        if name not in SEQUENCES:
            raise ValueError(f"mix={item!r}: give NAME=SHARE, as in retrieval=0.2; names are {', '.join(SEQUENCES)}")
        if name in shares:
            raise ValueError(f"mix={','.join(mix)}: give {name} once")
        try:
            shares[name] = float(number)
        except ValueError:
            shares[name] = 0.0
        if not 0 < shares[name] <= 1:
            raise ValueError(f"mix={item!r}: give a share of more than 0 and at most 1, as in {name}=0.2")
    return shares


class MixedBatches(BatchSource):
    """Training batches in which some sequences give way to synthetic ones: a pure function of the seed and the step.

    The other sequences are those that `batches` has in the same places; what gave way is not trained on in that
    epoch.

    Args:
        batches: the text.
        length: tokens that a sequence predicts, T.
        mix: each NAME=SHARE of `parse_mix`.
        tokenizer: of the text.
        seed: of the draws.

    Raises:
        ValueError: as `parse_mix`; or sequences are too short for what is mixed in.
    """

    def __init__(self, batches: BatchSource, length: int, mix: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        self._batches = batches
        self.description, self.steps_per_epoch = batches.description, batches.steps_per_epoch
        self._seed = seed
        self._mixed = []
        for name, share in parse_mix(mix).items():
            try:
                self._mixed.append((SEQUENCES[name](tokenizer, length + 1), share))
            except ValueError as error:
                raise ValueError(f"mix={','.join(mix)}: {error}") from error

    @property
    def cut_documents(self) -> int | None:
        """Those of the text."""
        return self._batches.cut_documents

    def close(self) -> None:
        """End what reads the text ahead."""
        self._batches.close()

    def state(self, step: int) -> dict[str, Any]:
        """That of the text; what is mixed in has none."""
        return self._batches.state(step)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._batches.restore(state)

    def rows(self, step: int, rows: range) -> Sequences:
        """The sequences in these places of the batch of training step `step` >= 0."""
        batch = self._batches.rows(step, rows)
        for row, index in enumerate(rows):
            random = Random(f"{self._seed} {step} {index}")  # a string is hashed, so that neighbours share nothing
            draw = random.random()
            for sequences, share in self._mixed:
                if 0 <= draw < share:
                    drawn = sequences.draw(random)
                    batch.tokens[row], batch.targets[row] = drawn[:-1], drawn[1:]
                    if batch.places is not None:
                        batch.places[row] = np.arange(len(drawn) - 1)
                draw -= share
        return batch
