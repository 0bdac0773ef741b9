"""Time longreach's attention beside every other way to compute ALiBi in PyTorch, and write the figures as JSON.

    python benchmarks/attention.py --machine cpu-2core
    python benchmarks/attention.py --machine h200 --device cuda

All contenders of a workload run interleaved in one process, several rounds, and their medians are compared.
Denormals are flushed for all. Before anything is timed, its result is compared with float64; a speed is refused when
longreach breaks its error rule. Peers are given what their users could prepare once: masks are made and kernels
compiled beforehand. `causal SDPA` has no bias at all: it is the ceiling for dense attention, not a peer.
"""

import argparse
import ctypes
import functools
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longreach.ops.alibi import alibi_bias, alibi_distance, alibi_slopes
from longreach.ops.attention import attention
from longreach.ops.reach import KEY_BLOCK, key_block_norms
from longreach.ops.reference import reference_attention

MASK_BYTES = 3 * 2**30
"""Largest dense mask that is tried."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """What is computed."""

    mode: str
    """forward, training (forward and backward) or decode (one query against a cache)."""
    dtype: str
    """Name of a torch dtype."""
    length: int
    """Keys; and queries, unless decoding."""
    std: float = 1.0
    """Standard deviation of the scaled scores q . k."""
    batch: int = 1
    """Sequences."""
    heads: int = 8
    """Query heads and key heads."""
    head_dim: int = 64
    """D."""

    def tensors(self, device: str) -> list[Tensor]:
        """q, k and v, Gaussian."""
        generator = torch.Generator().manual_seed(0)
        queries = 1 if self.mode == "decode" else self.length
        shapes = [(self.batch, self.heads, n, self.head_dim) for n in (queries, self.length, self.length)]
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        dtype = getattr(torch, self.dtype)
        return [x.to(device, dtype).requires_grad_(self.mode == "training") for x in (q * self.std, k, v)]


@dataclass(frozen=True)
class Figure:
    """How one contender did."""

    contender: str
    """Its name."""
    seconds: float
    """Median."""
    rounds: list[float]
    """Every time measured."""
    extra_bytes: int
    """Peak memory beyond what was held before the call; its results are among that."""
    max_error: float
    """Largest error of the output against float64, in sampled rows."""


def implementation(workload: Workload, tensors: list[Tensor], impl: str) -> Attend:
    """An implementation of `longreach.attention` by name."""
    slopes = alibi_slopes(workload.heads, device=tensors[0].device)
    decodes_by_reach = workload.mode == "decode" and impl in ("cpu", "triton")
    norms = key_block_norms(tensors[1], KEY_BLOCK) if decodes_by_reach else None  # as KVCache keeps them
    return lambda q, k, v: attention(q, k, v, slopes=slopes, key_norms=norms, impl=impl)  # type: ignore[return-value]


def ours(workload: Workload, tensors: list[Tensor]) -> Attend:
    return implementation(workload, tensors, "triton" if tensors[0].is_cuda else "cpu")


def sdpa_with_mask(workload: Workload, tensors: list[Tensor]) -> Attend | None:
    query_length, length = tensors[0].shape[2], tensors[1].shape[2]
    if 4 * workload.heads * query_length * length > MASK_BYTES:
        return None
    slopes = alibi_slopes(workload.heads, device=tensors[0].device)
    mask = alibi_bias(slopes, query_length, length)
    mask = mask.masked_fill_(alibi_distance(query_length, length, device=mask.device) < 0, float("-inf"))[None]
    if tensors[0].is_cuda:
        mask = mask.to(tensors[0].dtype)  # the fused kernels there take no other
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def extra_dims(workload: Workload, tensors: list[Tensor]) -> Attend:
    """The bias m j as products of extra entries of q and k; causal SDPA, whose rows ignore the missing - m i.

    In half types positions are 256 hi + lo and slopes a sum of three parts, so that every product is exact.
    """
    q, k, _ = tensors
    scaled = alibi_slopes(workload.heads, device=q.device) * workload.head_dim**0.5  # SDPA scales it back
    position = torch.arange(workload.length, device=q.device)
    if q.dtype == torch.float32:
        of_q, of_k = [scaled], [position.float()]
    else:
        parts = []
        for _ in range(3):
            parts.append((scaled - sum(parts)).to(q.dtype).float())
        parts = [part for part in parts if part.any()]
        of_q = [part * step for part in parts for step in (256, 1)]
        of_k = [piece for _ in parts for piece in (position // 256, position % 256)]
    missing = -len(of_q) % 8
    extra_q = F.pad(torch.stack(of_q, dim=-1), (0, missing)).to(q.dtype)[None, :, None]  # [1, H, 1, E]
    extra_k = F.pad(torch.stack(of_k, dim=-1), (0, missing)).to(q.dtype)[None, None]  # [1, 1, T, E]
    extra_q = extra_q.expand(*q.shape[:3], -1)
    extra_k = extra_k.expand(*k.shape[:3], -1)
    is_causal, width, scale = q.shape[2] > 1, extra_q.shape[-1], workload.head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = torch.cat([q, extra_q], -1), torch.cat([k, extra_k], -1), F.pad(v, (0, width))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
        return out[..., :-width]

    return attend


def flex(workload: Workload, tensors: list[Tensor], backend: str | None = None) -> Attend | None:
    query_length, length = tensors[0].shape[2], tensors[1].shape[2]
    device = tensors[0].device
    if device.type == "cpu" and workload.mode == "training":
        return None  # FlexAttention has no backward pass there
    slopes, offset = alibi_slopes(workload.heads, device=device), length - query_length
    mask = create_block_mask(lambda b, h, i, j: i + offset >= j, None, None, query_length, length, device=device.type)
    options = {"BACKEND": backend} if backend else None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i + offset - j)

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, score_mod=score_mod, block_mask=mask, kernel_options=options)

    return attend


def causal_sdpa(workload: Workload, tensors: list[Tensor]) -> Attend:
    is_causal = tensors[0].shape[2] > 1
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


CEILING = "causal SDPA, no bias"
PEERS = ("SDPA, dense mask", "SDPA, extra head dims", "FlexAttention")


def contenders(workload: Workload, tensors: list[Tensor], skip: set[str]) -> dict[str, Attend]:
    """Everything that can run this workload; ours comes first."""
    makers: dict[str, Callable[[Workload, list[Tensor]], Attend | None]] = {
        "longreach": ours,
        **dict(zip(PEERS, (sdpa_with_mask, extra_dims, flex), strict=True)),
        CEILING: causal_sdpa,
    }
    if tensors[0].is_cuda and _importable("flash_attn.cute"):
        makers["FlexAttention, FLASH"] = functools.partial(flex, backend="FLASH")
    made = {name: maker(workload, tensors) for name, maker in makers.items() if name not in skip}
    return {name: attend for name, attend in made.items() if attend is not None}


def alternatives(workload: Workload, tensors: list[Tensor], skip: set[str]) -> dict[str, Attend]:
    """The two between which `choose_impl` decides, the dense mask made anew at each call as it is there."""
    return {"longreach": ours(workload, tensors), "impl=sdpa": implementation(workload, tensors, "sdpa")}


def measure(
    workload: Workload,
    device: str,
    rounds: int,
    skip: set[str],
    choose: Callable[[Workload, list[Tensor], set[str]], dict[str, Attend]] = contenders,
) -> list[Figure]:
    """Check and time every contender on one workload."""
    tensors = workload.tensors(device)
    attends = choose(workload, tensors, skip)
    gradient = torch.randn_like(tensors[0]) if workload.mode == "training" else None
    errors = {name: check(name, attend, workload, tensors) for name, attend in attends.items()}
    if gradient is not None:
        check_gradients(attends["longreach"], workload, device)
    calls = {name: functools.partial(_call, attend, tensors, gradient) for name, attend in attends.items()}
    extra = {name: peak_memory(call, device) for name, call in calls.items()}  # a warm-up at the same time
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return [Figure(name, statistics.median(times[name]), times[name], extra[name], errors[name]) for name in calls]


def _call(attend: Attend, tensors: list[Tensor], gradient: Tensor | None) -> None:
    if gradient is None:
        with torch.no_grad():
            attend(*tensors)
    else:
        torch.autograd.grad(attend(*tensors), tensors, gradient)


def timed(call: Callable[[], None], device: str) -> float:
    """Seconds that a call takes."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_time = time.perf_counter()
    call()
    return time.perf_counter() - begin_time


def peak_memory(call: Callable[[], None], device: str) -> int:
    """Bytes by which a call raises the memory held, at its peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would hide what is allocated next
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident size starts anew
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def check(name: str, attend: Attend, workload: Workload, tensors: list[Tensor]) -> float:
    """Largest error against float64 in three groups of 32 rows; for longreach, refused beyond the error rule."""
    q, k, v = (x.detach() for x in tensors)
    slopes = alibi_slopes(workload.heads, device=q.device)
    with torch.no_grad():
        out = attend(q, k, v)
    worst, length = 0.0, workload.length
    for past in {min(32, length), length // 2, length} if q.shape[2] > 1 else {length}:
        rows = slice(max(0, past - 32), past) if q.shape[2] > 1 else slice(0, 1)
        part = q[:1, :, rows], k[:1, :, :past], v[:1, :, :past]
        golden, _ = reference_attention(*(x.double() for x in part), slopes=slopes)
        plain, _ = reference_attention(*part, slopes=slopes)
        error = (out[:1, :, rows].double() - golden).abs().max().item()
        rounding = torch.finfo(q.dtype).eps * golden.abs().max().item()
        allowed = 2 * (plain.double() - golden).abs().max().item() + rounding
        if name == "longreach" and not error <= allowed:
            raise SystemExit(f"{workload}: longreach is off by {error:.2e}, the rule allows {allowed:.2e}")
        if name not in ("longreach", CEILING) and not error <= 0.1:
            raise SystemExit(f"{workload}: {name} is off by {error:.2e}: it computes something else")
        worst = max(worst, error)
    return worst if name != CEILING else float("nan")


def check_gradients(attend: Attend, workload: Workload, device: str) -> None:
    """Hold the gradients of longreach, at a length that the reference can still do, to the error rule."""
    short = Workload("training", workload.dtype, min(workload.length, 1024), workload.std, 1, 4, workload.head_dim)
    tensors = short.tensors(device)
    gradient = torch.randn_like(tensors[0])
    slopes = alibi_slopes(short.heads, device=device)
    golden_inputs = [x.detach().double().requires_grad_() for x in tensors]
    golden = torch.autograd.grad(
        reference_attention(*golden_inputs, slopes=slopes)[0], golden_inputs, gradient.double()
    )
    plain = torch.autograd.grad(reference_attention(*tensors, slopes=slopes)[0], tensors, gradient)
    actual = torch.autograd.grad(ours(short, tensors)(*tensors), tensors, gradient)
    for name, right, near, mine in zip("qkv", golden, plain, actual, strict=True):
        error, other = ((x.double() - right).abs().max().item() for x in (mine, near))
        allowed = 3 * other + torch.finfo(mine.dtype).eps * right.abs().max().item()
        if not error <= allowed:
            raise SystemExit(f"{short}: gradient of {name} is off by {error:.2e}, the rule allows {allowed:.2e}")


def workloads(device: str, lengths: list[int]) -> list[Workload]:
    """Every workload of the tables, shortest first."""
    if device == "cuda":
        shapes = [(16, 64), (32, 128)]
        return [
            Workload(mode, "bfloat16", length, 1.0, max(1, 32768 // length), heads, head_dim)
            for length in lengths
            for heads, head_dim in shapes
            for mode in ("forward", "training")
        ] + [Workload("decode", "bfloat16", 65536, heads=heads, head_dim=head_dim) for heads, head_dim in shapes]
    everything = []
    for length in lengths:
        everything += [Workload("forward", dtype, length) for dtype in ("float32", "bfloat16")]
        everything.append(Workload("training", "float32", length))
        everything.append(Workload("decode", "float32", length))
    # Larger scores reach farther; at std 256 the bound can skip nothing.
    everything += [Workload("forward", "float32", 8192, std) for std in (2.0, 4.0, 256.0) if 8192 in lengths]
    return everything


def crossover_workloads() -> list[Workload]:
    """Lengths around the points where `choose_impl` changes over."""
    shapes = [(1, 8, 64), (8, 8, 32)]
    return [
        Workload(mode, dtype, length, batch=batch, heads=heads, head_dim=head_dim)
        for mode, lengths in (
            ("forward", (64, 128, 256, 512, 1024)),
            ("training", (64, 128, 256, 512, 1024)),
            ("decode", (1024, 4096, 8192, 16384)),
        )
        for dtype in ("float32", "bfloat16")
        for batch, heads, head_dim in shapes
        for length in lengths
    ]


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _report(workload: Workload, figures: list[Figure]) -> None:
    mine = figures[0].seconds
    print(f"{workload.mode} {workload.dtype} T={workload.length} H={workload.heads} D={workload.head_dim} ", end="")
    print(f"std={workload.std:g}: {mine * 1e3:.1f} ms, {figures[0].extra_bytes / 2**20:.0f} MiB more")
    for figure in figures[1:]:
        print(f"    {figure.seconds / mine:6.2f}x  {figure.contender}, off by {figure.max_error:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--machine", default="cpu-2core", help="name of the file under benchmarks/results, e.g. cpu-2core"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 8192, 32768, 65536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out, by name")
    parser.add_argument("--quick", action="store_true", help="short lengths, 3 rounds, without compiled peers")
    parser.add_argument("--crossover", action="store_true", help="time what choose_impl decides between; no file")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    lengths, rounds, skip = arguments.lengths, arguments.rounds, set(arguments.skip)
    if arguments.crossover:
        for workload in crossover_workloads():
            _report(workload, measure(workload, arguments.device, rounds, skip, alternatives))
        return
    if arguments.quick:
        lengths, rounds, skip = [1024, 4096], 3, skip | {"FlexAttention"}
    records: list[dict[str, Any]] = []
    for workload in workloads(arguments.device, lengths):
        # Dense attention takes minutes a call at 64k on a CPU. What counts there is how our own time grows from 32k.
        alone = workload.length > 32768 and arguments.device == "cpu"
        left_out = skip | ({*PEERS, CEILING} if alone else set())
        figures = measure(workload, arguments.device, rounds if workload.length <= 8192 else min(rounds, 3), left_out)
        _report(workload, figures)
        records.append({"workload": asdict(workload), "figures": [asdict(figure) for figure in figures]})
        torch.compiler.reset()
    machine = {
        "name": arguments.machine,
        "processor": torch.cuda.get_device_name() if arguments.device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = Path(__file__).parent / "results" / f"{arguments.machine}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"benchmark": "attention", "machine": machine, "records": records}, indent=1) + "\n")
    print(f"wrote {path}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
