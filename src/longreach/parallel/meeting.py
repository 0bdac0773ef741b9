"""The first call for a group of ranks: whether they come to one group, or wait for each other in different ones."""

import json
import time
from typing import Any

import torch.distributed as dist

LOOK = 5.0
"""Seconds for which a rank looks where the others wait; after that, who comes late may be late."""

PAUSE = 0.01
"""Seconds between two looks."""


def meet(group: dist.ProcessGroup) -> None:
    """Wait for the ranks of a group, up to `LOOK` seconds, and look where those wait that do not come.

    ValueError where two ranks wait for each other in different groups, which would last until a time limit ends it.
    """
    here, me, ranks = group.group_name, dist.get_rank(), dist.get_process_group_ranks(group)
    world = dist.group.WORLD
    assert world is not None  # it is initialized where there is any group
    store = world.get_group_store()
    store.set(_seat(here, me), "")
    store.set(f"longreach/{me}", json.dumps([here, ranks]))
    until = time.monotonic() + LOOK
    while time.monotonic() < until and not store.check([_seat(here, rank) for rank in ranks]):
        for rank in ranks:
            _check_waits(store, rank)
        time.sleep(PAUSE)


def _check_waits(store: Any, rank: int) -> None:
    """ValueError where this rank and another wait for each other in different groups."""
    here, ranks = _place(store, rank)
    for other in ranks:
        there, others = _place(store, other)
        if there == here or rank not in others:
            continue
        if not (store.check([_seat(there, rank)]) or store.check([_seat(here, other)])):
            first, second = sorted([(rank, ranks), (other, others)])
            raise ValueError(
                f"group of the ranks {second[1]} on rank {second[0]} and of {first[1]} on rank {first[0]}: give one"
            )


def _place(store: Any, rank: int) -> tuple[str, list[int]]:
    """The group that a rank came to last, and its ranks; none where it came to none."""
    place = f"longreach/{rank}"
    name, ranks = json.loads(store.get(place)) if store.check([place]) else ("", [])
    return name, ranks


def _seat(name: str, rank: int) -> str:
    return f"longreach/{name}/{rank}"
