"""Heads shared out among PyTorch's own threads, in one parallel region of OpenMP.

Work on one head is a chain of some hundred products and sums. Where PyTorch's threads share each of them, all wait for
the last at its end, and beside a busy process that one is not running then. Heads need not wait for each other. Threads
other than OpenMP's would wait, for these spin for some milliseconds after each operation, on all processors.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch

Job = Callable[[], None]
"""Some tiles to compute."""

_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""What each thread of a region calls."""


def can_share_out(count: int) -> bool:
    """Whether so many jobs keep the better part of PyTorch's threads at work, and these are OpenMP's."""
    return 1 < torch.get_num_threads() <= 2 * count and count > 1 and _region() is not None


def share_out(jobs: Sequence[Job], make: Callable[[], Sequence[Job]], count: int) -> None:
    """Do jobs, which whoever is free takes in their order, in one region; they record no gradient.

    Operations within a job, and those that make more, are done by one thread, as always inside of a region.

    Args:
        jobs: what can be done at once.
        make: gives more; whoever comes first calls it, while others begin with those at hand.
        count: how many there will be in all, more or less.
    """
    at_hand = iter(jobs)  # of which each thread gets others
    made: list[Iterator[Job]] = []
    making, is_made = threading.Lock(), threading.Event()
    inference = torch.is_inference_mode_enabled()
    came: list[int] = []
    errors: list[BaseException] = []

    def work(_: Any) -> None:
        try:
            # Each thread says for itself what mode it is in: outside of inference mode none writes to what was made in
            # it.
            with torch.inference_mode(inference), torch.no_grad():
                if making.acquire(blocking=False):
                    try:
                        made.append(iter(make()))
                    finally:
                        is_made.set()
                for job in at_hand:
                    job()
                is_made.wait()
                for job in chain(*made):
                    job()
        except BaseException as error:  # which ctypes would print and forget
            errors.append(error)
        came.append(threading.get_ident())

    region = _region()
    assert region is not None, "can_share_out was not asked"
    region(_Work(work), None, min(torch.get_num_threads(), count), 0)
    if errors:
        raise errors[0]
    if threading.get_ident() not in came:  # Ctrl-C came before or after its work, where nothing but ctypes sees it
        raise KeyboardInterrupt


@cache
def address_of_region() -> int | None:
    """Where that function is, for native code to call; None without one."""
    region: Any = _region()
    return None if region is None else ctypes.cast(region, ctypes.c_void_p).value


@cache
def _region() -> Callable[..., None] | None:
    """What runs a function on each of so many threads of the OpenMP that PyTorch is linked with; None without one.

    Its name is that of GNU's compiler for it, to which LLVM's and Intel's answer too.
    """
    try:
        region = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    region.argtypes, region.restype = (_Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    found: Callable[..., None] = region
    return found
