"""Measure context parallelism: bytes that travel, the time around each rank's own attention, and balance.

    python benchmarks/context_parallel.py --machine cpu-2core --part bytes      (or time, balance, window)

Four processes on gloo, B1 H8 D64, float32, Gaussian q, k and v of std 1, the paper's slopes, causal. First the output
of all pieces is checked against one process. Bytes are those that all ranks send, bounds included, as a share of what
an all-gather of all keys and values has them send, which is what a ring sends too; and with the gradients of a backward
pass, as a share of what a reduce-scatter has them send besides, and of a ring with its backward pass. Time is that of
the call, from a barrier on, over that of the attention within it on the rank that takes longest for it: medians of
rounds. Imbalance is the processor time of the busiest rank's attention over the mean, with pieces that are even, of
equal work, and of equal work as far as `train` and `evaluate` go. `window` scores one window of 262,144 tokens with a
decoder of 2 layers, 8 heads, d_model 128 and random weights, by one process and by four as `evaluate` does: memory is
the most that tensors but the weights hold at a time, imbalance that of the processor time of all.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import runs
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.autograd.profiler import profile

from longreach.measure.score import score
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import attention
from longreach.parallel import balanced_pieces, context_parallel_attention, count_traffic
from longreach.train.context import MOST, share_sequences
from longreach.train.parallel import Ranks
from longreach.verbs.sharing import PieceScorer

RANKS, HEADS, HEAD_DIM = 4, 8, 64
LENGTHS = {
    "bytes": (16384, 32768, 65536, 131072, 262144),
    "time": (65536, 262144),
    "balance": (16384, 262144),
    "window": (262144,),
}
ROUNDS = 3
SHAPES = {"plain": torch.zeros(HEADS), "paper": alibi_slopes(HEADS)}
LONGEST_PLAIN = 16384  # whose work grows with the square


def draw(length: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3)]


def check(rank: int) -> None:
    """The output is that of one process."""
    q, k, v = draw(4096, 0)
    piece = slice(1024 * rank, 1024 * (rank + 1))
    out = context_parallel_attention(*(x[:, :, piece] for x in (q, k, v)), slopes=SHAPES["paper"])
    expected = attention(q, k, v, slopes=SHAPES["paper"])[:, :, piece]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


class Stopwatch:
    """Attention of a rank within its calls of `context_parallel_attention`, by wall clock and by processor time."""

    def __init__(self) -> None:
        self.wall, self.processor = 0.0, 0.0

    def attend(self, *tensors: Tensor, **options: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        found = attention(*tensors, **options)
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor
        return found


def standing_in(attend: Callable[..., Any]) -> Any:
    """In the block, another function does the attention within a call."""
    return patch("longreach.parallel.attention.attention", attend)


def gathered(*values: float) -> list[list[float]]:
    """The values of all ranks."""
    found = [torch.empty(len(values), dtype=torch.float64) for _ in range(RANKS)]
    dist.all_gather(found, torch.tensor(values, dtype=torch.float64))
    return [x.tolist() for x in found]


def traffic(rank: int, length: int) -> dict[str, Any]:
    """Bytes of one call and its backward pass, without their attention."""
    tensors = [x.requires_grad_() for x in draw(length // RANKS, rank)]
    with standing_in(lambda q, *others, **options: q), count_traffic() as calls:
        context_parallel_attention(*tensors, slopes=SHAPES["paper"]).sum().backward()
    there, back = calls
    both = there + back
    everyone = gathered(*there.forward, sum(back.backward), both.bound, there.all_gather, both.all_gather, both.ring)
    *heads, backward, bound, forward_all_gather, all_gather, ring = map(sum, zip(*everyone, strict=True))
    forward = sum(heads) + bound
    return {
        "length": length,
        "share": forward / forward_all_gather,
        "share_by_head": [sent * HEADS / forward_all_gather for sent in heads],
        "bytes": forward,
        "bound_bytes": bound,
        "all_gather_bytes": forward_all_gather,
        "backward_bytes": backward,
        "share_with_backward": (forward + backward) / all_gather,
        "share_of_ring_with_backward": (forward + backward) / ring,
    }


def seconds(rank: int, length: int, rounds: int) -> dict[str, Any]:
    """Time of a call, and of the attention in it on the rank that takes longest for it."""
    tensors = draw(length // RANKS, rank)
    found = []
    for _ in range(rounds):
        watch = Stopwatch()
        dist.barrier()
        start = time.perf_counter()
        with standing_in(watch.attend):
            context_parallel_attention(*tensors, slopes=SHAPES["paper"])
        walls, attentions = zip(*gathered(time.perf_counter() - start, watch.wall), strict=True)
        found.append((max(walls), max(attentions), max(walls) / max(attentions)))
    names = ("seconds", "attention_seconds", "ratio")
    return {"length": length} | dict(zip(names, map(statistics.median, zip(*found, strict=True)), strict=True))


def imbalance(rank: int, length: int, rounds: int) -> dict[str, Any]:
    """Processor time of attention on each rank, by how the sequence is cut."""
    cuts = []
    for name, slopes in SHAPES.items():
        if name == "plain" and length > LONGEST_PLAIN:
            continue
        for cut, most in (("even", 1.0), ("equal work", None), ("as longreach cuts", MOST)):
            lengths = balanced_pieces(length, RANKS, slopes, most=most)
            tensors, watch = draw(lengths[rank], rank), Stopwatch()
            with standing_in(watch.attend):
                for _ in range(rounds):
                    context_parallel_attention(*tensors, slopes=slopes)
            times = [spent for (spent,) in gathered(watch.processor)]
            cuts.append({"slopes": name, "cut": cut, "lengths": lengths, "imbalance": over_mean(times)})
    return {"length": length, "cuts": cuts}


def over_mean(values: list[float]) -> float:
    """The largest over the mean."""
    return max(values) * len(values) / sum(values)


def window(rank: int, length: int) -> dict[str, Any]:
    """Nll of one window and the memory that it took, by rank 0 alone and by all."""
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(num_layers=2, num_heads=HEADS, d_model=128, vocab_size=256, train_length=512, method="alibi")
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 256, length + 1)
    whole = _scored(model, tokens, None) if rank == 0 else None
    dist.barrier()
    ranks = Ranks(rank, RANKS)
    sharing = share_sequences(model, ranks, RANKS, evenly=False)
    nll, memory, spent = _scored(model, tokens, PieceScorer(model, sharing, ranks))
    memories, times = zip(*gathered(memory, spent), strict=True)
    if whole is None:
        return {}
    return {
        "length": length,
        "nll": whole[0],
        "shared_nll": nll,
        "relative_difference": abs(nll / whole[0] - 1),
        "memory": whole[1],
        "lengths": sharing.cut(length),
        "shared_memory": memories,
        "share": max(memories) / whole[1],
        "imbalance": over_mean(times),
    }


def _scored(model: Decoder, tokens: np.ndarray, nll: PieceScorer | None) -> tuple[float, int, float]:
    """Nll of a window, the most bytes that tensors held at a time meanwhile, and the processor time that it took."""
    length, start = len(tokens) - 1, time.process_time()
    with profile(profile_memory=True) as profiler:
        scores = score(
            model,
            tokens,
            valid_length=length,
            stride=length,
            vocab_size=256,
            device=torch.device("cpu"),
            tokens_per_batch=length,
            nll=nll,
        )
    spent = time.process_time() - start
    changes = (event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]")
    return float(scores.nll.sum()), max(accumulate(changes)), spent


def work(rank: int, folder: str, part: str) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    check(rank)
    found = []
    for length in LENGTHS[part]:
        if part == "bytes":
            found.append(traffic(rank, length))
        elif part == "time":
            found.append(seconds(rank, length, ROUNDS))
        elif part == "balance":
            found.append(imbalance(rank, length, ROUNDS))
        else:
            found.append(window(rank, length))
        if rank == 0:
            print(found[-1])
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="a name for the results")
    parser.add_argument("--part", required=True, choices=LENGTHS)
    options = parser.parse_args()
    path = runs.RESULTS / f"context-parallel-{options.machine}.json"
    here = runs.machine(options.machine, "cpu") | {"cores": os.cpu_count(), "threads": 1}  # of each process
    known = runs.continued(path, here)
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, options.part), RANKS)
        found = json.loads(Path(folder, "found.json").read_text())
    runs.write(path, known | {"benchmark": "context_parallel", "machine": here, options.part: found})


if __name__ == "__main__":
    main()
