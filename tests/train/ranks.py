"""Processes as torchrun starts them, but forked: whatever Python has loaded already is not loaded again."""

import os
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from longreach.cli import main


@dataclass
class Rank:
    """One process, and what it prints."""

    pid: int
    output: Path
    errors: Path
    status: int | None = None

    def wait(self, seconds=300.0):
        """Its exit status, or that of the signal that killed it as a negative number."""
        until = time.monotonic() + seconds
        while self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} did not end: {self.errors.read_text()}")
            time.sleep(0.01)
        return self.status

    def kill(self, number):
        os.kill(self.pid, number)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(words, folder, size=2, largest_file=resource.RLIM_INFINITY, **environment):
    """Start `longreach WORDS` in several processes; their output goes into files of a folder.

    The system refuses to grow a file over so many bytes, as a full disk would. Those that train miss each other soon.
    """
    if words[0] == "train":
        words = ["train", "--rank-timeout", "5", *words[1:]]
    folder.mkdir(exist_ok=True)
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    return [
        _fork(words, folder, largest_file, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def _fork(words, folder, largest_file, environment):
    rank = environment["RANK"]
    output, errors = folder / f"out{rank}", folder / f"err{rank}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where pytest-xdist has threads
        pid = os.fork()
    if pid:
        return Rank(pid, output, errors)
    status = 99
    try:
        for number, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        torch.set_num_threads(1)
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(words, folder, size=2, status=0, **options):
    """Run `longreach WORDS` in several processes, as `launch` does, to its end; what each printed as errors."""
    ranks = launch(words, folder, size, **options)
    ended = [rank.wait() for rank in ranks]
    said = [rank.errors.read_text() for rank in ranks]
    assert ended == [status] * size, said
    return said
