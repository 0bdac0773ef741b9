"""Time the training loop beside those that people would write or take, and what belongs to it alone.

    python benchmarks/training.py all --machine cpu-2core
    python benchmarks/training.py utilisation --machine h100
    python benchmarks/training.py table --machine cpu-2core

- speed: tokens/s of `longreach.train.loop` beside two others that train the same model from the same weights: a loop in
  the manner of nanoGPT, whose model adds ALiBi's bias to scaled_dot_product_attention by its mask, and Hugging Face's
  Trainer on MptForCausalLM. First all take a few steps on one batch, and their losses must agree. Then they run
  interleaved, each on tokens from a memory map as its users read them; the medians of single steps count.
- input: tokens/s of the loop with a model that computes nothing, from a memory map.
- ranks: tokens/s of two processes of one thread, by torchrun, beside one process of two.
- checkpoints: what an asynchronous checkpoint adds to the time of a training, as a share of the 60 seconds between two.
- utilisation, on CUDA: model FLOP utilisation of the preset wikitext103-247m, without its dropout, in bf16.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import runs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach.data.batches import Batches, BatchSource
from longreach.data.sequences import Blocks, Sequences
from longreach.data.tokens import TokenStore, TokenStream
from longreach.models.config import ARCHITECTURES, Architecture, ModelConfig
from longreach.models.decoder import Decoder
from longreach.ops.alibi import alibi_bias, alibi_slopes
from longreach.pretrained.export import export_mpt
from longreach.train.config import TrainConfig
from longreach.train.loop import Trainee, decoder_trainee, train

OURS, NANO, TRAINER = "longreach", "loop like nanoGPT's", "Trainer on MptForCausalLM"

AIMS = {512: 1.2, 4096: 2.0}
"""Train length -> least ratio of our tokens/s to those of the better of the others."""

INPUT_AIM, RANKS_AIM, CHECKPOINTS_AIM, UTILISATION_AIM = 20e6, 0.9, 0.02, 0.5
"""Tokens/s at least; throughput of two ranks over one process at least; share of the time at most; at least."""

BETWEEN_CHECKPOINTS = 60.0  # seconds

ALLOWED = 2e-5
"""Largest relative difference of losses on one batch, in float32, over the steps of the check."""


@dataclass(frozen=True)
class Size:
    """What is trained."""

    shape: Architecture = Architecture(num_layers=4, num_heads=8, d_model=256)
    vocab_size: int = 4096
    tokens_per_batch: int = 4096
    document: int = 1000
    """Tokens of each document."""


QUICK = Size(Architecture(num_layers=1, num_heads=2, d_model=16), 64, 64, 20)


def build(size: Size, length: int) -> Decoder:
    """A decoder whose queries and keys have about unit variance, as those of trained models do."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**vars(size.shape), vocab_size=size.vocab_size, method="alibi", train_length=length))
    for block in model.blocks:
        queries_and_keys = block.attention.qkv.weight[: 2 * size.shape.d_model]
        with torch.no_grad():
            queries_and_keys *= 1 / (0.02 * size.shape.d_model**0.5)
    return model


def settings(size: Size, length: int, steps: int, **changes: Any) -> TrainConfig:
    """A constant learning rate and no weight decay, so that all others can do the same."""
    constant = {"learning_rate": 1e-3, "warmup_steps": 0, "final_learning_rate": 1.0, "weight_decay": 0.0}
    return TrainConfig(
        **{
            **constant,
            "train_length": length,
            "steps": steps,
            "batch_size": max(1, size.tokens_per_batch // length),
            "checkpoint_every": steps + 1,
            "device": "cpu",
            "precision": "fp32",
            **changes,
        }
    )


class Repeated(BatchSource):
    """One batch (B, L + 1), over and over."""

    def __init__(self, batch: np.ndarray) -> None:
        self.batch = batch

    def rows(self, step: int, rows: range) -> Sequences:
        return Sequences.of_blocks(self.batch[rows.start : rows.stop])


@dataclass(frozen=True)
class Work:
    """What each contender does."""

    model: Decoder
    """A copy of which is trained."""
    settings: TrainConfig
    source: Repeated | Path
    """One batch, or a file of tokens."""
    document: int
    """Tokens of each document in the file."""

    @property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.source, dtype=np.uint16, mode="r")

    def batches(self) -> BatchSource:
        """As longreach reads them."""
        if isinstance(self.source, Repeated):
            return self.source
        tokens = self.tokens
        store = TokenStore(tokens, np.arange(0, len(tokens) + 1, self.document, dtype=np.int64))
        documents = np.random.default_rng(1).permutation(len(store.offsets) - 1)
        text = Blocks(TokenStream(store, documents), self.settings.train_length)
        return Batches(text, self.settings.batch_size, seed=0)


def write_tokens(folder: Path, size: Size) -> Path:
    """A file of two million random tokens."""
    path = folder / "tokens.bin"
    count = 2_000_000 // size.document * size.document
    np.random.default_rng(0).integers(0, size.vocab_size, count, dtype=np.uint16).tofile(path)
    return path


class Record:
    """Called after each step with its loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._ends: list[float] = []

    def __call__(self, loss: float) -> None:
        self.losses.append(loss)
        self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first, which also sets up what the others use."""
        return [after - before for before, after in itertools.pairwise(self._ends)]


def ours(work: Work, record: Record) -> None:
    torch.set_flush_denormal(True)  # as the command line does; the others' users do not
    twin = Decoder(work.model.config)
    twin.load_state_dict(work.model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        train(
            lambda device: decoder_trainee(twin),
            work.settings,
            work.batches(),
            Path(folder),
            lambda step: record(step.loss),
        )
    torch.set_flush_denormal(False)


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class Nano(nn.Module):
    """A GPT of few lines; the mask of bias and causality is made once."""

    mask: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(NanoBlock(model.d_model, model.num_heads) for _ in range(model.num_layers))
        self.norm = nn.LayerNorm(model.d_model, bias=False)
        causal = torch.full((model.train_length, model.train_length), -math.inf).triu(1)
        bias = alibi_bias(alibi_slopes(model.num_heads), model.train_length)
        self.register_buffer("mask", (bias + causal)[None], persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.mask)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nano(work: Work, record: Record) -> None:
    model = Nano(work.model.config)
    names = re.compile(r"vocabulary\.|(?<=\d\.)attention\.|feed_forward\.")
    model.load_state_dict({names.sub("", name): weight for name, weight in work.model.state_dict().items()})
    rate, length = work.settings.learning_rate, work.settings.train_length
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(work.settings.steps):
        if isinstance(work.source, Repeated):
            sequences = torch.from_numpy(work.source.batch)
            tokens, targets = sequences[:, :-1], sequences[:, 1:]
        else:
            read = work.tokens
            starts = torch.randint(len(read) - length, (work.settings.batch_size,)).tolist()
            tokens, targets = (
                torch.stack([torch.from_numpy(read[i + shift : i + shift + length].astype(np.int64)) for i in starts])
                for shift in (0, 1)
            )
        loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), work.settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record(loss.item())


class HuggingFaceData(torch.utils.data.Dataset):
    """The sequences as Trainer takes them."""

    def __init__(self, work: Work) -> None:
        self._work, self._tokens = work, None if isinstance(work.source, Repeated) else work.tokens

    def __len__(self) -> int:
        if self._tokens is None:
            return self._work.settings.steps * self._work.settings.batch_size
        return len(self._tokens) // self._work.settings.train_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self._work.settings.train_length
        if self._tokens is None:
            sequence = self._work.source.batch[index % self._work.settings.batch_size]
        else:
            sequence = self._tokens[index * length : (index + 1) * length].astype(np.int64)
        tokens = torch.from_numpy(sequence)
        return {"input_ids": tokens, "labels": tokens}


def trainer(work: Work, record: Record) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    checking = isinstance(work.source, Repeated)

    class Note(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            if not checking:
                record(math.nan)

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
            if checking and "loss" in logs:
                record(logs["loss"])

    class InOrder(transformers.Trainer):
        """What is checked is one batch, whose rows must stay together."""

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return None if checking else super()._get_train_sampler(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        export_mpt(work.model, Path(folder) / "mpt", max_length=work.settings.train_length + checking)
        model = transformers.MptForCausalLM.from_pretrained(Path(folder) / "mpt")
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=work.settings.steps,
            per_device_train_batch_size=work.settings.batch_size,
            learning_rate=work.settings.learning_rate,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_grad_norm=work.settings.gradient_clip,
            logging_steps=1 if checking else 500,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        InOrder(model, arguments, train_dataset=HuggingFaceData(work), callbacks=[Note()]).train()


CONTENDERS: dict[str, Callable[[Work, Record], None]] = {OURS: ours, NANO: nano, TRAINER: trainer}


def measure_speed(size: Size, length: int, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Tokens/s of all contenders, after a check that they train alike."""
    model = build(size, length)
    one = settings(size, length, 4)
    batch = Repeated(np.random.default_rng(0).integers(0, size.vocab_size, (one.batch_size, length + 1)))
    losses = {}
    for name, run in CONTENDERS.items():
        run(Work(model, one, batch, size.document), record := Record())
        losses[name] = record.losses
        apart = max(abs(a - b) / b for a, b in zip(losses[name], losses[OURS], strict=True))
        if not apart <= ALLOWED or not losses[name][-1] < losses[name][0]:
            raise SystemExit(f"at {length}: {name} trains otherwise: losses {losses[name]}, ours {losses[OURS]}")
    work = Work(model, settings(size, length, steps + 1), write_tokens(folder, size), size.document)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, run in CONTENDERS.items():
            run(work, record := Record())
            seconds[name] += record.seconds
    tokens = work.settings.batch_size * length
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    return {"train_length": length, "batch_size": one.batch_size, "tokens_per_second": speeds, "losses": losses}


def measure_input(size: Size, length: int, batch_size: int, steps: int, folder: Path) -> dict[str, Any]:
    """Tokens/s of the loop with a model that computes nothing."""
    model = nn.Linear(1, 1)
    nothing = Trainee(
        method="nothing",
        model=model,
        loss=lambda tokens, targets, positions: model(model.weight).square().sum(),
        attention="none",
        save=lambda folder, weights: None,
    )
    work = Work(
        build(QUICK, 8), settings(size, length, steps, batch_size=batch_size), write_tokens(folder, size), size.document
    )
    record = Record()
    with tempfile.TemporaryDirectory() as run:
        train(lambda device: nothing, work.settings, work.batches(), Path(run), lambda step: record(step.loss))
    return {
        "train_length": length,
        "batch_size": batch_size,
        "tokens_per_second": batch_size * length / statistics.median(record.seconds),
    }


def measure_ranks(size: Size, length: int, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Tokens/s of two processes beside one, each by the command line."""
    for number, words in enumerate(np.random.default_rng(0).integers(0, 5000, (20, 20_000))):
        (folder / f"{number}.txt").write_text(" ".join(f"word{word}" for word in words))
    shape = size.shape
    words = [
        *("longreach", "train", "--data", str(folder / "*.txt"), "--cache", str(folder / "cache"), "--device", "cpu"),
        *("--vocab-size", "1024", "--num-layers", str(shape.num_layers), "--num-heads", str(shape.num_heads)),
        *("--d-model", str(shape.d_model), "--train-length", str(length), "--warmup-steps", "1"),
        *("--batch-size", str(max(2, size.tokens_per_batch // length)), "--steps", str(steps)),
    ]
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    speeds: dict[str, list[float]] = {"one process": [], "two ranks": []}
    for number in range(rounds):
        for name, start, threads in (("one process", [], "2"), ("two ranks", two, "1")):
            output = folder / f"{name}-{number}"
            command = [sys.executable, "-m", *start, *words, "--output", str(output)]
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            speeds[name] += [line["tokens_per_second"] for line in lines[2:]]
    return {
        "train_length": length,
        "tokens_per_second": {name: statistics.median(found) for name, found in speeds.items()},
    }


def measure_checkpoints(size: Size, length: int, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Seconds that an asynchronous checkpoint adds."""
    path, model = write_tokens(folder, size), build(size, length)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for saving in seconds:
            changes = {"checkpoint_every": 5, "async_checkpoint": True} if saving else {}
            ours(Work(model, settings(size, length, steps, **changes), path, size.document), record := Record())
            seconds[saving].append(sum(record.seconds))
    added = statistics.median(after - before for before, after in zip(*seconds.values(), strict=True))
    each = added / ((steps - 1) // 5)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"bytes": 12 * weights, "seconds_each": each, "share": each / BETWEEN_CHECKPOINTS}


def measure_utilisation(length: int, steps: int) -> dict[str, Any]:
    """Model FLOP utilisation of the ALiBi paper's 247M model in bf16 on a GPU, with 18,432 tokens a step.

    Its dropout is left out: that of attention weights would need them all in memory.
    """
    shape = replace(
        ARCHITECTURES["wikitext103-247m"],
        **{f"{place}_dropout": 0.0 for place in ("embedding", "attention", "activation", "residual")},
    )
    size = Size(shape, 44288, 18432)
    changes = {"device": "cuda", "precision": "bf16", "compile": True, "learning_rate": 3e-4}
    work = settings(size, length, steps, **changes)
    batch = Repeated(np.random.default_rng(0).integers(0, size.vocab_size, (work.batch_size, length + 1)))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        train(lambda device: decoder_trainee(build(size, length).to(device)), work, batch, Path(folder), found.append)
    late = found[len(found) // 2 :]
    return {
        "train_length": length,
        "batch_size": work.batch_size,
        "tokens_per_second": statistics.median(step.tokens_per_second for step in late),
        "flops_per_second": statistics.median(step.flops_per_second for step in late),
        "utilisation": statistics.median(step.utilisation for step in late),
    }


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown."""
    rows = [["what", "longreach", "beside", "times", "aim"]]
    for found in results.get("speed", ()):
        speeds = dict(found["tokens_per_second"])
        mine = speeds.pop(OURS)
        for name, speed in speeds.items():
            what = f"tokens/s at {found['train_length']:,} x {found['batch_size']}"
            aim = AIMS.get(found["train_length"], "") if speed == max(speeds.values()) else ""
            rows.append([what, f"{mine:,.0f}", f"{name}: {speed:,.0f}", f"{mine / speed:.2f}", str(aim)])
    if "input" in results:
        speed = results["input"]["tokens_per_second"]
        rows.append(["tokens/s of input alone", f"{speed:,.0f}", "", "", f"{INPUT_AIM:,.0f}"])
    if "ranks" in results:
        one, two = results["ranks"]["tokens_per_second"].values()
        beside, times = f"one process of two threads: {one:,.0f}", f"{two / one:.2f}"
        rows.append(["tokens/s of two ranks of one thread", f"{two:,.0f}", beside, times, str(RANKS_AIM)])
    if "checkpoints" in results:
        found = results["checkpoints"]
        what = f"an asynchronous checkpoint of {found['bytes'] / 2**20:,.0f} MiB"
        share = f"{found['share']:.2%} of a minute"
        rows.append([what, f"{found['seconds_each']:.2f} s", "", share, f"{CHECKPOINTS_AIM:.0%}"])
    for found in results.get("utilisation", ()):
        what = f"model FLOP utilisation at {found['train_length']:,} x {found['batch_size']}"
        rows.append([what, f"{found['utilisation']:.1%}", "", "", f"{UTILISATION_AIM:.0%}"])
    head, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    place = results.get("machine")
    said = f"\n\nOn {place['processor']}, {place['threads']} threads, PyTorch {place['torch']}." if place else ""
    return "\n".join([head, "| --- | ---: | --- | ---: | ---: |", *lines]) + said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("speed", "input", "checkpoints", "ranks")
    parser.add_argument("part", choices=(*parts, "all", "utilisation", "table"), help="what to measure")
    parser.add_argument("--machine", default="cpu-2core", help="name of the file under benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="a model of a few weights, and nothing written")
    arguments = parser.parse_args()
    path = runs.RESULTS / f"training-{arguments.machine}.json"
    if arguments.part == "table":
        print(table(runs.read(path)))
        return
    here = runs.machine(arguments.machine, "cuda" if arguments.part == "utilisation" else "cpu")
    results = {} if arguments.quick else runs.continued(path, here) | {"machine": here}
    for part in parts if arguments.part == "all" else (arguments.part,):
        results[part] = measure(part, arguments.quick)
        if not arguments.quick:
            runs.write(path, results)
    print(table(results))


def measure(part: str, quick: bool) -> Any:
    """The figures of a part."""
    size, rounds, length = (QUICK, 1, 16) if quick else (Size(), 3, 512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if part == "speed":
            return [measure_speed(size, length, rounds, 2, folder) for length in ((16, 32) if quick else AIMS)]
        if part == "input":
            return measure_input(size, *((16, 4, 4) if quick else (1024, 64, 200)), folder)
        if part == "ranks":
            return measure_ranks(size, length, 2, 4 if quick else 12, folder)
        if part == "checkpoints":
            return measure_checkpoints(size, length, rounds, 14, folder)
    return [measure_utilisation(length, 60) for length in (1024, 3072)]


if __name__ == "__main__":
    main()
