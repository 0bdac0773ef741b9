"""A decoder whose sequences lie over many ranks, each of which holds a piece of all of them (context parallelism)."""

from functools import partial

import torch
from torch import Tensor, nn

from longreach.models.decoder import Decoder
from longreach.parallel import balanced_pieces
from longreach.parallel.sharing import Sharing
from longreach.train.parallel import Loss, Ranks


def share_sequences(model: Decoder, ranks: Ranks, context: int) -> Sharing:
    """Let as many ranks as `context`, side by side, compute each sequence of a decoder together; all ranks call it.

    Pieces are cut so that they take as long as each other: attention by the slopes that the decoder has now, and what a
    block does to each token besides, 12 C^2 products, where a key of a head takes 2 D.
    """
    config, device = model.config, next(model.parameters()).device
    slopes = model.positions.attend(torch.zeros(1, 1, dtype=torch.int64, device=device), 1, config.train_length).slopes
    cut = partial(
        balanced_pieces,
        size=context,
        slopes=torch.zeros(config.num_heads) if slopes is None else slopes.detach().cpu(),
        per_token=6 * config.d_model**2 / config.head_dim,
    )
    sharing = Sharing(ranks.context_group(context, device), cut)
    model.attend_by(sharing.attend)
    return sharing


def shared_loss(model: nn.Module, loss: Loss, ranks: Ranks, context: int) -> Loss:
    """The loss of a model each of whose sequences is computed by as many ranks as `context`; `loss` itself for one.

    That of a rank is of its piece, weighed by its tokens, so that the mean over all ranks is that of the batch.

    Raises:
        ValueError: it is no decoder of our own.
    """
    if context == 1:
        return loss
    if not isinstance(model, Decoder):
        raise ValueError(f"context_parallel={context}: this model has attention of its own; leave it out")
    sharing = share_sequences(model, ranks, context)

    def of_piece(tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        columns, length = sharing.columns(tokens.shape[1]), tokens.shape[1]
        mean = loss(tokens[:, columns], targets[:, columns], positions[:, columns])
        return mean * ((columns.stop - columns.start) * context / length)

    return of_piece
