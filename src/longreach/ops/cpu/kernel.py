"""Tiles by PyTorch's flash attention for the CPU: of half types, and of few queries.

Where the processor has units for matrices of half types (AMX) this kernel, which `scaled_dot_product_attention` uses
too, is several times as fast as products in float32; on other processors it is slower. With few queries it reads each
key and each value once, and copies none. It is called directly because only that returns the LSE.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.cpu.plan import HostVisibility, Tile
from longreach.ops.cpu.views import bias_at, bias_of, falloff, keys_of, rows_of

SQUARE_KEYS = 2**14
"""Largest square tile: up to here the half types hold 256 a + b exactly."""

SQUARE_BIAS = 2.0**10
"""Largest bias in a square tile, where float32 errs by 2^-14, little against half precision."""


def fits_squares(left: Tensor, key_length: int) -> bool:
    """Whether heads that need all keys may be computed in square tiles, the bias made from key positions."""
    return key_length <= SQUARE_KEYS and bool((left * key_length <= SQUARE_BIAS).all())


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
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, *self._keys_and_values(tile), 0.0, False, attn_mask=bias, scale=self.scale
        )
        if self.visibility.may_leave_rows_empty:
            lse = lse.masked_fill((bias == float("-inf")).all(dim=-1), float("-inf"))
        return out, lse

    def _keys_and_values(self, tile: Tile) -> tuple[Tensor, Tensor]:
        num_heads = self.q.shape[1]
        return keys_of(self.k, num_heads, tile), keys_of(self.v, num_heads, tile)


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


class HalfTypes(_Tiles):
    """Tiles of half types."""

    @cached_property
    def falloff(self) -> Tensor:
        """The bias at each distance."""
        return falloff(self.left, self.right, self.visibility, self.lse.dtype)

    def attend(self, tile: Tile) -> None:
        """Compute a tile, whole heads as squares that the kernel knows to be causal, others with their bias as mask."""
        if tile.square:
            self._attend_square(tile)
            return
        bias = bias_of(self.falloff, tile, self.visibility)
        out, lse = self._with_bias(rows_of(self.q, tile).flip(-2), bias, tile)
        rows_of(self.out, tile).copy_(out.flip(-2))
        rows_of(self.lse, tile).copy_(lse.flip(-1))

    def _attend_square(self, tile: Tile) -> None:
        """Attend within a square tile, p being its first position.

        The bias is -m (i - p) + m (j - p). The first term alters the LSE alone. The second becomes products of 8 more
        entries of q and k: (j - p) is split into 256 a + b and m into three parts, all exact in half precision.
        """
        position, dtype = torch.arange(tile.width, device=self.q.device), self.q.dtype
        slope = self.left.detach().to(torch.float32).expand(self.lse.shape[:2])[tile.batch, tile.heads, None]
        parts: list[Tensor] = []  # each [B, heads, 1]
        for _ in range(3):
            parts.append((slope / self.scale - sum(parts)).to(dtype).float())
        of_q = F.pad(torch.cat(parts, dim=-1).repeat_interleave(2, dim=-1), (0, 2)).to(dtype)  # [B, heads, 8]
        of_k = F.pad(torch.stack([position // 256 * 256, position % 256], dim=-1).repeat(1, 3), (0, 2)).to(dtype)
        rows = rows_of(self.q, tile)
        keys, values = self._keys_and_values(tile)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            torch.cat([rows, of_q[:, :, None].expand(*rows.shape[:3], -1)], dim=-1),
            torch.cat([keys, of_k.expand(*keys.shape[:3], -1)], dim=-1),
            F.pad(values, (0, 8)),
            0.0,
            True,
            scale=self.scale,
        )
        rows_of(self.out, tile).copy_(out[..., : self.q.shape[3]])
        rows_of(self.lse, tile).copy_(lse - slope * position)
