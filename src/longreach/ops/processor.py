"""What the processor is that computes attention on the CPU."""

from typing import Literal

import torch


def _class() -> Literal["AMX", "AVX-512", "AVX2"]:
    capability = torch.backends.cpu.get_cpu_capability()  # what PyTorch was told to do with, if that is less
    if not capability.startswith("AVX512"):
        return "AVX2"
    found = torch.cpu.get_capabilities()
    if found.get("amx_bf16"):
        return "AMX"
    return "AVX2" if "Intel" in found.get("cpu_name", "") else "AVX-512"


CPU = _class()
"""The class of this CPU in `longreach.ops.crossovers`, by what tiles are computed with best.

On "AVX-512", that is AMD's, oneDNN multiplies twice as fast as MKL, by which PyTorch's own kernel goes. On Intel's they
are alike: with matrix units, "AMX", bfloat16 is multiplied by these. All others count as "AVX2", where no half type is
faster. On these two native code serves where it was compiled.
"""
