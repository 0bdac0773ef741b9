"""From token ids to vectors and from vectors to logits."""

import torch.nn.functional as F
from torch import Tensor, nn

from longreach.models.config import ModelConfig
from longreach.ops.linear import Linear, linear


class Vocabulary(nn.Module):
    """One matrix for the input, and the same or another for the output."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        if not config.tied_embeddings:
            self.output = Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.output.weight, std=config.d_model**-0.5)
        self.tied = config.tied_embeddings

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) ids to (B, T, C)."""
        return looked_up("tokens", self.embedding, tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        return linear(hidden, self.embedding.weight if self.tied else self.output.weight)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean nll in nats per token of targets (N,) given hidden (N, C)."""
        logits = self.logits(hidden).float()
        try:
            return F.cross_entropy(logits, targets)
        except IndexError as error:  # which only the CPU notices
            raise ValueError(f"targets has ids outside of {logits.shape[-1]}: give those of its tokenizer") from error


def looked_up(name: str, table: nn.Module, ids: Tensor) -> Tensor:
    """Rows of a table of embeddings; ValueError for ids that it does not have, which only the CPU notices."""
    try:
        rows: Tensor = table(ids)
    except IndexError as error:
        raise ValueError(f"{name} has ids that {table} has not: give those of the model's own tokenizer") from error
    return rows
