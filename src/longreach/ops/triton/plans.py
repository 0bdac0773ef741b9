"""What `operators` and `launch` agree on: the sizes of blocks and tiles, one plan for each dtype and head_dim.

Needs no triton, so that what is traced or refused does not load it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longreach.ops.reach import KEY_BLOCK

REACH_M = 128
"""Queries per block of the key ranges that the kernels take. The BLOCK_M of every kernel divides it."""

REACH_N = KEY_BLOCK
"""Keys per block of the key ranges. It divides the BLOCK_N of the kernel for dK and dV."""

MAX_HEAD_DIM = 256
"""Largest head_dim of the kernels."""

COMMON_HEAD_DIM = 128
"""Largest head_dim whose tiles fit the 99 KiB of shared memory that every GPU from compute capability 8.0 on has."""

DECODE_ROWS = 64
"""Largest number of queries that share one key head, (H / Hkv) Tq, for which the decoding kernel is used."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel's tiles and programs."""

    block_m: int
    """Queries per tile."""
    block_n: int
    """Keys per tile."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Depth of the software pipeline."""


@dataclass(frozen=True)
class Plan:
    """Tiles of each kernel for one dtype and head_dim."""

    bound: Tiles
    """The scores near the diagonal that bound the LSE."""
    forward: Tiles
    """Output and LSE."""
    query_gradient: Tiles
    """dQ, delta and the gradients of the slopes."""
    key_gradient: Tiles
    """dK and dV."""
    decode: Tiles
    """Few queries: up to block_m rows, which are the queries of all heads that share a key head."""
    decode_rows: Tiles
    """Few queries in more rows than those, up to block_m."""


# By the bytes of the dtype and the padded head_dim. Explicit, because tuning at run time would cost a user seconds for
# each new shape and make the bits of a result depend on timing. The rows of half types up to 128 were the fastest of
# some thirty each on an NVIDIA H200, at 8,192 tokens with the keys within reach; the others were chosen among their
# neighbours as compiled for compute capability 9.0, by registers spilled, then by instructions per key in the loops
# without masks. To tune for a chip, replace rows and time them with `benchmarks/attention.py --device cuda`.
PLANS = {
    (2, 64): Plan(
        Tiles(64, 64, 4, 3),
        Tiles(128, 64, 4, 3),
        Tiles(128, 32, 8, 3),
        Tiles(64, 64, 4, 3),
        Tiles(16, 64, 4, 3),
        Tiles(64, 64, 4, 3),
    ),
    (2, 128): Plan(
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 3),
        Tiles(64, 32, 4, 3),
        Tiles(32, 64, 4, 3),
        Tiles(16, 64, 4, 3),
        Tiles(64, 64, 4, 3),
    ),
    (2, 256): Plan(
        Tiles(64, 64, 4, 2),
        Tiles(128, 64, 8, 2),
        Tiles(128, 32, 8, 2),
        Tiles(32, 64, 8, 2),
        Tiles(16, 64, 4, 2),
        Tiles(64, 32, 4, 2),
    ),
    (4, 64): Plan(
        Tiles(64, 64, 4, 1),
        Tiles(64, 32, 8, 2),
        Tiles(64, 32, 8, 2),
        Tiles(16, 64, 8, 2),
        Tiles(16, 64, 4, 2),
        Tiles(64, 64, 16, 2),
    ),
    (4, 128): Plan(
        Tiles(64, 64, 4, 1),
        Tiles(32, 32, 8, 2),
        Tiles(32, 32, 8, 2),
        Tiles(16, 64, 16, 2),
        Tiles(16, 32, 4, 2),
        Tiles(64, 16, 16, 2),
    ),
    (4, 256): Plan(
        Tiles(64, 64, 8, 1),
        Tiles(32, 16, 8, 2),
        Tiles(32, 16, 8, 2),
        Tiles(16, 64, 16, 2),
        Tiles(16, 32, 8, 2),
        Tiles(64, 16, 16, 2),
    ),
}


def empty_output(x: Tensor) -> Tensor:
    """An empty tensor with the memory layout of x, or a contiguous one where that has a stride other than 1 in D."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
