"""Threads that share out heads, each with its part of PyTorch's own threads.

Work on one head is a chain of some hundred products and sums. Where PyTorch's threads share each of them, all wait for
the last at its end, and beside a busy process that one is not running then. Heads need not wait for each other.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial

import torch


def share_out(jobs: Sequence[Callable[[], None]]) -> None:
    """Do all jobs, which whoever is free takes in their order; they record no gradient."""
    threads = torch.get_num_threads()
    workers = min(threads, len(jobs))
    if workers < 2:
        for job in jobs:
            job()
    else:
        work = partial(_work, iter(jobs), torch.is_inference_mode_enabled())
        done = [_pool(workers, threads, os.getpid()).submit(work) for _ in range(workers)]
        wait(done)
        for future in done:
            future.result()  # an error of a job comes out


def _work(jobs: Iterator[Callable[[], None]], inference: bool) -> None:
    """Do what is left. Each thread says for itself what mode it is in: outside of inference mode none writes to what
    was made in it."""
    with torch.inference_mode(inference), torch.no_grad():
        for job in jobs:  # of an iterator over a sequence each thread gets others
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
