"""The training loop: one model, from its checkpoint if it has one, to its files."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from longreach.cost import Cost
from longreach.data.batches import BatchSource
from longreach.data.sequences import IGNORED, Sequences
from longreach.files import digest
from longreach.foreign import refusing
from longreach.models.decoder import Decoder
from longreach.models.files import save_model
from longreach.results import Exchanged, Model, TrainingRecord, read_training, write_training
from longreach.stopping import deferred, exception
from longreach.train.checkpoint import NAME, Writer, damaged, last_step, load_tensors, remove_checkpoints
from longreach.train.config import TrainConfig
from longreach.train.context import exchanged, share_loss, unshared
from longreach.train.flops import count_matrices, published_peak, training_flops
from longreach.train.metrics import Log, Step, final_loss, keep_first
from longreach.train.optim import build_optimizer, independent_of_steps, learning_rate
from longreach.train.parallel import ALONE, Loss, Ranks, shard, whole
from longreach.train.shards import read_manifest


@dataclass(frozen=True)
class Trainee:
    """What is trained: a module, and all that the loop has to know of it."""

    method: str
    """Its position method, as it is called in results."""
    model: nn.Module
    """On its device, in training mode. All its parameters are trained; a checkpoint holds its state dict."""
    loss: Loss
    """Mean nll in nats per token of targets (B, L), each the token after tokens (B, L), at positions (B, L). Of packed
    documents all three are (1, T), a target of -100 counts for nothing, and the borders (N + 1,) come fourth."""
    attention: str
    """The attention implementation that runs at the training length."""
    save: Callable[[Path, dict[str, Tensor]], None]
    """Writes the model with trained weights, a state dict of it, into a folder."""
    blocks: Sequence[nn.Module] = ()
    """Its parts, one after the other, that hold most of the weights."""
    draw: Callable[[int, int], Tensor | None] = lambda rows, length: None
    """Gives the positions of a batch of so many sequences of this length, as `PositionMethod.draw`."""
    flops: Callable[[int], float] | None = None
    """FLOPs for each token of a sequence of so many, as `training_flops` counts them."""
    sample: Callable[[], str] | None = None
    """Has the model write a short text."""


def decoder_trainee(model: Decoder, packed_length: int | None = None) -> Trainee:
    """A decoder as `train` takes it, for packed documents of so many tokens in all. Puts it into training mode."""
    model.train()
    return Trainee(
        method=model.config.method,
        model=model,
        loss=model.loss,
        attention=model.attention_impl(packed_length or model.config.train_length, windowed=packed_length is not None),
        save=lambda folder, weights: save_model(model, folder, weights),
        flops=partial(
            training_flops, _multiplied(model), model.config.num_layers, model.config.num_heads * model.config.head_dim
        ),
        blocks=tuple(model.blocks),
        draw=model.positions.draw,
    )


def _multiplied(model: Decoder) -> int:
    """Weights of the matrices that each token is multiplied by: no positions, nor embeddings that are no output's."""
    looked_up: set[Tensor] = set(model.positions.parameters())
    if not model.config.tied_embeddings:
        looked_up.add(model.vocabulary.embedding.weight)
    return count_matrices(model, looked_up)


def train(
    build: Callable[[torch.device], Trainee],
    config: TrainConfig,
    batches: BatchSource,
    folder: Path,
    on_step: Callable[[Step], None] = lambda step: None,
    ranks: Ranks = ALONE,
    valid_batches: Sequence[np.ndarray] = (),
    say: Callable[[str], None] = print,
) -> TrainingRecord:
    """Train a model into a folder: metrics.jsonl, then the files of the model and training.json.

    A folder that has training.json of as many steps is finished, and its record is returned. A folder that has a
    checkpoint is gone on with, to the same numbers that an uninterrupted run gives. A finished run keeps its last where
    more steps would go on from there, as `independent_of_steps` says.

    Args:
        build: makes what is trained, on a device; random weights are drawn after torch was seeded for the run.
        config: how to train it.
        batches: what to train it on.
        folder: where to write.
        on_step: called after each step.
        ranks: the processes that share each batch, all of which call this; each writes its part of checkpoints, rank 0
            all else.
        valid_batches: what this rank measures of the validation text where `config` asks for it, each (B, L + 1).
        say: told on rank 0 what went wrong where that ends nothing.

    Raises:
        ValueError: the checkpoint is damaged, or the ranks cannot share a batch.
        FloatingPointError: the loss or the gradient became NaN or infinite; the last checkpoint is good.
        OSError: the disk is full; likewise.
        KeyboardInterrupt, Terminated: by Ctrl-C or SIGTERM, once the step at work is done and a checkpoint written.
    """
    ranks.check(config.parallel, config.batch_size, config.accumulation, config.context_parallel)
    finished = folder / "training.json"
    if finished.exists() and (record := read_training_record(finished)).steps >= config.steps:
        return record
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(build, config, ranks, batches)
    with ranks.computing():
        run.resume(folder)
    patient = config.on_full_disk == "continue"
    metrics_path = folder / "metrics.jsonl" if ranks.is_first else Path(os.devnull)
    told = (say if ranks.is_first else lambda message: None) if patient else None
    with (
        ranks.computing(),
        Cost(run.device) as cost,
        Log(metrics_path, patient) as log,
        Writer(folder, config.keep_checkpoints, config.async_checkpoint, log, told, ranks) as writer,
        deferred() as signal,
    ):
        while run.step < config.steps:
            step = replace(run.advance(), memory=cost.peak())
            if config.validate_every and run.step % config.validate_every == 0:
                step = replace(step, valid_loss=run.validate(valid_batches))
            if config.sample_every and run.step % config.sample_every == 0:
                step = replace(step, sample=run.sample())
            log.add(step)
            on_step(step)
            asked = ranks.largest(signal())
            if asked or (run.step % config.checkpoint_every == 0 and run.step < config.steps):
                run.save(writer)
            if asked:
                raise exception(asked)
        if independent_of_steps(config, config.steps):
            run.save(writer)  # to go on from, should it be made longer
        run.check_finite()
        weights = ranks.whole(run.trainee.model.state_dict())
    with ranks.leading():
        if ranks.is_first:
            _finish(run, folder, cost, weights)
        return read_training_record(finished)


@dataclass(frozen=True)
class Trial:
    """What a few steps took."""

    seconds_per_step: float
    """Of the last one."""
    peak_memory: int | None
    """As `Cost` has it, of this process."""


def try_out(
    build: Callable[[torch.device], Trainee], config: TrainConfig, batches: BatchSource, steps: int, ranks: Ranks
) -> Trial:
    """Take the first steps of a training, of which nothing is kept. Arguments as in `train`."""
    run = _Run(build, config, ranks, batches)
    with ranks.computing(), Cost(run.device) as cost:
        for _ in range(steps):
            before = run.seconds
            run.advance()
    return Trial(run.seconds - before, cost.peak_memory)


def _finish(run: "_Run", folder: Path, cost: Cost, weights: dict[str, Tensor]) -> None:
    """Write the model and the record of a run whose steps are done."""
    config = run.config
    finished = folder / "training.json"
    finished.unlink(missing_ok=True)  # that of the shorter run
    run.trainee.save(folder, weights)
    tokenizer = folder / "tokenizer.json"
    record = TrainingRecord(
        model=Model(run.trainee.method, config.train_length, config.seed),
        steps=config.steps,
        tokens=run.tokens,
        parameters=sum(parameter.numel() for parameter in run.trainee.model.parameters()),
        final_loss=final_loss(folder / "metrics.jsonl"),
        seconds=run.seconds,
        peak_memory=cost.peak_memory,
        attention=run.trainee.attention,
        cut_documents=run.batches.cut_documents,
        exchanged=run.exchanged,
        tokenizer_sha256=digest(tokenizer) if tokenizer.exists() else None,
    )
    write_training(record, finished)
    if not independent_of_steps(config, config.steps):
        remove_checkpoints(folder)


def steps_done(folder: Path) -> int:
    """How many steps of a run are done and kept, by its checkpoints or its record; ValueError where that is damaged."""
    finished = folder / "training.json"
    return last_step(folder) or (read_training_record(finished).steps if finished.exists() else 0)


def read_training_record(path: Path) -> TrainingRecord:
    """Read training.json; ValueError when it is damaged."""
    try:
        return read_training(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder to train this run again") from error


def resolve_device(device: str) -> torch.device:
    """The device that a configuration names; `auto` is cuda where there is one, else cpu."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with refusing(f"device={device!r} is not to be had here", "give cpu"):
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()  # that of meta holds nothing
    return resolved


def runs_in_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether a training computes in bf16 under autocast on a device.

    By "auto" only where the GPU itself can, from compute capability 8.0 on: below, it is emulated, and torch.compile
    leaves such code uncompiled.
    """
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16"


class _Run:
    """All that changes while a model trains, in memory and in its checkpoint."""

    def __init__(
        self, build: Callable[[torch.device], Trainee], config: TrainConfig, ranks: Ranks, batches: BatchSource
    ):
        self.config, self.ranks, self.batches = config, ranks, batches
        self.device = resolve_device(config.device)
        self.bf16 = runs_in_bf16(config, self.device)
        torch.manual_seed(config.seed)
        self.trainee = build(self.device)
        for block in self.trainee.blocks or (self.trainee.model,):
            if config.recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if config.compile:
                block.compile()
        loss, self.sharing = self.trainee.loss, None
        if config.context_parallel > 1:
            loss, self.sharing = share_loss(self.trainee.model, loss, ranks, config)
        self.exchanged: Exchanged | None = None
        self.loss, self.syncing, self.gathered = ranks.spread(
            config.parallel, self.trainee.model, self.trainee.blocks, loss
        )
        self.optimizer = build_optimizer(self.trainee.model, config)
        self.packs = config.packing == "documents"
        self.peak_flops = config.peak_flops or published_peak(self.device, self.bf16)  # of one device
        self.step = 0
        self.kept = 0  # the step of the last checkpoint
        self.tokens = 0
        self.seconds = 0.0

    def resume(self, folder: Path) -> None:
        """Go on from the last checkpoint of a folder, if it has one."""
        if step := int(self.ranks.first_one_s(torch.tensor(last_step(folder)))):  # other machines may see older ones
            self._restore(folder / f"{NAME}{step}")
        if self.ranks.is_first:
            keep_first(folder / "metrics.jsonl", self.step)

    def advance(self) -> Step:
        """Take one optimizer step on this rank's sequences of the next batch."""
        started = time.perf_counter()
        rows = self.batches.rows(self.step, self.ranks.rows(self.config.batch_size, self.config.context_parallel))
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.ranks.draw_otherwise(self.config.seed, self.step)
        count = (rows.targets != IGNORED).sum() if self.packs else rows.targets.size
        (mean_count,) = self.ranks.mean(float(count)) if self.packs else (float(count),)
        losses = []
        if self.sharing is not None:
            self.sharing.traffic.clear()  # that of validation
        for number, part in enumerate(self._parts(rows), start=1):
            with self.syncing(number == self.config.accumulation):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                    part_loss = self.loss(*part.batch) / (mean_count / part.num_targets)
                part_loss.backward()
            losses.append(part_loss.detach())
        (loss,) = self.ranks.mean(sum(part_loss.item() for part_loss in losses))  # the device is waited for once
        if self.sharing is not None:
            self.exchanged = exchanged(self.sharing, self.ranks)
        norm = whole(clip_grad_norm_(self.trainee.model.parameters(), self.config.gradient_clip)).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: loss={loss}, gradient norm={norm}; stopped, checkpoints are from before; "
                f"try a learning_rate below {self.config.learning_rate:g}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        tokens = round(mean_count * self.ranks.size / self.config.context_parallel)
        flops = None
        if self.trainee.flops is not None:
            flops = tokens * self.trainee.flops(self.config.length_at(self.step)) / seconds
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        return Step(
            step=self.step,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_per_second=tokens / seconds,
            flops_per_second=flops,
            utilisation=flops / (self.peak_flops * self.ranks.size) if flops and self.peak_flops else None,
            exchanged=None if self.exchanged is None else self.exchanged.total,
            all_gather=None if self.exchanged is None else self.exchanged.all_gather,
            ring=None if self.exchanged is None else self.exchanged.ring,
        )

    def _parts(self, rows: Sequences) -> Iterator["_Part"]:
        """The parts of an accumulated batch, on the device, cut to the length that this step has."""
        length = self.config.length_at(self.step)
        tokens, targets = (torch.from_numpy(x).to(self.device) for x in (rows.tokens, rows.targets))
        if rows.places is None:
            tokens, targets = tokens.reshape(-1, length), targets.reshape(-1, length)
            places = torch.arange(length, device=self.device).expand(len(tokens), -1)
        else:
            places = torch.from_numpy(rows.places).to(self.device) % length
        whole_batch = (tokens, targets, self._positions(places, length), places)
        for *batch, places in zip(*(x.chunk(self.config.accumulation) for x in whole_batch), strict=True):
            if not self.packs:
                yield _Part(tuple(batch), batch[1].numel())
                continue
            starts = (places.flatten() == 0).nonzero()[:, 0]
            borders = F.pad(starts, (0, 1), value=places.numel())
            yield _Part((*(x.reshape(1, -1) for x in batch), borders), int((batch[1] != IGNORED).sum()))

    @torch.no_grad()
    def validate(self, batches: Sequence[np.ndarray]) -> float:
        """Mean nll in nats per token of this rank's batches (B, L + 1) and those of all others, as many on each."""
        model = self.trainee.model.eval()
        losses = []
        for batch in batches:
            sequences = torch.from_numpy(batch).to(self.device)
            positions = torch.arange(self.config.train_length, device=self.device).expand(len(sequences), -1)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                losses.append(self.loss(sequences[:, :-1], sequences[:, 1:], positions).item())
        model.train()
        (mean,) = self.ranks.mean(sum(losses) / len(losses))
        return mean

    def sample(self) -> str | None:
        """A text that the model writes."""
        if self.trainee.sample is None:
            return None
        model = self.trainee.model.eval()
        by_itself = unshared(model, self.sharing)
        with self.gathered(), by_itself, torch.compiler.set_stance("force_eager"):  # each length would be compiled
            text = self.trainee.sample()
        model.train()
        return text

    def save(self, writer: Writer) -> None:
        """Write a checkpoint: model, optimizer, step, the state of batches that have one, and random state."""
        if self.step == self.kept:
            return
        self.check_finite()
        tensors = self.ranks.share(self._tensors())
        if self.ranks.is_first:  # the others draw otherwise, by the number of the step
            tensors |= self._random_states()
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "batches": self.batches.state(self.step),
        }
        writer.save(self.step, tensors, values)
        self.kept = self.step

    def check_finite(self) -> None:
        """FloatingPointError where weights or averages are not all finite, which no step can go on from."""
        averages = (average for state in self.optimizer.state.values() for average in state.values())
        numbers = itertools.chain(self.trainee.model.parameters(), averages)
        if self.ranks.largest(int(not all(shard(tensor).isfinite().all() for tensor in numbers))):
            raise FloatingPointError(
                f"step {self.step}: the weights are no longer finite; stopped, checkpoints are from before; try a "
                f"learning_rate below {self.config.learning_rate:g}, or less weight_decay"
            )

    def _names(self) -> dict[Tensor, str]:
        """The weights, each with one of its names."""
        return {weight: name for name, weight in self.trainee.model.state_dict(keep_vars=True).items()}

    def _tensors(self) -> dict[str, Tensor]:
        """The weights and their averages by name: what they are in, not copies."""
        names = self._names()
        tensors = {f"model.{name}": weight.detach() for weight, name in names.items()}
        for weight, averages in self.optimizer.state.items():
            tensors |= {f"{kind}.{names[weight]}": average for kind, average in averages.items()}
        return tensors

    def _random_states(self) -> dict[str, Tensor]:
        states = {"random_state": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        return states

    def _restore(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        unusable = damaged(path)
        with refusing(*unusable):
            manifest = read_manifest(path)
            self._restore_values(path, manifest.values)
            for weight, name in self._names().items():
                if f"exp_avg.{name}" in manifest.tensors:  # no gradient reaches the others
                    self.optimizer.state[weight] = {
                        "step": torch.zeros((), device=weight.device),
                        "exp_avg": torch.zeros_like(weight),
                        "exp_avg_sq": torch.zeros_like(weight),
                    }
            if not self.optimizer.state:
                raise ValueError("there are no averages")
            states = {name: state for name, state in self._random_states().items() if name in manifest.tensors}
        load_tensors(path, manifest, self._tensors() | states, self.ranks.beside)
        with refusing(*unusable):
            if (counted := max(of["step"].item() for of in self.optimizer.state.values())) != self.step:
                raise ValueError(f"step={self.step!r}, and averages of {counted:g} steps")
            torch.set_rng_state(states["random_state"])
            if "cuda_random_state" in states:  # the start before may have been on the CPU
                torch.cuda.set_rng_state(states["cuda_random_state"], self.device)
        self.kept = self.step

    def _restore_values(self, path: Path, values: dict[str, Any]) -> None:
        """Take over the plain values of a checkpoint. Whatever is raised says that they are none."""
        self.step, self.tokens, self.seconds = values["step"], values["tokens"], values["seconds"]
        if not (type(self.step) is int and 0 < self.step <= self.config.steps and path.name == f"{NAME}{self.step}"):
            raise ValueError(f"step={self.step!r}, of {self.config.steps}")
        if not (type(self.tokens) is int and self.tokens > 0):
            raise ValueError(f"tokens={self.tokens!r}")
        if not (type(self.seconds) is float and 0 <= self.seconds < math.inf):
            raise ValueError(f"seconds={self.seconds!r}")
        self.batches.restore(values["batches"])

    def _positions(self, places: Tensor, length: int) -> Tensor:
        """Where the tokens of this rank stand, given their places in sequence or document, (n, T), each below length.

        What is drawn for that is drawn here, once for all parts of the batch on all ranks.
        """
        drawn = self.trainee.draw(self.config.batch_size, length)
        if drawn is None:
            return places
        rows = self.ranks.rows(self.config.batch_size, self.config.context_parallel)
        drawn = self.ranks.first_one_s(drawn).expand(self.config.batch_size, -1)[rows]
        cuts = len(places) // len(drawn)  # of each sequence, under a curriculum
        return drawn.repeat_interleave(cuts, dim=0).to(self.device).gather(1, places)


class _Part(NamedTuple):
    """Of an accumulated batch."""

    batch: tuple[Tensor, ...]
    """What the loss takes."""
    num_targets: int
    """How many tokens it is the mean over."""
