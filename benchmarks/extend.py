"""Time extended models beside the stock code of transformers, on the same weights, and write the figures as JSON.

    python benchmarks/extend.py --machine cpu-2core
    python benchmarks/extend.py --machine cpu-2core --table
    python benchmarks/extend.py --quick

The model has 12 layers, 12 heads, d_model 768 and a small vocabulary, so that the output embeddings do not drown the
attention. Prefill is one forward pass without a cache. Decoding is one token against a DynamicCache, which is cut back
afterwards. Both contenders run interleaved in one process, several rounds, and their medians are compared; denormals
are flushed for both. MPT is configured for the longest length, where its stock code would crash. Before anything is
timed, logits are compared, and a difference beyond what rounding explains ends the run. The memory of prefill is the
peak of a fresh process for each contender, less what it held before. Each case is written once it is measured, in place
of what the file said of it, so that `--families bloom --modes decode --lengths 8192` measures one anew.
`--table` prints what docs/extension.md shows of the file.
"""

import argparse
import copy
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import runs
import torch
import transformers
from attention import peak_memory, timed
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, MptConfig, MptForCausalLM

import longreach
from longreach.pretrained.caches import growing_cache

VOCAB_SIZE = 1024
UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Shape:
    """Size of the model."""

    num_layers: int = 12
    num_heads: int = 12
    d_model: int = 768


@dataclass(frozen=True)
class Case:
    """What is timed."""

    family: str
    """bloom or mpt."""
    mode: str
    """prefill or decode."""
    length: int
    """Tokens of the prompt, or in the cache."""


@dataclass(frozen=True)
class Figure:
    """How one contender did."""

    contender: str
    """stock or extended."""
    seconds: float
    """Median."""
    rounds: list[float]
    """Every time measured."""
    extra_bytes: int | None
    """Peak memory of prefill beyond what was held before; None for decoding."""


@dataclass(frozen=True)
class Aim:
    """What is to be reached."""

    what: str
    """seconds or extra_bytes."""
    mode: str
    """Of the cases that it is for."""
    length: int
    """Likewise; 0 for every length."""
    ratio: float
    """Least ratio of the stock code's figure to ours."""


AIMS = (
    Aim("seconds", "prefill", 512, 1 / 1.05),
    Aim("seconds", "prefill", 8192, 3.0),
    Aim("extra_bytes", "prefill", 8192, 10.0),
    Aim("seconds", "decode", 0, 1.0),
    Aim("seconds", "decode", 8192, 1.5),
)


def build(family: str, shape: Shape, longest: int, device: str) -> Any:
    """A stock model with random weights, whose scaled scores q . k have a standard deviation of about 1."""
    torch.manual_seed(0)
    std = shape.d_model**-0.5
    if family == "bloom":
        config: Any = BloomConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=shape.d_model,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            initializer_range=std,
        )
        model: Any = BloomForCausalLM(config)
    else:
        config = MptConfig(
            vocab_size=VOCAB_SIZE,
            d_model=shape.d_model,
            n_layers=shape.num_layers,
            n_heads=shape.num_heads,
            max_seq_len=longest + 1,  # and the token that is decoded
            initializer_range=std,
        )
        model = MptForCausalLM(config)
    return model.eval().to(device)


def contenders(family: str, shape: Shape, longest: int, device: str) -> dict[str, Any]:
    """The stock model, and one of the same parameters that is extended."""
    stock = build(family, shape, longest, device)
    shared = {id(parameter): parameter for parameter in stock.parameters()}
    return {"stock": stock, "extended": longreach.extend(copy.deepcopy(stock, shared), scaling="none")}


def draw_tokens(length: int, device: str) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(1)).to(device)


def prefill(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def decode(model: Any, token: torch.Tensor, cache: Any) -> torch.Tensor:
    logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    cache.crop(-1)
    return logits


def works(models: dict[str, Any], case: Case, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """What each contender is to do, its cache filled."""
    tokens = draw_tokens(case.length + 1, device)
    if case.mode == "prefill":
        return {name: functools.partial(prefill, model, tokens[:, :-1]) for name, model in models.items()}
    # The caches that `generate` of each of them makes, filled alike.
    caches = {"stock": DynamicCache(config=models["stock"].config), "extended": growing_cache()}
    for cache in caches.values():
        models["extended"](input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
    return {name: functools.partial(decode, model, tokens[:, -1:], caches[name]) for name, model in models.items()}


def check(work: dict[str, Callable[[], torch.Tensor]], shape: Shape, case: Case) -> float:
    """Largest difference of logits, which rounding must explain.

    The stock code adds a bias of up to max(m) L to a score and rounds, which moves the score by at most u max(m) L and
    its weight by that share; 2 bounds the share by which a sum of weighted values moves, and each layer adds as much
    to the residual stream.
    """
    stock, ours = (work[name]() for name in ("stock", "extended"))
    steepest = longreach.alibi_slopes(shape.num_heads).max().item()
    moved = UNIT_ROUNDOFF * max(steepest * case.length, shape.d_model)  # products of d_model terms round too
    allowed = 2 * shape.num_layers * moved * stock.abs().max().item()
    difference = (stock - ours).abs().max().item()
    if not difference <= allowed:
        raise SystemExit(f"{case}: logits differ by {difference:.2e}, rounding explains {allowed:.2e}")
    return difference


def memory_of(case: Case, contender: str, shape: Shape, device: str) -> int:
    """Peak memory in bytes that one prefill adds to a fresh process; what --memory-of prints."""
    model = build(case.family, shape, case.length, device)
    if contender == "extended":
        longreach.extend(model, scaling="none")
    prefill(model, draw_tokens(16, device))  # what libraries set up once
    tokens = draw_tokens(case.length, device)
    return peak_memory(lambda: prefill(model, tokens), device)


def measured_memory(case: Case, contender: str, shape: Shape, device: str) -> int:
    """`memory_of` in a process of its own."""
    asked = json.dumps({"case": asdict(case), "contender": contender, "shape": asdict(shape), "device": device})
    process = subprocess.run([sys.executable, __file__, "--memory-of", asked], stdout=subprocess.PIPE, check=True)
    return int(process.stdout)


def measure(models: dict[str, Any], case: Case, shape: Shape, device: str, rounds: int) -> dict[str, Any]:
    """Check and time both contenders on one case."""
    work = works(models, case, device)
    difference = check(work, shape, case)  # a warm-up at the same time
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            times[name].append(timed(call, device))
    figures = []
    for name in work:
        extra = measured_memory(case, name, shape, device) if case.mode == "prefill" else None
        figures.append(Figure(name, statistics.median(times[name]), times[name], extra))
    return {
        "case": asdict(case),
        "date": time.strftime("%Y-%m-%d"),
        "max_difference": difference,
        "figures": [asdict(figure) for figure in figures],
    }


def report(record: dict[str, Any], aims: tuple[Aim, ...]) -> None:
    """Print a case, and whether it reaches what it should."""
    case = Case(**record["case"])
    stock, ours = record["figures"]
    line = f"{case.family} {case.mode} {case.length}: {ours['seconds'] * 1e3:.1f} ms"
    line += f", stock {stock['seconds'] / ours['seconds']:.2f}x"
    if ours["extra_bytes"] is not None:
        line += f"; {ours['extra_bytes'] / 2**20:.0f} MiB, stock {stock['extra_bytes'] / ours['extra_bytes']:.1f}x"
    print(line)
    for aim in aims:
        if aim.mode == case.mode and aim.length in (0, case.length):
            reached = stock[aim.what] / ours[aim.what]
            met = "met" if reached >= aim.ratio else "MISSED"
            print(f"    {met}: {aim.what} of stock to ours {reached:.2f}, aim {aim.ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--machine", default="cpu-2core", help="name of the machine in the file under benchmarks/results"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--families", nargs="+", choices=("bloom", "mpt"), default=["bloom", "mpt"])
    parser.add_argument("--modes", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of what was")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short lengths; no file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # what this script asks of a process of its own
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_grad_enabled(False)
    if arguments.memory_of:
        asked = json.loads(arguments.memory_of)
        shape, case = Shape(**asked["shape"]), Case(**asked["case"])
        print(memory_of(case, asked["contender"], shape, asked["device"]))
        return
    path = runs.RESULTS / f"extend-{arguments.machine}.json"
    if arguments.table:
        print(table(runs.read(path)["records"]))
        return
    shape, lengths, rounds = Shape(), arguments.lengths, arguments.rounds
    if arguments.quick:
        shape, lengths, rounds = Shape(num_layers=2, num_heads=4, d_model=128), [256], 2
    here = runs.machine(arguments.machine, arguments.device, transformers=transformers.__version__)
    records = [] if arguments.quick else runs.continued(path, here).get("records", [])
    for family in arguments.families:
        models = contenders(family, shape, max(lengths), arguments.device)
        for length in lengths:
            for mode in arguments.modes:
                # Stock prefill takes minutes at 8k on a CPU; a decoding step takes milliseconds, and varies.
                times = 10 * rounds if mode == "decode" else min(rounds, 2) if length > 2048 else rounds
                record = measure(models, Case(family, mode, length), shape, arguments.device, times)
                report(record, () if arguments.quick else AIMS)
                records = sorted([one for one in records if one["case"] != record["case"]] + [record], key=place)
                if not arguments.quick:
                    head = {"benchmark": "extend", "machine": here, "shape": asdict(shape)}
                    runs.write(path, head | {"records": records})


def table(records: list[dict[str, Any]]) -> str:
    """How many times as fast extended models are, and in brackets how many times less memory their prefill adds."""
    cells: dict[tuple[str, str], list[str]] = {}
    for record in sorted(records, key=place):
        case, (stock, ours) = Case(**record["case"]), record["figures"]
        cell = f"{stock['seconds'] / ours['seconds']:.2f}x"
        if ours["extra_bytes"] is not None:
            cell += f" ({stock['extra_bytes'] / ours['extra_bytes']:.1f}x)"
        cells.setdefault((case.family, case.mode), []).append(cell)
    lengths = sorted({record["case"]["length"] for record in records})
    lines = [f"| tokens | {' | '.join(f'{length:,}' for length in lengths)} |", f"|---|{'---|' * len(lengths)}"]
    for family in ("bloom", "mpt"):
        for mode in ("prefill", "decode"):
            lines.append(f"| {family.upper()}, {mode} | {' | '.join(cells[family, mode])} |")
    return "\n".join(lines)


def place(record: dict[str, Any]) -> tuple[str, int, str]:
    """What the records of a file are in order of."""
    case = record["case"]
    return case["family"], case["length"], case["mode"]


if __name__ == "__main__":
    main()
