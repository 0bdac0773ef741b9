"""What longreach sets in a process of its own, which its command line has, and lm-eval's harness where we start it."""

import ctypes
import os
import warnings
from typing import Any

SPINS = "1000"
"""How often OpenMP's threads look for work before they sleep, unless GOMP_SPINCOUNT says it: at GNU's own 300,000 they
take the processors for milliseconds, from each other and from whoever else is at work."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names in GNU's malloc.h."""

LARGE = 2**30
"""Bytes up to which freed memory is kept."""


def set_up() -> None:
    """Set what is of a whole process, before anything loads PyTorch in it."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when PyTorch is loaded
    _keep_freed_memory()
    import torch

    torch.set_flush_denormal(True)  # the exponentials of distant keys are denormal, and slow, on the CPU
    warnings.formatwarning = _in_one_line


def _keep_freed_memory() -> None:
    """Let GNU's allocator keep for the next operation what the one before has freed, as far as nobody says otherwise.

    It would give large blocks back to the system, which makes their pages anew and clears them, each time.
    """
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (TypeError, AttributeError):  # another system's
        return
    for name, variable in ((TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_"), (MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_")):
        if variable not in os.environ:
            mallopt(name, LARGE) or mallopt(name, LARGE >> 5)  # older ones take no more for some


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for who runs a command, to whom the line of code that gives it says nothing."""
    return f"{category.__name__}: {' '.join(str(message).split())}\n"
