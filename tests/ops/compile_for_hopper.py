"""Compile the kernels, as they are launched, for compute capability 9.0 on a machine without a GPU.

Prints for each kernel its name, its bytes of shared memory and its number of warpgroup matrix instructions. Triton's
interpreter accepts much that its compiler does not; this runs the compiler. Run by test_triton.py.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from longreach.ops import triton as kernels
from longreach.ops.library import REACH_M, REACH_N


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    compiled = run(function, *args, grid=grid, warmup=True, **options)
    print(function.__name__, compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"))


driver.set_active(Hopper())
run, JITFunction.run = JITFunction.run, compile_only
plan = kernels.PLANS[2, 64]
kernels.plan = lambda q: plan  # the one function that asks for a GPU

# Everything at once: all zones, masks and gradients.
length, heads, head_dim = 256, 4, 64
q = torch.empty(1, heads, length, head_dim, dtype=torch.bfloat16)
k, v = (torch.empty(1, heads // 2, length, head_dim, dtype=torch.bfloat16) for _ in range(2))
slopes = torch.empty(1, heads)
padding = torch.zeros(1, length, dtype=torch.bool)
documents = torch.tensor([0, length], dtype=torch.int32)
starts = torch.zeros(1, heads, length // REACH_M, dtype=torch.int32)
ends = torch.full_like(starts, length // REACH_N)
options: dict[str, Any] = {"causal": False, "scale": 0.1, "window_size": 100}
arguments = (q, k, v, slopes, slopes, padding, documents, starts, ends)
out, lse = kernels.forward(*arguments, **options)
kernels.backward(out, lse, *arguments, out, lse, **options, slopes_gradient=True)
last = (starts[..., -1:].contiguous(), ends[..., -1:].contiguous())
kernels.decode(q[:, :, -1:], k, v, slopes, slopes, padding, *last, **options)
