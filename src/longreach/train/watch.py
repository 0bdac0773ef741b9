"""Whether the other processes of a job live, which each of them looks after in a thread of its own."""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

GO_ON = "run the same command again to go on from the last checkpoint"

BEAT = 0.5
"""Seconds between two signs of life."""

PAUSE = 0.02
"""Seconds between two looks for what others do."""

GRACE = 10.0
"""Seconds that a rank has to end by itself after another one failed."""


class Watch:
    """Shows that this process lives, and ends it where another does not or has failed.

    Rank 0 listens to all, the others to rank 0. One thread listens, and another judges, which waits for nobody: who
    keeps the store may be who is silent.
    """

    def __init__(self, store: Any, rank: int, size: int, program: str, timeout: float) -> None:
        self.timeout = timeout
        self._store, self._rank, self._program = store, rank, program
        self._ended = threading.Event()
        self._heard = dict.fromkeys(range(1, size) if rank == 0 else (0,), time.monotonic())
        self._names = {rank: f"rank {rank} ({store.get(f'who/{rank}').decode()})" for rank in self._heard}
        self._failure: tuple[float, str] | None = None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._judge)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()
        for thread in self._threads:  # within the store at the end of Python, one would end the process with an abort
            thread.join(GRACE)

    def cause(self) -> str:
        """Why a connection broke: what another rank said before its end, or who says nothing any more."""
        until = time.monotonic() + 4 * BEAT
        while time.monotonic() < until and self._failure is None:
            time.sleep(PAUSE)
        if self._failure is not None:
            return self._failure[1]
        silent = [name for rank, name in self._names.items() if time.monotonic() - self._heard[rank] > 2.5 * BEAT]
        return f"{', '.join(silent) or 'a rank'} ended without a word: {GO_ON}"

    def _listen(self) -> None:
        beats = dict.fromkeys(self._heard, -1)
        with suppress(RuntimeError):  # the store is gone, and there is nothing to be heard any more
            while not self._ended.wait(BEAT):
                self._store.add(f"beat/{self._rank}", 1)
                for rank, before in beats.items():
                    beats[rank] = self._store.add(f"beat/{rank}", 0)
                    if beats[rank] != before:
                        self._heard[rank] = time.monotonic()
                if self._failure is None and self._store.check(["failed"]):
                    self._failure = (time.monotonic(), self._store.get("failed").decode())

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(BEAT):
            now = time.monotonic()
            if now - looked > 6 * BEAT:  # it is this process that was stopped, as others may have been that go on now
                self._heard.update(dict.fromkeys(self._heard, now))
            looked = now
            for rank, heard in self._heard.items():
                if now - heard > self.timeout:
                    message = f"{self._names[rank]} gave no sign of life for {self.timeout:g} s: {GO_ON}"
                    self._exit(message, says=self._rank == min({0, 1} - {rank}))
            if self._failure is not None and now - self._failure[0] > GRACE:
                self._exit(self._failure[1], says=self._rank == 0)

    def _exit(self, message: str, says: bool) -> None:
        if says:
            print(f"{self._program}: {message}", file=sys.stderr, flush=True)
        os._exit(1)
