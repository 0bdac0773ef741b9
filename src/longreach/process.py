"""What longreach sets in a process of its own, which its command line has, and lm-eval's harness where we start it."""

import os
import warnings

SPINS = "1000"
"""How often OpenMP's threads look for work before they sleep, unless GOMP_SPINCOUNT says it: at GNU's own 300,000 they
take the processors for milliseconds, from each other and from whoever else is at work."""


def set_up() -> None:
    """Set what is of a whole process, before anything loads PyTorch in it."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when PyTorch is loaded
    import torch

    torch.set_flush_denormal(True)  # the exponentials of distant keys are denormal, and slow, on the CPU
    warnings.formatwarning = _in_one_line


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for who runs a command, to whom the line of code that gives it says nothing."""
    return f"{category.__name__}: {' '.join(str(message).split())}\n"
