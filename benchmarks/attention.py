"""Time longreach's attention beside every other way to compute ALiBi in PyTorch, and write the figures as JSON.

    python benchmarks/attention.py --machine cpu-2core
    python benchmarks/attention.py --machine h200 --device cuda
    python benchmarks/attention.py --machine cpu-2core --crossover
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 MKL_ENABLE_INSTRUCTIONS=AVX512_E3 \\
        python benchmarks/attention.py --machine cpu-2core-avx512 --crossover
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python benchmarks/attention.py --machine cpu-2core-avx2 --crossover

All contenders of a workload run interleaved in one process, several rounds, and their medians are compared.
Denormals are flushed for all. Before anything is timed, its result is compared with float64, as are the gradients of
longreach where blocks are skipped; the run ends when longreach breaks its error rule. A peer that raises, or is far
off, is recorded as failed with its reason. Peers are given what their users could prepare once (benchmarks/peers.py).
`causal SDPA` has no bias at all: it is the ceiling for dense attention, not a peer. The file is written anew after each
workload, so that what was measured outlasts a run that is stopped: with --resume the next one measures the rest.

On a GPU two peers come from packages of their own, and are recorded as failed without them: FlexAttention's FLASH
backend from `pip install flash-attn-4==4.0.0b14`, and the pruned kernel of the Forgetting Transformer from `pip install
einops git+https://github.com/zhixuan-lin/forgetting-transformer`, or with the folder src of a copy on PYTHONPATH.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import runs
import torch
from peers import (
    CEILING,
    FLEX,
    FLEX_FLASH,
    HALF,
    OURS,
    Attend,
    Maker,
    Workload,
    alternatives,
    contenders,
    is_dense_peer,
    ours,
)
from torch import Tensor

from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import attention
from longreach.ops.reach import reach
from longreach.ops.reference import reference_attention
from longreach.ops.visibility import Visibility

LENGTHS = {"cpu": [1024, 2048, 8192, 32768, 65536], "cuda": [2048, 8192, 32768]}
"""What is measured unless asked otherwise; on a GPU, all of it within ten minutes, compiling included."""

DECODED_LENGTHS = (4096,)
"""Where a CPU is measured with caches alone, beside these."""

CROSSOVER_LENGTHS = {
    "cpu": ((64, 128, 256, 512, 1024), (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)),
    "cuda": ((256, 512, 1024, 2048, 4096), (4096, 16384, 65536)),
}
"""Lengths of whole sequences, and of caches, that --crossover measures."""

DENSE_LIMIT = 32768
"""Above this length dense attention takes minutes a call on a CPU: what counts there is how our own time grows."""

BUSY_LENGTHS = (1024, 2048, 8192)
"""Where a CPU is also measured beside one busy process."""

STD_LENGTH = 8192
"""The length at which larger scores, which reach farther, are measured too."""

NOTHING_SKIPPED = 256.0
"""Standard deviation of scores at which the bound can skip nothing: the worst case."""

GRADIENT_LENGTH = 4096
"""Where gradients are checked: dense attention in float64 is affordable, and impl="cpu" skips blocks."""


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
    max_error: float | None
    """Largest error of the output against float64, in sampled rows; None without a bias."""


def measure(
    workload: Workload, device: str, rounds: int, makers: dict[str, Maker]
) -> tuple[list[Figure], dict[str, str]]:
    """Check and time every contender on one workload: their figures, and why those failed that did."""
    inputs = functools.cache(_inputs)
    if workload.mode != "decode":
        check_gradients(workload.dtype, workload.std, workload.head_dim, device)
    failed: dict[str, str] = {}
    calls: dict[str, Callable[[], None]] = {}
    errors, extra = {}, {}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for name, maker in makers.items():
        with peer_may_fail(name, failed):
            own = replace(workload, length=workload.length // 2) if name == HALF else workload
            tensors, gradient = inputs(own, device)
            attend = maker(own, tensors)
            if attend is not None:
                errors[name] = check(name, attend, own, tensors)
                call: Callable[[], None] = functools.partial(_call, attend, tensors, gradient)
                extra[name] = peak_memory(call, device)  # a warm-up at the same time
                calls[name] = call
    with busy_process() if workload.busy else contextlib.nullcontext():
        for _ in range(rounds):
            for name, call in calls.items():
                if name not in failed:
                    with peer_may_fail(name, failed):
                        times[name].append(timed(call, device))
    return [
        Figure(name, statistics.median(times[name]), times[name], extra[name], errors[name])
        for name in calls
        if name not in failed
    ], failed


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """A process beside this one that wants a core for itself, for as long as this one lives."""
    process = subprocess.Popen([sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def peer_may_fail(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note the reason in one line and go on, unless it is longreach that fails."""
    try:
        yield
    except Exception as error:
        if name.startswith(OURS):
            raise
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if the device is lost, to longreach as well
        failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _inputs(workload: Workload, device: str) -> tuple[list[Tensor], Tensor | None]:
    """q, k and v, and in training the gradient of the output."""
    tensors = workload.tensors(device)
    return tensors, torch.randn_like(tensors[0]) if workload.mode == "training" else None


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


def check(name: str, attend: Attend, workload: Workload, tensors: list[Tensor]) -> float | None:
    """Largest error against float64 in three groups of 32 rows; for longreach, refused beyond the error rule."""
    q, k, v = (x.detach() for x in tensors)
    slopes = alibi_slopes(workload.heads, device=q.device)
    with torch.set_grad_enabled(workload.mode == "training"):  # compiled as it will be timed, and only so
        out = attend(*tensors).detach()
    worst, length = 0.0, workload.length
    for past in {min(32, length), length // 2, length} if q.shape[2] > 1 else {length}:
        rows = slice(max(0, past - 32), past) if q.shape[2] > 1 else slice(0, 1)
        part = q[:1, :, rows], k[:1, :, :past], v[:1, :, :past]
        golden = dense(*(x.double() for x in part), slopes)
        plain = dense(*part, slopes)
        error = (out[:1, :, rows].double() - golden).abs().max().item()
        rounding = torch.finfo(q.dtype).eps * golden.abs().max().item()
        allowed = 2 * (plain.double() - golden).abs().max().item() + rounding
        if name.startswith(OURS) and not error <= allowed:
            raise SystemExit(f"{workload}: {name} is off by {error:.2e}, the rule allows {allowed:.2e}")
        if name != CEILING and not error <= 0.1:
            raise ValueError(f"off by {error:.2e}: it computes something else")
        worst = max(worst, error)
    return worst if name != CEILING else None


def dense(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """The output by its definition, in the dtype of q."""
    return reference_attention(q, k, v, Visibility(q.shape[2], k.shape[2]), slopes=slopes)[0]


@functools.cache
def check_gradients(dtype: str, std: float, head_dim: int, device: str) -> None:
    """Hold the gradients of longreach to the error rule, where blocks are skipped and where they are not.

    Three heads are so steep, for scores of this size, that most of their blocks lie beyond reach; one sees far.
    """
    workload = Workload("training", dtype, GRADIENT_LENGTH, std, heads=4, head_dim=head_dim)
    tensors = workload.tensors(device)
    gradient = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    steep = max(1.0, std)
    slopes = torch.tensor([steep / 2, steep / 4, steep / 8, 1 / 256], device=device)
    kept = reach(tensors[0].detach(), tensors[1].detach(), slopes).kept[0]
    if not kept[:3].max() < 0.5:
        raise SystemExit(f"{workload}: blocks kept {kept.tolist()}, too many to check the gradients of skipping")
    golden_inputs = [x.detach().double().requires_grad_() for x in tensors]
    golden = torch.autograd.grad(dense(*golden_inputs, slopes), golden_inputs, gradient.double())
    plain = torch.autograd.grad(dense(*tensors, slopes), tensors, gradient)
    out = attention(*tensors, slopes=slopes, impl="triton" if device == "cuda" else "cpu")
    actual = torch.autograd.grad(out, tensors, gradient)
    for name, right, near, mine in zip("qkv", golden, plain, actual, strict=True):
        error, other = ((x.double() - right).abs().max().item() for x in (mine, near))
        allowed = 3 * other + torch.finfo(mine.dtype).eps * right.abs().max().item()
        if not error <= allowed:
            raise SystemExit(f"{workload}: gradient of {name} is off by {error:.2e}, the rule allows {allowed:.2e}")


def workloads(device: str, lengths: list[int]) -> list[Workload]:
    """Every workload of the tables, shortest first, those of one shape together."""
    return cuda_workloads(lengths) if device == "cuda" else cpu_workloads(lengths)


def cpu_workloads(lengths: list[int]) -> list[Workload]:
    """All that one sequence of 8 heads does."""
    everything = []
    for length in sorted({*lengths, *(DECODED_LENGTHS if lengths == LENGTHS["cpu"] else [])}):
        if length in lengths:
            everything += [Workload("forward", dtype, length) for dtype in ("float32", "bfloat16")]
            everything.append(Workload("training", "float32", length))
            if length <= STD_LENGTH and trains("bfloat16"):
                everything.append(Workload("training", "bfloat16", length))
        everything += [Workload("decode", dtype, length) for dtype in ("float32", "bfloat16")]
        if length in BUSY_LENGTHS:
            everything += [Workload(mode, "float32", length, busy=True) for mode in ("forward", "training")]
        if length == STD_LENGTH:
            everything += [Workload("forward", "float32", length, std) for std in (2.0, 4.0, NOTHING_SKIPPED)]
            everything.append(Workload("forward", "bfloat16", length, NOTHING_SKIPPED))
            everything.append(Workload("training", "float32", length, NOTHING_SKIPPED))
    return everything


def cuda_workloads(lengths: list[int]) -> list[Workload]:
    """32k tokens in all, and one query against 64k keys."""
    shapes = ({"heads": 16, "head_dim": 64}, {"heads": 32, "head_dim": 128})
    everything = []
    for length in lengths:
        for number, shape in enumerate(shapes):
            forward = Workload("forward", "bfloat16", length, batch=max(1, 32768 // length), **shape)
            everything += [forward, replace(forward, mode="training")]
            if length == STD_LENGTH and number == 0:
                everything += [replace(forward, std=std) for std in (2.0, 4.0, NOTHING_SKIPPED)]
    return everything + [Workload("decode", "bfloat16", 65536, **shape) for shape in shapes]


def crossover_workloads(device: str) -> list[Workload]:
    """Lengths around the points where `choose_impl` changes over."""
    shapes = [(1, 8, 64), (8, 8, 32)] if device == "cpu" else [(1, 16, 64), (8, 16, 128)]
    whole, cached = CROSSOVER_LENGTHS[device]
    return [
        Workload(mode, dtype, length, batch=batch, heads=heads, head_dim=head_dim)
        for mode, lengths in (
            ("forward", whole),
            ("training", whole),
            ("decode", cached),
        )
        for dtype in ("float32", "bfloat16")
        if mode != "training" or trains(dtype)
        for batch, heads, head_dim in shapes
        for length in lengths
    ]


def trains(dtype: str) -> bool:
    """Whether peers can be asked to train in it: a CPU that is held to fewer instructions trains in float32 alone.

    PyTorch, which is not aware of what oneDNN is held to, has the products of half types in the backward pass done by
    its reference code.
    """
    return dtype == "float32" or not runs.held_to()


def chosen(workload: Workload, device: str, skip: set[str], crossover: bool) -> dict[str, Maker]:
    """Who runs a workload."""
    if device == "cpu" and workload.length > DENSE_LIMIT:
        return {OURS: ours, HALF: ours}
    makers = alternatives(workload.mode) if crossover else contenders(device)
    return {name: maker for name, maker in makers.items() if name == OURS or name not in skip}


def rounds_of(workload: Workload, device: str, rounds: int) -> int:
    """Fewer where dense attention takes many seconds a call, more where nothing but growth is measured.

    And more for short calls, whose times are set by when the scheduler takes turns.
    """
    if workload.mode == "decode":
        return max(rounds, 50)
    if device == "cpu" and workload.length < STD_LENGTH:
        return max(rounds, 25)
    if device != "cpu" or workload.length <= 8192:
        return rounds
    return min(rounds, 3) if workload.length <= DENSE_LIMIT else 2 * rounds


def run(
    document: dict[str, Any],
    path: Path,
    work: list[Workload],
    device: str,
    rounds: int,
    choose: Callable[[Workload], dict[str, Maker]],
) -> None:
    """Measure one workload after the other; what is known by then is written after each."""
    start, last = time.perf_counter(), None
    known = [Workload(**record["workload"]) for record in document["records"]]
    places = {workload: place for place, workload in enumerate(work)}  # what was not asked for comes first
    for workload in work:
        if workload in known:
            continue
        shape = replace(workload, mode="", dtype="", std=1.0, busy=False)
        if shape != last:
            torch.compiler.reset()  # torch keeps eight graphs of a function and compiles no more, so those of one shape
        last = shape
        figures, failed = measure(workload, device, rounds_of(workload, device, rounds), choose(workload))
        report(workload, figures, failed, time.perf_counter() - start)
        record = {"workload": asdict(workload), "figures": [asdict(figure) for figure in figures], "failed": failed}
        document["records"].append(record)
        document["records"].sort(key=lambda record: places.get(Workload(**record["workload"]), -1))
        runs.write(path, document)
    print(f"wrote {path} after {time.perf_counter() - start:.0f} s")


def report(workload: Workload, figures: list[Figure], failed: dict[str, str], elapsed: float) -> None:
    """Print a workload: our time, and how many times as long the others took."""
    mine = figures[0].seconds
    dense = [figure for figure in figures if is_dense_peer(figure.contender)]
    fastest = min(dense, key=lambda figure: figure.seconds, default=None)
    what = f"{workload.mode} {workload.dtype} B={workload.batch} T={workload.length} H={workload.heads}"
    ours = f"{mine * 1e3:.1f} ms, {figures[0].extra_bytes / 2**20:.0f} MiB more"
    lines = [f"[{elapsed:4.0f} s] {what} D={workload.head_dim} std={workload.std:g}"]
    lines[0] += f"{', beside one busy process' if workload.busy else ''}: {ours}"
    for figure in figures[1:]:
        remark = ", the fastest dense peer" if figure is fastest else ""
        error = ", without the bias" if figure.max_error is None else f", off by {figure.max_error:.0e}"
        lines.append(f"    {figure.seconds / mine:6.2f}x  {figure.contender}{error}{remark}")
    lines += [f"    failed   {name}: {reason}" for name, reason in failed.items()]
    print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--machine", default="cpu-2core", help="name of the file under benchmarks/results, e.g. cpu-2core"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="all that the tables show, unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out, by name")
    parser.add_argument("--quick", action="store_true", help="short lengths, 3 rounds, without compiled peers")
    parser.add_argument(
        "--crossover", action="store_true", help="time what choose_impl decides between; writes NAME-crossover.json"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the file says already, measure the rest")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    device, rounds, skip = arguments.device, arguments.rounds, set(arguments.skip)
    lengths = arguments.lengths or LENGTHS[device]
    if arguments.quick:
        lengths, rounds, skip = [1024, 4096], 3, skip | {FLEX, FLEX_FLASH}
    path = runs.RESULTS / f"{arguments.machine}{'-crossover' if arguments.crossover else ''}.json"
    here = runs.machine(arguments.machine, device)
    known = runs.continued(path, here) if arguments.resume else {}
    document = {"benchmark": "attention", "machine": here, "records": known.get("records", [])}
    work = crossover_workloads(device) if arguments.crossover else workloads(device, lengths)
    choose = functools.partial(chosen, device=device, skip=skip, crossover=arguments.crossover)
    run(document, path, work, device, rounds, choose)


if __name__ == "__main__":
    main()
