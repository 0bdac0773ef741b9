"""Time ALiBi encoders beside the form in which they were published.

    python benchmarks/encoders.py times --machine cpu-2core [--reference FOLDER]
    python benchmarks/encoders.py memory --machine cpu-2core
    python benchmarks/encoders.py table --machine cpu-2core

Base shape (width 768, 12 heads, MLP of 3072), random weights, float32. Two contenders stand beside `load_encoder`:

- padded: the same modules as Jina's code runs them: batches padded to the longest text, a table of biases for 8,192
  tokens, of which each layer adds its part to the mask and hands that to scaled_dot_product_attention. It is a stand-in
  written from that description, for that code is not to be had as files.
- mosaic: the code of MosaicBERT itself, from FOLDER: bert_layers.py, bert_padding.py and configuration_bert.py of
  examples/benchmarks/bert/src in mosaicml/examples, and the package einops, there or installed. It packs tokens for all
  but attention, whose scores are made outright.

Outputs are compared first; then contenders run interleaved, and medians count. Where the reference takes minutes, a
case has three of the twelve layers or one, each of which costs the same. Memory is the peak of a fresh process, less
what it held before: of one text of 8,192 tokens, its table included, and of loading a base model of all layers and
using it once.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runs
import torch
import torch.nn.functional as F
from attention import peak_memory, timed
from torch import Tensor, nn

import longreach
from longreach.encoders.layouts.blocks import Linear
from longreach.encoders.model import EncoderModel, PublishedConfig
from longreach.encoders.packing import Heads

TABLE = 8192
"""Tokens that Jina's table of biases is for."""

CASES: dict[str, tuple[tuple[int, ...], int, float]] = {
    "512": ((512,), 12, 1.0),
    "2048": ((2048,), 12, 1.8),
    "8192": ((8192,), 3, 5.0),
    "batch": (tuple(torch.linspace(20, 2000, 32).int().tolist()), 1, 2.0),
}
"""Name -> lengths of its texts, layers, and least ratio of the reference's seconds to ours."""

NAMES = ("padded", "mosaic")
"""Who ours is compared with."""

MEMORY_RATIO = 10.0
"""Least ratio of the reference's peak to ours at 8,192 tokens."""

ALLOWED = 1e-4
"""Largest difference of outputs of up to 4: products of 3,072 terms round in each layer."""


class Padded:
    """Texts as Jina's code has them."""

    def __init__(self, mask: Tensor, table: Tensor) -> None:
        self._mask, self._table = mask, table

    def gather(self, x: Tensor) -> Tensor:
        return x

    def scatter(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
        length = q.shape[1]
        padding = (1.0 - self._mask[:, None, None].float()) * torch.finfo(q.dtype).min
        bias = padding + self._table[:, :, :length, :length]  # [B, H, T, T]
        q, k, v = (x.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def build(layers: int, small: bool) -> EncoderModel:
    """An encoder of Mosaic's layout with random weights, whose MLP is Jina's as well."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64} if small else {}
    options = {"alibi_starting_size": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = PublishedConfig(num_hidden_layers=layers, initializer_range=0.04, vocab_size=30528, **sizes, **options)
    model = EncoderModel(config).eval()
    model.pooler = None
    return model


def padded(model: EncoderModel) -> Callable[[Tensor, Tensor], Tensor]:
    """The same parameters and modules, but for plain linear layers, over padded batches."""
    heads = model.sizes.num_attention_heads
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
    table = longreach.alibi_bias(longreach.alibi_slopes(heads), TABLE)[None]

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        arrangement: Any = Padded(mask, table)
        return model.encode_packed(ids, arrangement)

    return run


def mosaic(model: EncoderModel, folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """MosaicBERT's own code with the same weights."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from bert_layers import BertModel
    from configuration_bert import BertConfig

    warnings.filterwarnings("ignore", message="Unable to import Triton|Increasing alibi size")
    config = BertConfig(**model.config.to_dict())
    theirs = BertModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(model.state_dict(), strict=True, assign=True)  # read by all, so in the cache for all or none
    return lambda ids, mask: theirs(ids, attention_mask=mask, output_all_encoded_layers=False)[0]


def contender(name: str, model: EncoderModel, reference: Path | None) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "ours":
        return lambda ids, mask: model(ids, mask).last_hidden_state
    if name == "padded":
        return padded(model)
    assert reference is not None, "give its folder by --reference"
    return mosaic(model, reference)


def texts(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random ids (B, T) and mask of texts, the longest last."""
    ids = torch.randint(30528, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def measure(case: str, names: list[str], reference: Path | None, rounds: int, small: bool) -> dict[str, Any]:
    """Compare outputs, then time."""
    lengths, layers, aim = CASES[case]
    if small:
        lengths, layers = tuple(max(2, length // 32) for length in lengths), 1
    model = build(layers, small)
    ids, mask = texts(lengths)
    callables = {name: contender(name, model, reference) for name in names}
    right = callables["ours"](ids, mask)
    difference = 0.0
    for name in names[1:]:
        found = callables[name](ids, mask)
        difference = max(difference, ((found - right).abs() * mask[..., None]).max().item())
        if not difference <= ALLOWED:
            raise SystemExit(f"{case}: outputs of {name} differ by {difference:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rounds *= max(1, 2048 // sum(lengths))  # short cases differ most from one call to the next
    for _ in range(rounds):
        for name, run in callables.items():
            seconds[name].append(timed(lambda run=run: run(ids, mask), "cpu"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name in names[1:]:
        ratio = medians[name] / medians["ours"]
        met = "" if small else f" ({'met' if ratio >= aim else 'MISSED'}: aim {aim})"
        print(f"{case}: {medians['ours']:.3f} s, {name} {ratio:.2f}x{met}")
    return {"layers": layers, "seconds": medians, "rounds": rounds, "max_difference": difference}


def memory_of(name: str, reference: Path | None) -> int:
    """Peak bytes that one text of 8,192 tokens adds to a fresh process, or loading and using a base model."""
    if name == "loading":
        folder = tempfile.mkdtemp()
        build(1, small=True).save_pretrained(folder)
        longreach.load_encoder(folder)  # what libraries set up once
        build(12, small=False).save_pretrained(folder)
        kept = []

        def load() -> None:
            kept.append(longreach.load_encoder(folder))
            kept[0](*texts((16,)))  # weights are mapped from their file: all are resident once they were used

        return peak_memory(load, "cpu")
    lengths, layers, _ = CASES["8192"]
    model = build(layers, small=False)
    warm, ids = texts((16,)), texts(lengths)
    model(*warm)
    return peak_memory(lambda: contender(name, model, reference)(*ids), "cpu")


def measure_memory(names: list[str], reference: Path | None) -> dict[str, int]:
    """`memory_of`, each in a process of its own."""
    command = [sys.executable, __file__, "memory-of", *(["--reference", str(reference)] if reference else [])]
    peaks = {}
    for name in (*names, "loading"):
        peaks[name] = int(subprocess.run([*command, "--name", name], stdout=subprocess.PIPE, check=True).stdout)
        print(f"{name}: {peaks[name] / 2**20:,.0f} MiB")
    weights = 4 * sum(x.numel() for x in build(12, small=False).parameters())
    print(f"loading: {peaks['loading'] / weights:.2f} times its weights")
    for name in names[1:]:
        met = "met" if peaks[name] >= MEMORY_RATIO * peaks["ours"] else "MISSED"
        print(f"8192: {name} {peaks[name] / peaks['ours']:.1f}x ({met}: aim {MEMORY_RATIO})")
    return peaks | {"weights": weights}


def table(records: dict[str, Any]) -> str:
    """What docs/encoders.md shows: how many times as fast as others ours is, and the memory that it takes."""
    lines = ["| | Jina's form | MosaicBERT's code |", "|---|---|---|"]
    for case, (lengths, _, _) in CASES.items():
        what = f"{len(lengths)} texts of {lengths[0]:,} to {lengths[-1]:,} tokens"
        what = what if lengths[1:] else f"one text of {lengths[0]:,} tokens"
        seconds = next(record["seconds"] for key, record in records.items() if key.split()[0] == case)
        ratios = (f"{seconds[name] / seconds['ours']:.2f}x" if name in seconds else "not run" for name in NAMES)
        lines.append(f"| {what} | {' | '.join(ratios)} |")
    memory = next(record for key, record in records.items() if key.split()[0] == "memory")
    ours, theirs, loading = memory["ours"] / 2**20, memory["padded"] / 2**30, memory["loading"] / memory["weights"]
    lines += [
        "",
        f"Beyond its weights, one text of 8,192 tokens takes {ours:,.0f} MiB at the peak, Jina's form with its table "
        f"{theirs:.1f} GiB. A base model that was loaded and used takes {loading:.2f} times its "
        "weights: those of words that did not come up are left in their file.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("times", "memory", "table", "memory-of"))
    parser.add_argument("--machine", default="cpu-2core", help="name of the file under benchmarks/results")
    parser.add_argument("--reference", type=Path, help="folder of MosaicBERT's own code")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=["padded"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts; no file")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_grad_enabled(False)
    if arguments.part == "memory-of":
        print(memory_of(arguments.name, arguments.reference))
        return
    names = ["ours", *arguments.contenders]
    path = runs.RESULTS / f"encoders-{arguments.machine}.json"
    if arguments.part == "table":
        print(table(runs.read(path)["records"]))
        return
    here = runs.machine(arguments.machine, "cpu")
    records = {} if arguments.quick else runs.continued(path, here).get("records", {})
    asked = arguments.cases if arguments.part == "times" else ["memory"]
    for case in asked:
        if case == "memory":
            found: dict[str, Any] = measure_memory(names, arguments.reference)
        else:
            found = measure(case, names, arguments.reference, arguments.rounds, arguments.quick)
        key = f"{case} {' '.join(names[1:])}"
        records[key] = found | {"date": time.strftime("%Y-%m-%d")}
        if not arguments.quick:
            runs.write(path, {"benchmark": "encoders", "machine": here, "records": records})


if __name__ == "__main__":
    main()
