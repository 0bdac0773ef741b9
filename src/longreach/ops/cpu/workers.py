"""Threads that share out heads, each with its part of PyTorch's own threads.

Work on one head is a chain of some hundred products and sums. Where PyTorch's threads share each of them, all wait for
the last at its end, and beside a busy process that one is not running then. Heads need not wait for each other.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from os import getpid

import torch


def share_out(jobs: Sequence[Callable[[], None]]) -> None:
    """Do all jobs, which whoever is free takes in their order; they record no gradient."""
    threads = torch.get_num_threads()
    workers = min(threads, len(jobs))
    if workers < 2:
        for job in jobs:
            job()
    else:
        do = partial(_do, torch.is_inference_mode_enabled())
        for _ in _pool(workers, threads, getpid()).map(do, jobs):
            pass  # an error of a job comes out


def _do(inference: bool, job: Callable[[], None]) -> None:
    """Each thread says for itself what mode it is in: outside of inference mode none writes to what was made in it."""
    with torch.inference_mode(inference), torch.no_grad():
        job()


@lru_cache(maxsize=1)
def _pool(workers: int, threads: int, process: int) -> ThreadPoolExecutor:
    """So many workers; a forked process has none of its parent's."""
    pool, all_here = ThreadPoolExecutor(workers, "longreach"), threading.Barrier(workers)

    def begin() -> None:
        torch.set_num_threads(threads // workers)
        torch.get_num_threads()  # the number is the thread's from its first use on
        all_here.wait()

    for begun in [pool.submit(begin) for _ in range(workers)]:
        begun.result()
    torch.set_num_threads(threads)  # of threads that are yet to come; it was never another one for this thread
    return pool
