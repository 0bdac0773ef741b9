"""A decoder whose sequences lie over many ranks, each of which holds a piece of all of them (context parallelism)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce
from operator import add

import numpy as np
import torch
from torch import Tensor, nn

from longreach.data.sequences import IGNORED
from longreach.models.decoder import Decoder
from longreach.parallel import balanced_pieces
from longreach.parallel.sharing import Sharing
from longreach.results import Exchanged
from longreach.train.config import TrainConfig
from longreach.train.parallel import Loss, Ranks

MOST = 1.25
"""How many times an even share of the tokens, and with them of memory, a rank may have so that ranks take equally long.

With four ranks the busiest then has at most 1.22 times the mean work: that of long sequences and heads without slopes,
where pieces of equal work take 2 times an even share of memory, and even pieces 1.75 times the mean work.
"""


def share_sequences(model: Decoder, ranks: Ranks, context: int, *, evenly: bool) -> Sharing:
    """Let as many ranks as `context`, side by side, compute each sequence of a decoder together; all ranks call it.

    Args:
        model: the decoder.
        ranks: all of them.
        context: how many share a sequence.
        evenly: whether pieces have as many tokens as each other. Else they take as long, as far as `MOST` lets them:
            attention by the slopes that the decoder has now, and what a block does to each token besides, 12 C^2
            products, where a key of a head takes 2 D.

    Raises:
        ValueError: its position method gives a dense bias.
    """
    config, device = model.config, next(model.parameters()).device
    given = model.positions.attend(torch.zeros(1, 1, dtype=torch.int64, device=device), 1, config.train_length)
    if given.bias is not None:
        raise ValueError(
            f"context_parallel={context}: method={config.method} gives a dense bias, of which no rank has all; choose "
            "a position method without one, such as alibi"
        )
    cut = partial(
        balanced_pieces,
        size=context,
        slopes=torch.zeros(config.num_heads) if given.slopes is None else given.slopes.detach().cpu(),
        window_size=1 if evenly else None,  # each token counts alike
        per_token=6 * config.d_model**2 / config.head_dim,
        most=MOST,
    )
    sharing = Sharing(ranks.context_group(context, device), cut)
    model.attend_by(sharing.attention)
    return sharing


def share_loss(model: nn.Module, loss: Loss, ranks: Ranks, config: TrainConfig) -> tuple[Loss, Sharing]:
    """The loss of a model each of whose sequences several ranks compute together; ValueError where they cannot.

    That of a rank is of its piece, weighed by its targets, so that the mean over all ranks is that of the batch.
    """
    context = config.context_parallel
    if not isinstance(model, Decoder):
        raise ValueError(f"context_parallel={context}: this model has attention of its own; leave it out")
    if model.positions.draws_in_training:
        raise ValueError(
            f"context_parallel={context}: method={model.config.method} draws positions in training; leave one of them "
            "out"
        )
    packs = config.packing == "documents"  # which may begin anywhere
    sharing = share_sequences(model, ranks, context, evenly=packs)

    def of_piece(tokens: Tensor, targets: Tensor, positions: Tensor, borders: Tensor | None = None) -> Tensor:
        columns = sharing.columns(tokens.shape[1])
        mean = loss(
            tokens[:, columns],
            targets[:, columns],
            positions[:, columns],
            borders,
            length=tokens.shape[1] if borders is None else None,
        )
        share = (targets[:, columns] != IGNORED).sum() * context / (targets != IGNORED).sum()
        return torch.where(share > 0, mean * share, 0.0)  # the mean over no targets is no number

    return of_piece, sharing


@contextmanager
def unshared(model: nn.Module, sharing: Sharing | None) -> Iterator[None]:
    """In the block each rank computes whole sequences of its own, if it shares them else."""
    if sharing is None:
        yield
        return
    assert isinstance(model, Decoder)  # whose attention is the sharing's
    model.attend_by(None)
    try:
        yield
    finally:
        model.attend_by(sharing.attention)


def exchanged(sharing: Sharing, ranks: Ranks) -> Exchanged:
    """What all ranks have sent to each other since it was last asked for; all of them call it."""
    layers = [reduce(add, sharing.traffic[layer]) for layer in sorted(sharing.traffic)]
    sharing.traffic.clear()
    mine = np.array(
        [(*layer.forward, *layer.backward, layer.bound, layer.all_gather, layer.ring) for layer in layers], dtype=float
    )
    sums = (np.array(ranks.mean(*mine.flat)) * ranks.size).round().astype(int).reshape(mine.shape)
    by_head = [tuple(map(tuple, heads.tolist())) for heads in np.split(sums[:, :-3], 2, axis=1)]
    bound, all_gather, ring = sums[:, -3:].sum(axis=0).tolist()
    return Exchanged(forward=by_head[0], backward=by_head[1], bound=bound, all_gather=all_gather, ring=ring)
