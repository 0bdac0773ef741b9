"""SIGTERM, by which schedulers take a machine back, as an exception; and signals that wait until work can be kept."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 75
"""Exit status after SIGTERM, EX_TEMPFAIL of sysexits.h: the same command goes on."""


SAME = 1.0
"""Seconds within which a second Ctrl-C is the first one, handed on by torchrun."""


class Terminated(BaseException):
    """SIGTERM came. Not an Exception, as KeyboardInterrupt is none: what handles errors has nothing to do with it."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside of the block, where Python lets a handler be set: in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is heeded already: schedulers and torchrun send it both
        raise Terminated

    with _handling({signal.SIGTERM: stop}):
        yield


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM inside of the block are noted, and raised at its end; a later Ctrl-C is raised at once.

    Yields:
        What gives the number of the signal, 0 while none came, for whoever would rather heed it by `exception`.
    """
    noted, since = 0, 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted, since
        if noted and number == signal.SIGINT and time.monotonic() - since > SAME:
            raise KeyboardInterrupt
        if not noted:
            noted, since = number, time.monotonic()

    with _handling({signal.SIGINT: note, signal.SIGTERM: note}):
        yield lambda: noted
    if noted:
        raise exception(noted)


def exception(number: int) -> BaseException:
    """What a signal that was deferred would have raised."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


@contextmanager
def _handling(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Handlers of signals inside of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
