"""From which lengths on an implementation of ours is taken instead of "sdpa": what was measured, by class of processor.

Each row is read off a run of `benchmarks/attention.py --crossover` that is committed under benchmarks/results: from the
first length on at which, as at all longer ones, ours was faster by a tenth in the geometric mean of shapes, or where it
never was, from twice the longest on. Where a row decodes as another class, that part of it is of the run of that one. A
test holds rows to their runs.
"""

from dataclasses import dataclass

import torch

from longreach.ops.cpu import onednn
from longreach.ops.cpu.native import library
from longreach.ops.processor import CPU
from longreach.ops.triton.operators import triton_was_measured

Tokens = dict[int, int]
"""Numbers of tokens by the bytes of the dtype: processors multiply half types by other means than float32."""


@dataclass(frozen=True)
class Crossovers:
    """What was measured on one class of processors."""

    run: str
    """Name of the file."""
    impl: str
    """Which implementation of ours runs there."""
    forward: Tokens
    """From which length of sequences on it is faster where no gradient is wanted."""
    training: Tokens
    """Likewise where one is."""
    decoding: Tokens
    """From how many keys on it is faster for few queries, the norms of whose keys are known."""
    cached: Tokens
    """From how many numbers on, B Hkv Tk D, that these keys are it is faster for few queries: a lower limit beside that
    of keys. On CPUs this is what counts, for a step has its price whatever it reads."""

    unaided: bool = False
    """Whether it is so from there on, too, where the norms are not known."""
    decodes_as: str = ""
    """The class whose few queries were measured, where that is another."""

    def least(self, dtype: torch.dtype, *, decoding: bool, learns: bool) -> int:
        """The number of tokens that counts."""
        tokens = self.decoding if decoding else self.training if learns else self.forward
        return tokens[min(dtype.itemsize, 4)]

    def least_cached(self, dtype: torch.dtype) -> int:
        """The number of numbers that counts."""
        return self.cached[min(dtype.itemsize, 4)]


CROSSOVERS = {
    "AVX-512": Crossovers(
        "cpu-2core-avx512-crossover.json",
        "cpu",
        forward={2: 128, 4: 128},
        training={2: 256, 4: 256},  # not measured for half types, see the benchmark
        decoding={2: 256, 4: 256},
        cached={2: 2**17, 4: 2**17},
        unaided=True,
    ),
    "AVX-512, not compiled": Crossovers(
        "cpu-2core-avx512-not-compiled-crossover.json",
        "cpu",
        forward={2: 256, 4: 256},
        training={2: 1024, 4: 1024},  # likewise
        decoding={2: 4096, 4: 8192},
        cached={2: 2**23, 4: 2**24},
    ),
    "AVX-512, oneDNN": Crossovers(
        "cpu-2core-epyc-crossover.json",
        "cpu",
        forward={2: 512, 4: 512},
        training={2: 1024, 4: 1024},
        decoding={2: 256, 4: 256},
        cached={2: 2**17, 4: 2**17},
        unaided=True,
        decodes_as="AVX-512",  # by the same native code, in which there are no products
    ),
    "AVX-512, oneDNN, not compiled": Crossovers(
        "cpu-2core-epyc-crossover.json",
        "cpu",
        forward={2: 512, 4: 512},
        training={2: 1024, 4: 1024},
        decoding={2: 8192, 4: 4096},
        cached={2: 2**23, 4: 2**23},
    ),
    "AVX2": Crossovers(
        "cpu-2core-avx2-crossover.json",
        "cpu",
        forward={2: 128, 4: 128},
        training={2: 256, 4: 256},  # likewise
        decoding={2: 256, 4: 256},
        cached={2: 2**17, 4: 2**17},
        unaided=True,
    ),
    "AVX2, not compiled": Crossovers(
        "cpu-2core-avx2-not-compiled-crossover.json",
        "cpu",
        forward={2: 256, 4: 256},
        training={2: 1024, 4: 1024},  # likewise
        decoding={2: 4096, 4: 8192},
        cached={2: 2**23, 4: 2**24},
    ),
    "AMX": Crossovers(
        "cpu-2core-amx-crossover.json",
        "cpu",
        forward={2: 128, 4: 128},
        training={2: 64, 4: 256},
        decoding={2: 256, 4: 256},
        cached={2: 2**17, 4: 2**17},
        unaided=True,
    ),
    "AMX, not compiled": Crossovers(
        "cpu-2core-amx-not-compiled-crossover.json",
        "cpu",
        forward={2: 256, 4: 256},
        training={2: 1024, 4: 1024},
        decoding={2: 8192, 4: 8192},
        cached={2: 2**24, 4: 2**23},
    ),
    "Hopper": Crossovers(
        "h200-crossover.json",
        "triton",
        forward={2: 1024, 4: 4096},
        training={2: 1024, 4: 8192},
        decoding={2: 4096, 4: 16384},
        cached={2: 2**22, 4: 2**22},
        unaided=True,
    ),
}
"""Class of processor, and what computes there instead of native code -> what was measured there."""


def _row() -> str:
    means = [CPU] + ["oneDNN"] * onednn.IS_FAST + ["not compiled"] * (library(torch.float32) is None)
    return ", ".join(means)


ROW = _row()
"""Which of them this CPU is."""


def processor_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The class in `CROSSOVERS` of a device; None where nothing was measured on such, or on such inputs."""
    if device.type == "cpu":
        return ROW
    return "Hopper" if triton_was_measured(device, dtype, head_dim) else None
