"""The interface between a position method and a model."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from longreach.ops.alibi import alibi_distance


@dataclass(frozen=True)
class ModelSize:
    """What a position method may know of the model that it serves."""

    d_model: int
    """C, the width of the token embeddings."""
    num_heads: int
    """H, the number of query heads."""
    head_dim: int
    """D."""
    train_length: int
    """L, in tokens."""
    longest_length: int
    """The longest length that the model is meant for, in tokens."""


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none."""


@dataclass(frozen=True)
class AttentionPositions:
    """What every attention layer of one forward pass is told about positions."""

    rotation: tuple[Tensor, Tensor] | None = None
    """cos and sin, each (B or 1, 1, Tq, D) float32, for rotating queries, and new keys where these have none."""
    key_rotation: tuple[Tensor, Tensor] | None = None
    """Likewise, for new keys."""
    slopes: Tensor | None = None
    """(H,) float32, for the bias -slopes * distance."""
    bias: Tensor | None = None
    """(H, Tq, Tk) or (B, H, Tq, Tk) float32, added to the scaled scores."""
    logit_factor: float = 1.0
    """Factor of the logits q . k."""
    cu_seqlens: Tensor | None = None
    """(N + 1,) borders of documents that are packed along T, none of which sees another."""
    document_biases: tuple[Tensor, ...] | None = None
    """Of packed documents that have a bias: that of each, (H, T, T) of its own T, in place of `bias`."""

    def packed(self, positions: Tensor, cu_seqlens: Tensor) -> "AttentionPositions":
        """What attention needs for documents packed along T, of what it needs for one at all of their positions.

        A bias between all tokens would grow with the square of their number, and be hidden but for its diagonal blocks.

        Args:
            positions: (1, T), each below the query and key length of this; of a document with a bias consecutive.
            cu_seqlens: (N + 1,) borders of the documents.
        """
        rotations = (
            None if rotation is None else (rotation[0][:, :, positions[0]], rotation[1][:, :, positions[0]])
            for rotation in (self.rotation, self.key_rotation)
        )
        rotation, key_rotation = rotations
        biases = None
        if self.bias is not None:
            places = positions[0].tolist()
            require_borders(cu_seqlens, len(places))
            spans = [
                slice(places[start], places[end - 1] + 1) for start, end in pairwise(cu_seqlens.tolist()) if start < end
            ]
            biases = tuple(self.bias[..., span, span] for span in spans)
        return replace(
            self, rotation=rotation, key_rotation=key_rotation, bias=None, cu_seqlens=cu_seqlens, document_biases=biases
        )


def require_borders(cu_seqlens: Tensor, length: int) -> int:
    """The end of the last document; ValueError where it is not that of all tokens."""
    if (end := int(cu_seqlens[-1])) != length:
        raise ValueError(f"cu_seqlens ends with {end}: give [0, ..., T], here T={length}")
    return end


class PositionMethod(nn.Module):
    """How a model learns where its tokens stand. A method overrides what it uses; the base class is no method at all.

    A method may embed tokens, rotate queries and keys, and give slopes or a bias. Each is a function of absolute
    positions, so cached decoding is no special case.
    """

    max_length: int | None = None
    """The longest length, in tokens, that the method can represent at all; None for any length."""
    max_training_offset: int = 0
    """Each training sequence starts at a position drawn uniformly from 0 to this."""
    draws_in_training: bool = False
    """Whether `draw` leaves out positions between those that it gives."""
    depends_on_length: bool = False
    """Whether `attend` uses the length L' of the whole sequence, which cached decoding must then be told."""

    def draw(self, rows: int, length: int) -> Tensor | None:
        """The positions of a batch of training sequences, (rows or 1, length) int64; None for 0, 1, ... in each.

        From torch's generator for the CPU. Whoever trains calls it once for a batch, however that is shared out or cut
        into parts, and hands the positions to the model.
        """
        if not self.max_training_offset:
            return None
        return torch.randint(self.max_training_offset + 1, (rows, 1)) + torch.arange(length)

    def embed(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings (B, T, C) with what the method adds at positions (B or 1, T)."""
        return embeddings

    def attend(self, positions: Tensor, key_length: int, length: int) -> AttentionPositions:
        """What attention needs for queries at positions (B or 1, Tq) over key_length keys, Tk.

        length is L', the length of the whole sequence: Tk, unless a cached decoding run was told how long it will
        become.
        """
        return AttentionPositions()


def bias_by_distance(values: Tensor, query_length: int) -> Tensor:
    """The dense bias (H, Tq, Tk) of the values (H, Tk) at distances 0 to Tk - 1; the future has that of 0."""
    distance = alibi_distance(query_length, values.shape[-1], device=values.device)
    return values[:, distance.clamp(min=0)]
