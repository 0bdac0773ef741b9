"""The training loop: one model, from its checkpoint if it has one, to its files."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from longreach.cost import Cost
from longreach.files import write_atomically
from longreach.models.decoder import Decoder
from longreach.models.files import save_model
from longreach.reading import parse_json, read_values
from longreach.results import Model, TrainingRecord, read_training, write_training
from longreach.train.checkpoint import load_checkpoint, save_checkpoint
from longreach.train.config import TrainConfig
from longreach.train.optim import build_optimizer, independent_of_steps, learning_rate

FINAL_STEPS = 20
"""Over how many of the last steps `final_loss` is the mean."""


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl."""

    step: int
    """Number of this step, from 1."""
    loss: float
    """Mean nll of the batch in nats per token, before the update."""
    learning_rate: float
    """Of this update."""
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Tokens trained on so far."""
    seconds: float
    """Time spent training so far, over all sessions of the run."""


class BatchSource(Protocol):
    """Batches by the number of their step, so that resuming needs no state: `Batches`, `MixedBatches`."""

    def __getitem__(self, step: int, /) -> np.ndarray:
        """The batch of a step >= 0, int64 [B, T + 1]."""
        ...


@dataclass(frozen=True)
class Trainee:
    """What is trained: a module, and all that the loop has to know of it."""

    method: str
    """Its position method, as it is called in results."""
    model: nn.Module
    """On its device, in training mode. All its parameters are trained; a checkpoint holds its state dict."""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Mean nll in nats per token of targets (B, L), each the token after tokens (B, L), at positions (B, L)."""
    attention: str
    """The attention implementation that runs at the training length."""
    save: Callable[[Path], None]
    """Writes the trained model into a folder."""
    max_training_offset: int = 0
    """Each sequence starts at a position drawn uniformly from 0 to this."""


def decoder_trainee(model: Decoder) -> Trainee:
    """A decoder as `train` takes it. Puts it into training mode."""
    model.train()
    return Trainee(
        method=model.config.method,
        model=model,
        loss=model.loss,
        attention=model.attention_impl(model.config.train_length),
        save=lambda folder: save_model(model, folder),
        max_training_offset=model.positions.max_training_offset,
    )


def train(
    build: Callable[[torch.device], Trainee],
    config: TrainConfig,
    batches: BatchSource,
    folder: Path,
    on_step: Callable[[Step], None] = lambda step: None,
) -> TrainingRecord:
    """Train a model into a folder: metrics.jsonl, then the files of the model and training.json.

    A folder that has training.json of as many steps is finished, and its record is returned. A folder that has
    checkpoint.pt is gone on with, to the same numbers that an uninterrupted run gives. A finished run keeps it where
    more steps would go on from there, as `independent_of_steps` says.

    Args:
        build: makes what is trained, on a device; random weights are drawn after torch was seeded for the run.
        config: how to train it.
        batches: what to train it on.
        folder: where to write.
        on_step: called after each step.

    Raises:
        ValueError: the checkpoint is damaged.
        FloatingPointError: the loss or the gradient became NaN or infinite; the last checkpoint is good.
        OSError: the disk is full; likewise.
    """
    finished = folder / "training.json"
    if finished.exists() and (record := read_training_record(finished)).steps >= config.steps:
        return record
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(build, config, folder)
    with Cost(run.device) as cost, open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        for number in range(run.step, config.steps):
            step = run.advance(batches[number])
            metrics.write(json.dumps(asdict(step)) + "\n")
            metrics.flush()
            on_step(step)
            if run.step % config.checkpoint_every == 0 and run.step < config.steps:
                run.save()
    if independent_of_steps(config, config.steps):
        run.save()  # to go on from, should it be made longer
    finished.unlink(missing_ok=True)  # that of the shorter run
    run.trainee.save(folder)
    tokens = config.steps * config.batch_size * config.train_length
    record = TrainingRecord(
        model=Model(run.trainee.method, config.train_length, config.seed),
        steps=config.steps,
        tokens=tokens,
        parameters=sum(parameter.numel() for parameter in run.trainee.model.parameters()),
        final_loss=_final_loss(folder / "metrics.jsonl"),
        seconds=run.seconds,
        peak_memory=cost.peak_memory,
        attention=run.trainee.attention,
    )
    write_training(record, finished)
    if not independent_of_steps(config, config.steps):
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return record


def steps_done(folder: Path) -> int:
    """How many steps of a run are done and kept, by its record or its checkpoint.

    Raises:
        ValueError: the file is damaged.
    """
    checkpoint, finished = folder / "checkpoint.pt", folder / "training.json"
    if checkpoint.exists():
        return int(load_checkpoint(checkpoint)["step"])
    return read_training_record(finished).steps if finished.exists() else 0


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
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} is not to be had here ({str(error).splitlines()[0]}): give cpu") from error
    return resolved


class _Run:
    """All that changes while a model trains, in memory and in its checkpoint."""

    def __init__(self, build: Callable[[torch.device], Trainee], config: TrainConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = resolve_device(config.device)
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        torch.manual_seed(config.seed)
        self.trainee = build(self.device)
        self.loss: Callable[..., Tensor] = torch.compile(self.trainee.loss) if config.compile else self.trainee.loss
        self.optimizer = build_optimizer(self.trainee.model, config)
        self.step = 0
        self.seconds = 0.0
        if (folder / "checkpoint.pt").exists():
            self._restore(load_checkpoint(folder / "checkpoint.pt"))
        _keep_metrics(folder / "metrics.jsonl", self.step)

    def advance(self, batch: Any) -> Step:
        """Take one optimizer step on token ids (batch_size, L + 1)."""
        started = time.perf_counter()
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sequences = torch.from_numpy(batch).to(self.device)
        positions = self._positions(sequences)
        loss = 0.0
        for part, part_positions in zip(
            sequences.chunk(self.config.accumulation), positions.chunk(self.config.accumulation), strict=True
        ):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                part_loss = self.loss(part[:, :-1], part[:, 1:], part_positions) / self.config.accumulation
            part_loss.backward()
            loss += part_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.trainee.model.parameters(), self.config.gradient_clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: loss={loss}, gradient norm={norm}; stopped, checkpoints are from before; "
                f"try a learning_rate below {self.config.learning_rate:g}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - started
        tokens = self.step * self.config.batch_size * self.config.train_length
        return Step(self.step, loss, rate, norm, tokens, self.seconds)

    def save(self) -> None:
        """Write the checkpoint: model, optimizer, step (which is the data's position too) and random state."""
        state = {
            "model": self.trainee.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "random_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        save_checkpoint(state, self.folder / "checkpoint.pt")

    def _restore(self, state: dict[str, Any]) -> None:
        self.trainee.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random_state"])
        if self.device.type == "cuda" and "cuda_random_state" in state:  # the start before may have been on the CPU
            torch.cuda.set_rng_state(state["cuda_random_state"], self.device)

    def _positions(self, sequences: Tensor) -> Tensor:
        """(B, L) positions of a batch, each row shifted by its own draw where the method asks for that."""
        positions = torch.arange(self.config.train_length, device=self.device).expand(len(sequences), -1)
        if self.trainee.max_training_offset:
            draws = torch.randint(self.trainee.max_training_offset + 1, (len(sequences), 1))
            positions = positions + draws.to(self.device)
        return positions


def _keep_metrics(path: Path, steps: int) -> None:
    """Drop what an interrupted session logged after its last checkpoint, a torn last line included."""
    if not path.exists():
        return
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
    write_atomically(path, "".join(kept).encode())


def _final_loss(metrics: Path) -> float:
    lines = metrics.read_text(encoding="utf-8").splitlines()[-FINAL_STEPS:]
    try:
        return sum(read_values(Step, parse_json(line)).loss for line in lines) / len(lines)
    except ValueError as error:
        raise ValueError(f"{metrics} is damaged ({error}): delete its folder to train this run again") from error
