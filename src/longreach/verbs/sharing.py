"""A subject whose windows several processes share."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from longreach.measure.score import token_nll
from longreach.measure.subject import Subject
from longreach.models.decoder import Decoder
from longreach.parallel.sharing import Sharing
from longreach.results import Exchanged
from longreach.train.context import exchanged, share_sequences
from longreach.train.parallel import Ranks


def shared_subject(subject: Subject, ranks: Ranks) -> Subject:
    """A subject that is a decoder of our own, each of whose windows all ranks compute together, a piece each."""
    model = subject.model
    assert isinstance(model, Decoder)  # the model of a run
    return replace(subject, nll=PieceScorer(model, share_sequences(model, ranks, ranks.size, evenly=False), ranks))


@dataclass(frozen=True)
class PieceScorer:
    """Scores windows by pieces: each rank holds the activations of its own, and all know the nll of all."""

    model: Decoder
    """The same on all ranks; its attention is that of `sharing`."""
    sharing: Sharing
    """Which rank has which piece."""
    ranks: Ranks

    def __call__(self, inputs: Tensor, targets: np.ndarray, vocab_size: int, positions: Tensor | None) -> np.ndarray:
        """As `longreach.measure.subject.Nll`."""
        length, scored = inputs.shape[1], targets.shape[1]
        columns = self.sharing.columns(length)
        tokens, first = inputs[:, columns], columns.start + (0 if positions is None else int(positions[0, 0]))
        positions = torch.arange(first, first + tokens.shape[1], device=inputs.device)[None]
        # The last `scored` tokens of the window are scored, of which each piece has some, or none.
        borders = [max(0, border - (length - scored)) for border in self.sharing.borders(length)]
        own = slice(*borders[self.sharing.place : self.sharing.place + 2])
        if own.start < own.stop:
            logits = partial(self.model.logits, length=length)
            found = token_nll(logits, tokens, targets[:, own], vocab_size, positions)
        else:  # others may need its keys
            self.model.hidden(tokens, positions=positions, length=length)
            found = np.empty((len(inputs), 0))
        counts = [past - first for first, past in pairwise(borders)]
        joined: np.ndarray = self.sharing.joined(torch.from_numpy(found), counts).numpy()
        return joined

    def exchanged(self) -> Exchanged:
        """As `longreach.measure.subject.Nll`."""
        return exchanged(self.sharing, self.ranks)
