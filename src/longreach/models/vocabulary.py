"""From token ids to vectors and from vectors to logits: a plain vocabulary, and an adaptive one for word-level text."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach.models.config import ModelConfig


class Vocabulary(nn.Module):
    """One matrix for the input, and the same or another for the output."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        if not config.tied_embeddings:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.output.weight, std=config.d_model**-0.5)
        self.tied = config.tied_embeddings

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) ids to (B, T, C)."""
        embeddings: Tensor = self.embedding(tokens)
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        return F.linear(hidden, self.embedding.weight if self.tied else self.output.weight)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean nll in nats per token of targets (N,) given hidden (N, C)."""
        return F.cross_entropy(self.logits(hidden).float(), targets)


class AdaptiveVocabulary(nn.Module):
    """Adaptive input (Baevski & Auli, 2019, arXiv 1809.10853) and adaptive softmax (Grave et al., 2017), tied.

    Ids must be sorted by falling frequency. Cutoffs split them into bands; band b has embeddings of width
    C / 4^b and a projection to C, both shared by input and output. The output's head scores the first band and
    one class for each further band; a token's probability there is its class's times its own within the band.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        borders = (0, *config.adaptive_cutoffs, config.vocab_size)
        self.head = Band(borders[0], borders[1], config.d_model, config.d_model)
        self.tails = nn.ModuleList(
            Band(start, stop, config.d_model // 4**band, config.d_model)
            for band, (start, stop) in enumerate(itertools.pairwise(borders[1:]), start=1)
        )
        self.classes = nn.Linear(config.d_model, len(self.tails), bias=False)
        self.dropout = nn.Dropout(config.adaptive_dropout)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) ids to (B, T, C)."""
        # Every band embeds every token, clamped into it: no shape depends on data, and projections are cheap.
        embedded: Tensor = self.head(tokens)
        for tail in self.tails:
            embedded = embedded + tail(tokens)
        return embedded

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V): log-probabilities, which are logits whose softmax they are."""
        head = self._head(hidden)  # [..., size of the first band + number of tails]
        parts = [head[..., : self.head.size]]
        for index, tail in enumerate(self._tails()):
            parts.append(head[..., self.head.size + index, None] + tail.log_probabilities(hidden, self.dropout))
        return torch.cat(parts, dim=-1)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean nll in nats per token of targets (N,) given hidden (N, C), computing only the tails that occur."""
        in_head = targets
        log_probability = hidden.new_zeros((), dtype=torch.float32)
        for index, tail in enumerate(self._tails()):
            rows = tail.holds(targets).nonzero().squeeze(-1)
            in_head = in_head.index_fill(0, rows, self.head.size + index)
            within = (targets[rows] - tail.start)[:, None]
            log_probability += tail.log_probabilities(hidden[rows], self.dropout).gather(-1, within).sum()
        log_probability += self._head(hidden).gather(-1, in_head[:, None]).sum()
        return -log_probability / targets.numel()

    def _head(self, hidden: Tensor) -> Tensor:
        words = F.linear(hidden, self.head.embedding.weight)
        return torch.cat((words, self.classes(hidden)), dim=-1).float().log_softmax(dim=-1)

    def _tails(self) -> list["Band"]:
        return list(self.tails)  # type: ignore[arg-type]  # ModuleList forgets what it holds


class Band(nn.Module):
    """The tokens start <= id < stop, with embeddings of their own width and a projection to C."""

    def __init__(self, start: int, stop: int, width: int, d_model: int):
        super().__init__()
        self.start, self.size = start, stop - start
        self.embedding = nn.Embedding(self.size, width)
        self.projection = nn.Linear(width, d_model, bias=False)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.xavier_uniform_(self.projection.weight)

    def holds(self, tokens: Tensor) -> Tensor:
        """Which of the ids lie in this band, as bool."""
        return (tokens >= self.start) & (tokens < self.start + self.size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) ids to (B, T, C), zero where an id lies in another band."""
        within = (tokens - self.start).clamp(0, self.size - 1)
        embedded: Tensor = self.projection(self.embedding(within)) * self.holds(tokens)[..., None]
        return embedded

    def log_probabilities(self, hidden: Tensor, dropout: nn.Module) -> Tensor:
        """(..., C) to (..., size): of each token, given that it is one of this band."""
        narrow = dropout(F.linear(hidden, self.projection.weight.t()))
        return F.linear(narrow, self.embedding.weight).float().log_softmax(dim=-1)
