"""Compile the kernels, as they are launched, for a compute capability on a machine without a GPU.

Takes the capability times 10, the bytes of the dtype and the head_dim of a plan and, to compile with all masks and
gradients, "everything".
Prints for each kernel its name, its bytes of shared memory and its number of warpgroup matrix instructions. Triton's
interpreter accepts much that its compiler does not; this runs the compiler. Run by test_triton.py.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from longreach.ops.triton import launch as kernels
from longreach.ops.triton import ranges
from longreach.ops.triton.plans import DECODE_ROWS, REACH_M, REACH_N

capability, itemsize, head_dim = map(int, sys.argv[1:4])


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    compiled = run(function, *args, grid=grid, warmup=True, **options)
    print(function.__name__, compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"))


driver.set_active(Driver())
run, JITFunction.run = JITFunction.run, compile_only
plan = kernels.PLANS[itemsize, head_dim]
kernels.plan = lambda q: plan  # the one function that asks for a GPU

length, heads, dtype = 256, 64, torch.bfloat16 if itemsize == 2 else torch.float32
q = torch.empty(1, heads, length, head_dim, dtype=dtype)
k, v = (torch.empty(1, 1, length, head_dim, dtype=dtype) for _ in range(2))
slopes = torch.empty(1, heads)
starts = torch.zeros(1, heads, length // REACH_M, dtype=torch.int32)
ends = torch.full_like(starts, length // REACH_N)
options: dict[str, Any] = {"causal": True, "scale": 0.1, "window_size": None}
padding = documents = None
if sys.argv[4:] == ["everything"]:  # all zones, masks and gradients
    options |= {"causal": False, "window_size": 100}
    padding = torch.zeros(1, length, dtype=torch.bool)
    documents = torch.tensor([0, length], dtype=torch.int32)
ranges.key_ranges(
    q, k, slopes, slopes, documents, None, **options, tolerance=1e-6, block_m=REACH_M, block_n=REACH_N, tiles=plan.bound
)
arguments = (q, k, v, slopes, slopes, padding, documents, starts, ends, kernels.work_order(starts, ends))
out, log2_lse = kernels.forward(*arguments, **options)
kernels.backward(out, log2_lse, *arguments, out, log2_lse, **options, slopes_gradient=documents is not None)
for rows in (1, DECODE_ROWS):
    query, first, last = (x[:, :rows, -1:].contiguous() for x in (q, starts, ends))
    kernels.decode(query, k, v, slopes[:, :rows], slopes[:, :rows], padding, first, last, **options)
