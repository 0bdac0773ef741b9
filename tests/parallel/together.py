"""Processes that work together: a function in each of several, forked, joined by gloo."""

import os
import pickle
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import Pipe

import torch
import torch.distributed as dist

LIMIT = 120.0
"""Seconds that all of them may take."""


def fork(function, folder, size, timeout=60.0):
    """Start `function(rank)` in so many processes of a group; their ids. What one raises goes to a file of its rank."""
    folder.mkdir(exist_ok=True)
    return [_fork(function, folder, rank, size, timeout) for rank in range(size)]


def _fork(function, folder, rank, size, timeout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where pytest-xdist has threads
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo says there that a peer is gone
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        function(rank)
        dist.barrier()
        status = 0
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def statuses(processes):
    """Exit statuses, once all have ended; those that do not are killed."""
    found, until = {}, time.monotonic() + LIMIT
    while len(found) < len(processes) and time.monotonic() < until:
        for process in set(processes) - found.keys():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                found[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for process in set(processes) - found.keys():
        os.kill(process, 9)
        found[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return [found[process] for process in processes]


def together(function, folder, size, **options):
    """Run `function(rank)` in so many processes of one group, to its end in all."""
    ended = statuses(fork(function, folder, size, **options))
    errors = {path.name: path.read_text() for path in sorted(folder.glob("error*"))}
    assert ended == [0] * size, "\n".join(f"{name}\n{text}" for name, text in errors.items())


class Company:
    """Processes of one group that do one work after another, as they are told."""

    def __init__(self, folder, size):
        self._ends, theirs = zip(*(Pipe() for _ in range(size)), strict=True)
        self._processes = fork(lambda rank: _serve(theirs[rank], rank), folder, size)

    def __call__(self, function, *arguments):
        """Run `function(rank, *arguments)`, of a module, in each; AssertionError where it fails in one."""
        order = pickle.dumps((function, arguments))
        for end in self._ends:
            end.send_bytes(order)
        errors = [pickle.loads(end.recv_bytes()) for end in self._ends]
        assert not any(errors), "\n".join(f"rank {rank}\n{error}" for rank, error in enumerate(errors) if error)

    def part(self):
        """End them."""
        for end in self._ends:
            end.send_bytes(b"")
        assert statuses(self._processes) == [0] * len(self._processes)


def _serve(end, rank):
    while order := end.recv_bytes():
        error = ""
        try:
            function, arguments = pickle.loads(order)
            function(rank, *arguments)
        except BaseException:
            error = traceback.format_exc()
        end.send_bytes(pickle.dumps(error))
