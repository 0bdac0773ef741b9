"""What a tile of attention on the CPU reads and writes, as views of whole tensors.

The bias of a tile depends on distances alone, and distances are constant along diagonals. With the query rows of a
tile in reverse order they are constant along antidiagonals: entry (a, c) of the bias is number a + c of one vector per
head. So the bias of any tile is a view of that vector, with strides (1, 1): it costs no memory and stays in the first
level of cache.
"""

import torch
from torch import Tensor

from longreach.ops.cpu.plan import HostVisibility, Tile


def falloff(left: Tensor, right: Tensor, visibility: HostVisibility, dtype: torch.dtype, *, unused: int = 0) -> Tensor:
    """The bias at each distance of `_all_distances`, -inf where causality or the window hide: (1 or B, H, n + unused).

    Made of few operations: each takes as long as the bias of a thousand tokens.
    """
    left, right = torch.broadcast_tensors(*(m.detach().to(dtype)[..., None] for m in (left, right)))
    key_length, count = visibility.key_length, _count_of_distances(visibility)
    past = min(key_length, count)  # distances that are not negative come first
    bias = left.new_full((*left.shape[:-1], count + unused), float("-inf"))
    of_past = torch.arange(1 - key_length, 1 - key_length + past, dtype=dtype, device=left.device)
    torch.mul(left, of_past, out=bias[..., :past])
    if not visibility.causal:
        of_future = torch.arange(-1, past - count - 1, -1, dtype=dtype, device=left.device)
        torch.mul(right, of_future, out=bias[..., past:count])
    if visibility.window_size is not None:
        bias[..., : max(0, key_length - visibility.window_size)] = float("-inf")
        bias[..., key_length - 1 + visibility.window_size :] = float("-inf")
    return bias if bias.dim() == 3 else bias[None]


def bias_at(distance: Tensor, left: Tensor, right: Tensor, visibility: HostVisibility) -> Tensor:
    """The bias at distances to keys, positive for past ones, -inf where causality or the window hide."""
    if visibility.causal:
        bias = -left * distance
        if visibility.query_length > 1:  # a single query stands at the last key
            bias.masked_fill_(distance < 0, float("-inf"))
    else:
        bias = -(left * distance.clamp(min=0) + right * (-distance).clamp(min=0))
    if visibility.window_size is not None:
        bias.masked_fill_(distance.abs() >= visibility.window_size, float("-inf"))
    return bias


def bias_of(falloff: Tensor, tile: Tile, visibility: HostVisibility) -> Tensor:
    """The bias of a tile, (1 or B, 1 or lanes, rows, width), its rows in reverse; a view unless padding has holes."""
    by_batch = falloff[tile.batch] if falloff.shape[0] > 1 else falloff
    bias = _diagonals(by_batch[:, tile.heads], tile, visibility)
    if visibility.holes is None:
        return bias
    past = tile.key + tile.width + (tile.windows - 1) * tile.rows
    hidden = visibility.holes[tile.batch, tile.key : past].unfold(-1, tile.width, tile.rows)  # [B, count, width]
    return bias.masked_fill(hidden[:, :, None], float("-inf"))


def distances(
    tile: Tile, visibility: HostVisibility, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Distances to past and to future keys in a tile, rows in reverse, 0 for the other kind: 2 x (rows, width)."""
    distance = _all_distances(visibility, dtype, device)
    return _diagonals(distance.clamp(min=0), tile, visibility), _diagonals((-distance).clamp(min=0), tile, visibility)


def rows_of(x: Tensor, tile: Tile) -> Tensor:
    """View the queries of a tile in x (B, H, Tq, ...): (B, lanes, rows, ...), lanes being its windows or its heads."""
    x = x[tile.batch, tile.heads, tile.row : tile.row + tile.windows * tile.rows]
    return x[:, 0].unflatten(1, (tile.windows, tile.rows)) if tile.windows > 1 else x


def lanes_of(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """Copy the queries of a tile of one sequence to (lanes, rows, ...), rows in reverse."""
    return rows_of(x, tile)[0].to(dtype).flip(1)


def keys_of(x: Tensor, num_heads: int, tile: Tile) -> Tensor:
    """View the keys of a tile in x (B, Hkv, Tk, D): (B, lanes, width, D)."""
    past = tile.key + tile.width + (tile.windows - 1) * tile.rows
    x = x[tile.batch, kv_heads_of(x, num_heads, tile), tile.key : past]
    if tile.windows > 1:
        return x[:, 0].unfold(1, tile.width, tile.rows).transpose(-2, -1)
    return x.expand(-1, tile.heads.stop - tile.heads.start, -1, -1)


def kv_heads_of(x: Tensor, num_heads: int, tile: Tile) -> slice:
    """The heads of x (B, Hkv, ...) that the query heads of a tile read: as many, or one for all."""
    group = num_heads // x.shape[1]
    return slice(tile.heads.start // group, (tile.heads.stop - 1) // group + 1)


def _all_distances(visibility: HostVisibility, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every distance from a query to a key: Tk - 1, Tk - 2, ..., 1 - Tq."""
    count = _count_of_distances(visibility)
    return visibility.key_length - 1 - torch.arange(count, dtype=dtype, device=device)


def _count_of_distances(visibility: HostVisibility) -> int:
    return max(0, visibility.key_length + visibility.query_length - 1)


def _diagonals(vector: Tensor, tile: Tile, visibility: HostVisibility) -> Tensor:
    """View a vector over `_all_distances` as a tile with its rows in reverse: (..., rows, width)."""
    last_position = tile.row + tile.rows - 1 + visibility.offset
    start = visibility.key_length - 1 - (last_position - tile.key)
    return vector[..., start : start + tile.rows + tile.width - 1].unfold(-1, tile.width, 1)
