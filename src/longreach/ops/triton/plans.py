"""How large the tiles of the Triton kernels are: one plan for each dtype and head_dim."""

from dataclasses import dataclass


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
# each new shape and make the bits of a result depend on timing. The rows were chosen among their neighbours as compiled
# for compute capability 9.0, by registers spilled, then by instructions per key in the loops without masks; they have
# not been timed. To tune for a chip, replace rows and time them with `benchmarks/attention.py --device cuda`.
PLANS = {
    (2, 64): Plan(
        Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2), Tiles(16, 64, 4, 3), Tiles(64, 64, 4, 3)
    ),
    (2, 128): Plan(
        Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2), Tiles(16, 64, 4, 3), Tiles(64, 64, 4, 3)
    ),
    (2, 256): Plan(
        Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2), Tiles(16, 64, 4, 2), Tiles(64, 32, 4, 2)
    ),
    (4, 64): Plan(
        Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(16, 64, 8, 2), Tiles(16, 64, 4, 2), Tiles(64, 64, 16, 2)
    ),
    (4, 128): Plan(
        Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(16, 64, 16, 2), Tiles(16, 32, 4, 2), Tiles(64, 16, 16, 2)
    ),
    (4, 256): Plan(
        Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2), Tiles(16, 64, 16, 2), Tiles(16, 32, 8, 2), Tiles(64, 16, 16, 2)
    ),
}
