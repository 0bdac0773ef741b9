"""Time and peak memory of a piece of work."""

import time
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    """Measures the work inside a `with` block: `seconds`, and `peak_memory` in bytes.

    On CUDA the peak is what PyTorch's allocator held. On the CPU it is the process's resident memory, the
    interpreter and PyTorch included; Linux can reset that mark, elsewhere it is None, for the mark of earlier work
    would be reported.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.peak_memory: int | None = None

    def __enter__(self) -> "Cost":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # resets VmHWM, see proc(5)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_memory = torch.cuda.max_memory_allocated(self.device)
        elif _CLEAR.exists():
            mark = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            self.peak_memory = int(mark.split()[1]) * 1024
        self.seconds = time.perf_counter() - self._start
