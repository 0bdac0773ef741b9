"""The gradients of q, k and v, summed over the tiles that add to them."""

import torch
from torch import Tensor

from longreach.ops.cpu.plan import Tile
from longreach.ops.cpu.views import kv_heads_of


class Totals:
    """Sums over tiles, in memory as inputs lie, at least in float32."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.of_q, self.of_k, self.of_v = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))

    def add_to_keys(self, tile: Tile, of_k: Tensor, of_v: Tensor) -> None:
        """Add the gradients (B, lanes, width, D) of a tile's keys and values."""
        for total, grad in ((self.of_k, of_k), (self.of_v, of_v)):
            target = total[tile.batch, kv_heads_of(total, self.of_q.shape[1], tile)]  # [B, kv heads, Tk, D]
            if tile.windows == 1:
                target = target[:, :, tile.key : tile.key + tile.width]
                target += grad.sum(dim=1, keepdim=True, dtype=total.dtype) if target.shape[1] < grad.shape[1] else grad
                continue
            # Windows overlap, but pieces of them that are `rows` wide or less do not.
            for start in range(0, tile.width, tile.rows):
                piece = grad[:, :, start : start + tile.rows]
                first = tile.key + start
                past = first + (tile.windows - 1) * tile.rows + piece.shape[2]
                target[:, 0, first:past].unfold(1, piece.shape[2], tile.rows).transpose(-2, -1).add_(piece)
