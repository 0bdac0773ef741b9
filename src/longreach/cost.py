"""Time and peak memory of a piece of work."""

import ctypes
import gc
import os
import sys
import time
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    """Measures the work inside a `with` block: `seconds`, and `peak_memory` in bytes.

    On CUDA the peak is what PyTorch's allocator held. On the CPU it is the process's resident memory, the interpreter
    and PyTorch included, after what earlier work had freed was given back. The increase over what was resident before
    would charge the first work of a process for the code and buffers that it loads for all. Where the system cannot
    reset its mark of the peak, as outside Linux, it is None, for the mark of earlier work would be reported.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.peak_memory: int | None = None

    def __enter__(self) -> "Cost":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _give_back_freed_memory()
            self._has_mark = _reset_mark()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.peak_memory = self.peak()
        self.seconds = time.perf_counter() - self._start

    def peak(self) -> int | None:
        """The peak memory until now."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if not self._has_mark:
            return None
        mark = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(mark.split()[1]) * 1024


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator."""
    # PyTorch's CPU allocator raises a bare RuntimeError, and its name is what stays the same between systems.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _give_back_freed_memory() -> None:
    """Hand what malloc keeps for later back to the system: it would count as resident in whatever is measured next."""
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)  # glibc's; other C libraries have none
    if trim is not None:
        trim(0)


def _reset_mark() -> bool:
    """Start the system's mark of the highest resident memory anew; False where that cannot be done."""
    try:
        _CLEAR.write_text("5")  # resets VmHWM, see proc(5)
    except OSError:
        return False
    return True
