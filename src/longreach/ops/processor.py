"""What the processor is that computes attention on the CPU."""

import os
from typing import Literal

import torch


def _class() -> Literal["AMX", "AVX-512", "AVX2"]:
    capability = torch.backends.cpu.get_cpu_capability()  # what PyTorch was told to do with, if that is less
    if not capability.startswith("AVX512"):
        return "AVX2"
    told = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()  # likewise oneDNN, which asks nobody else
    may_use_units = told in ("DEFAULT", "ALL") or "AMX" in told
    return "AMX" if may_use_units and torch.cpu.get_capabilities().get("amx_bf16") else "AVX-512"


CPU = _class()
"""The class of this CPU in `longreach.ops.crossovers`, by the instructions that native code computes with.

On "AMX" there are matrix units, which multiply bfloat16; on the others no half type is faster than float32. What is not
x86 counts as "AVX2", without native code.
"""
