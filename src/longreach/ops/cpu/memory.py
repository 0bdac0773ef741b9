"""The memory that tiles take and give back, again and again."""

from functools import cache

import torch

LARGEST_SEEN = 2**25 - 2**16
"""Bytes of the largest block that GNU's allocator learns from: 32 MiB, less what it keeps of a block for itself."""


@cache
def keep_memory_of_tiles() -> None:
    """Have GNU's allocator keep what is freed, which it would give back to the system and have made anew.

    A tile's weights take some MiB. The allocator keeps twice as much as the largest block that was ever freed: here is
    one of which no page is touched. Where it was told what to keep, and with other allocators, nothing changes.
    """
    torch.empty(LARGEST_SEEN, dtype=torch.uint8, device="cpu")
