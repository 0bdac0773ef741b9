"""Check the promises of evaluation: what a sliding window costs, and the memory of long windows.

    python benchmarks/evaluate.py sliding-window --machine cpu-2core
    python benchmarks/evaluate.py long-windows --machine cpu-2core

The cost of sliding by one token is compared, interleaved, with that of its bare forward passes (logits of the last
position included) at the best of many batch sizes: what scoring adds, and what the default batch loses. Memory is the
peak of the process that scores `--tokens` tokens in nonoverlapping windows of 65,536 with a vocabulary of 32,768. The
model has 4 layers, 8 heads, d_model 256 and random weights.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import runs
import torch

from longreach.cost import Cost
from longreach.measure.plan import EvaluateConfig
from longreach.measure.score import Scores, score
from longreach.models.config import Architecture, ModelConfig
from longreach.models.decoder import Decoder

CPU = torch.device("cpu")
BATCH_SIZES = (1, 4, 8, 16, 32, 64)
SHAPE = Architecture(num_layers=4, num_heads=8, d_model=256)


def build(vocab_size: int) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(**vars(SHAPE), vocab_size=vocab_size, train_length=128, method="alibi")
    return Decoder(config).eval()


def draw_tokens(count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, count)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def forward_passes(model: Decoder, tokens: np.ndarray, length: int, batch_size: int) -> None:
    """One forward pass for each batch of windows that slide by one token, and the logits that are scored."""
    windows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(tokens[:-1], length).copy())
    for batch in windows.split(batch_size):
        for _ in model.logits(batch, length, last=1):
            pass


def slide(model: Decoder, tokens: np.ndarray, length: int, tokens_per_batch: int) -> Scores:
    return score(
        model,
        tokens,
        valid_length=length,
        stride=1,
        vocab_size=model.config.vocab_size,
        device=CPU,
        tokens_per_batch=tokens_per_batch,
    )


def sliding_window_cost(length: int, num_windows: int, rounds: int) -> dict[str, Any]:
    model = build(4096)
    tokens = draw_tokens(length + num_windows, 4096)
    default = EvaluateConfig().tokens_per_batch
    one_by_one, batched = (slide(model, tokens, length, size).nll.sum() for size in (1, default))
    if abs(one_by_one - batched) > 1e-6 * one_by_one:
        raise SystemExit(f"nll at length {length} depends on the batch: {one_by_one} and {batched}")
    bare: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    ours: list[float] = []
    for _ in range(rounds):
        ours.append(seconds(lambda: slide(model, tokens, length, default)))
        for size in BATCH_SIZES:
            bare[size].append(seconds(lambda size=size: forward_passes(model, tokens, length, size)))
    best = min(BATCH_SIZES, key=lambda size: statistics.median(bare[size]))
    needed = statistics.median(bare[best])
    taken = statistics.median(ours)
    print(f"stride 1 at {length}: {taken / needed:.2f}x its forward passes, which are fastest {best} windows at a time")
    return {"length": length, "windows": num_windows, "seconds": taken, "forward_seconds": needed, "batch_size": best}


def long_window_memory(num_tokens: int) -> dict[str, Any]:
    model = build(32768)
    tokens = draw_tokens(num_tokens + 1, 32768)
    with Cost(CPU) as cost:
        scores = score(
            model,
            tokens,
            valid_length=65536,
            stride=65536,
            vocab_size=32768,
            device=CPU,
            tokens_per_batch=EvaluateConfig().tokens_per_batch,
            on_scored=lambda scored: print(f"{scored:,} of {num_tokens:,} tokens", file=sys.stderr),
        )
    if not np.isfinite(scores.nll).all():
        raise SystemExit("some tokens have no finite nll")
    assert cost.peak_memory is not None, "memory can be measured on Linux only"
    print(f"{num_tokens:,} tokens in windows of 65,536: peak {cost.peak_memory / 2**30:.2f} GiB")
    return {"length": 65536, "tokens": num_tokens, "seconds": cost.seconds, "peak_memory": cost.peak_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sliding-window", "long-windows"), help="what to measure")
    parser.add_argument("--machine", default="cpu-2core", help="name of the file under benchmarks/results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2**20, help="tokens to score in long windows")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    here = runs.machine(arguments.machine, "cpu")
    path = runs.RESULTS / f"evaluate-{arguments.machine}.json"
    known = runs.continued(path, here)
    if arguments.part == "sliding-window":
        figures: Any = [sliding_window_cost(length, 256, arguments.rounds) for length in (128, 512)]
    else:
        figures = long_window_memory(arguments.tokens)
    runs.write(path, known | {"benchmark": "evaluate", "machine": here, arguments.part: figures})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
