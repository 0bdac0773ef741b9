"""Tiles by PyTorch's flash attention for the CPU: of few queries, and of all where products are no faster.

With few queries this kernel, which `scaled_dot_product_attention` uses too, reads each key and each value once and
copies none. It is called directly because only that returns the LSE. So is its backward pass, which makes weights from
the LSE and serves bfloat16.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longreach.ops import halves
from longreach.ops.cpu.plan import HostVisibility, Tile
from longreach.ops.cpu.totals import Totals
from longreach.ops.cpu.views import bias_at, bias_of, falloff, keys_of, rows_of


@dataclass
class _Tiles:
    """Attention over tiles, each written to `out` and `lse`."""

    q: Tensor
    """(B, H, Tq, D)."""
    k: Tensor
    """(B, Hkv, Tk, D)."""
    v: Tensor
    """(B, Hkv, Tk, D)."""
    left: Tensor
    """(H,) or (B, H) slopes of past keys."""
    right: Tensor
    """(H,) or (B, H) slopes of future keys."""
    out: Tensor
    """(B, H, Tq, D)."""
    lse: Tensor
    """(B, H, Tq) float32, or float64 where q is."""
    scale: float
    """Factor of q . k."""
    visibility: HostVisibility
    """What hides keys."""

    def _with_bias(self, rows: Tensor, bias: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Output and LSE of queries (B, lanes, rows, D) of a tile, given its bias (1 or B, 1 or lanes, rows, width)."""
        bias = bias.expand(*rows.shape[:3], tile.width)
        keys, values = (keys_of(x, self.q.shape[1], tile) for x in (self.k, self.v))
        if halves.converts(rows, keys):
            if keys.stride(1) == 0:  # all lanes read one key head, which is converted once
                keys, values = keys[:, :1], values[:, :1]
            out, lse = halves.attend(rows, keys, values, bias, self.scale)
        else:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows, keys, values, 0.0, False, attn_mask=bias, scale=self.scale
            )
        if self.visibility.may_leave_rows_empty:
            lse = lse.masked_fill((bias == float("-inf")).all(dim=-1), float("-inf"))
        return out, lse


class FewQueries(_Tiles):
    """Tiles of a decoding step: the bias of each head is made for the keys that it reads, to save time."""

    def attend(self, tile: Tile) -> None:
        """Compute a tile of one window."""
        distance = self._distances[tile.row : tile.row + tile.rows, tile.key : tile.key + tile.width]
        left, right = (side[tile.batch if len(side) > 1 else slice(None), tile.heads] for side in self._slopes)
        bias = bias_at(distance, left, right, self.visibility)
        if self.visibility.holes is not None:
            hidden = self.visibility.holes[tile.batch, tile.key : tile.key + tile.width]
            bias = bias.masked_fill(hidden[:, None, None], float("-inf"))
        out, lse = self._with_bias(rows_of(self.q, tile), bias, tile)
        rows_of(self.out, tile).copy_(out)
        rows_of(self.lse, tile).copy_(lse)

    @cached_property
    def _distances(self) -> Tensor:
        """(Tq, Tk)."""
        options: dict[str, Any] = {"dtype": self.lse.dtype, "device": self.lse.device}
        positions = torch.arange(self.visibility.offset, self.visibility.key_length, **options)
        return positions[:, None] - torch.arange(self.visibility.key_length, **options)

    @cached_property
    def _slopes(self) -> tuple[Tensor, Tensor]:
        """Left and right slopes, (1 or B, H, 1, 1)."""
        left, right = (x.detach().to(self.lse.dtype).view(-1, x.shape[-1], 1, 1) for x in (self.left, self.right))
        return left, right


@dataclass
class ManyQueries(_Tiles):
    """Tiles that see a bias without making it."""

    def __post_init__(self) -> None:
        self._falloff = falloff(self.left, self.right, self.visibility, self.lse.dtype)  # the bias at each distance

    def attend(self, tile: Tile) -> None:
        """Compute a tile of one window or several."""
        bias = bias_of(self._falloff, tile, self.visibility)
        out, lse = self._with_bias(rows_of(self.q, tile).flip(-2), bias, tile)
        rows_of(self.out, tile).copy_(out.flip(-2))
        rows_of(self.lse, tile).copy_(lse.flip(-1))


@dataclass
class KernelGradients(ManyQueries):
    """The gradients of tiles, from `out` and `lse` as `ManyQueries` wrote them."""

    grad_out: Tensor
    """(B, H, Tq, D)."""
    totals: Totals
    """What they are added to."""

    def add(self, tile: Tile) -> None:
        """Add the gradients of a tile of one window or several."""
        q, lse = (rows_of(x, tile).flip(2) for x in (self.q, self.lse))
        # Unlike the inputs these may lie in memory in any way.
        out, grad = (rows_of(x, tile).flip(2).contiguous() for x in (self.out, self.grad_out))
        keys, values = (keys_of(x, self.q.shape[1], tile) for x in (self.k, self.v))
        bias = bias_of(self._falloff, tile, self.visibility).expand(*q.shape[:3], tile.width)
        with _denormals_flushed():
            of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, keys, values, out, lse, 0.0, False, attn_mask=bias, scale=self.scale
            )
        rows_of(self.totals.of_q, tile).copy_(of_q.flip(2))
        self.totals.add_to_keys(tile, of_k, of_v)


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Have this thread take denormal numbers for 0: weights among them make products fifty times as slow."""
    were_flushed = sys.float_info.min * 0.5 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_flushed)
