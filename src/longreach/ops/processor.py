"""What the processor is that computes attention on the CPU."""

import os
from typing import Literal

import torch


def _class() -> Literal["AMX", "AVX-512", "AVX2"]:
    capability = torch.backends.cpu.get_cpu_capability()  # what PyTorch was told to do with, if that is less
    if not capability.startswith("AVX512"):
        return "AVX2"
    told = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()  # likewise oneDNN, which asks nobody else
    is_held = told.startswith(("AVX", "SSE")) and "AMX" not in told  # what is no name of its holds it to nothing
    return "AMX" if torch.cpu.get_capabilities().get("amx_bf16") and not is_held else "AVX-512"


CPU = _class()
"""The class of this CPU in `longreach.ops.crossovers`, by the instructions that native code computes with.

On "AMX" there are matrix units, which multiply bfloat16; on the others it computes in float32. What is not x86 counts
as "AVX2", without native code.
"""
