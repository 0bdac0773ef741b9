"""What a training will take: memory of each process, time and epochs, from its shape and from three steps of it."""

from contextlib import closing
from dataclasses import dataclass, replace

import torch

from longreach.cost import total_memory
from longreach.data.prepare import prepare
from longreach.models.decoder import Decoder
from longreach.pretrained.load import load_configuration
from longreach.train.config import RunConfig
from longreach.train.loop import resolve_device, runs_in_bf16, try_out
from longreach.train.parallel import ALONE, Ranks
from longreach.train.text import training_batches
from longreach.verbs.start import Load, build_trainee, check_held_out, check_start
from longreach.verbs.train import Progress

KEPT = 17
"""Vectors of width C that a block keeps of each token for its gradient, with d_ff = 4 C and no attention weights kept:
34 bytes of two each, as Korthikanti et al. (2022, arXiv 2205.05198, equation 1) count them."""

STEPS = 3
"""How many are tried; the first one also sets up what the others use."""


@dataclass(frozen=True)
class Forecast:
    """What a training will take; memory in bytes, of each process."""

    parameters: int
    processes: int
    """How many share each step."""
    weights: int
    """Memory of the weights; gradients take as much."""
    optimizer: int
    """Memory of the two averages of AdamW."""
    activations: int
    """Memory of what a pass keeps for its gradient, roughly."""
    available: int
    """Memory of the device, a share of it where processes share it."""
    tokens_per_step: int
    """Tokens trained on in a step, over all processes."""
    steps: int
    steps_per_epoch: float | None
    """How many see all text once; None where that is not known."""
    seconds_per_step: float | None = None
    """Measured; None where it will not fit."""
    peak_memory: int | None = None
    """Measured; None where it will not fit, or the system does not tell it."""

    @property
    def estimate(self) -> int:
        """All memory that is known of before anything was run."""
        return 2 * self.weights + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether it will fit, by the estimate."""
        return self.estimate <= self.available

    def lines(self) -> list[str]:
        """It in words."""
        gib = {name: f"{getattr(self, name) / 2**30:.2f}" for name in ("weights", "optimizer", "activations")}
        measured = "" if self.peak_memory is None else f"; measured {self.peak_memory / 2**30:.2f}"
        time = ""
        if self.seconds_per_step is not None:
            hours = self.steps * self.seconds_per_step / 3600
            speed = self.tokens_per_step / self.seconds_per_step
            time = f"; {self.seconds_per_step:.3g} s a step, {speed:,.0f} tokens/s, {hours:.3g} hours in all"
        epochs = ""
        if self.steps_per_epoch is not None:
            epochs = f", {self.steps_per_epoch:,.1f} steps an epoch, {self.steps / self.steps_per_epoch:.3g} epochs"
        return [
            f"{self.parameters:,} parameters, {self.processes} process{'es' if self.processes > 1 else ''}",
            f"memory of each in GiB: weights {gib['weights']}, gradients {gib['weights']}, optimizer "
            f"{gib['optimizer']}, activations about {gib['activations']}: {self.estimate / 2**30:.2f} of "
            f"{self.available / 2**30:.2f}{measured}",
            f"{self.tokens_per_step:,} tokens a step{epochs}{time}",
        ]


def dry_run(config: RunConfig, progress: Progress, ranks: Ranks = ALONE, load: Load = load_configuration) -> Forecast:
    """Say what a training will take, and take three steps of it if it fits; nothing but the cache is written.

    Args:
        config: the training.
        progress: told of each stage as it goes on.
        ranks: the processes that would train, all of which call this.
        load: as `starting_config` was given it.

    Raises:
        ValueError: as `train_run`, but for what concerns the folder.
    """
    train = config.train
    with ranks.leading():
        ranks.check(train.parallel, train.batch_size, train.accumulation, train.context_parallel)
        device = resolve_device(train.device)
        if check_start(config, load) is not None:
            raise ValueError(f"dry_run: start_from={config.start_from!r} has a shape of its own: leave dry_run out")
        prepared = prepare(config.data, train.seed, progress)
        check_held_out(config, prepared)
        batches = training_batches(train, prepared, ranks)
    with torch.device("meta"):  # without memory for its weights
        model = Decoder(config.model_config(prepared.tokenizer.vocab_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shards = ranks.size if train.parallel == "fsdp" else 1
    forecast = Forecast(
        parameters=parameters,
        processes=ranks.size,
        weights=4 * parameters // shards,
        optimizer=8 * parameters // shards,
        activations=_activations(config, prepared.tokenizer.vocab_size, ranks.size, runs_in_bf16(train, device)),
        available=total_memory(device) // (1 if device.type == "cuda" else ranks.processes_here),
        tokens_per_step=train.batch_size * train.train_length,
        steps=train.steps,
        steps_per_epoch=batches.steps_per_epoch,
    )
    if not forecast.fits:
        return forecast
    at_full_length = replace(train, curriculum=())  # which takes the most
    with closing(batches):
        trial = try_out(
            lambda device: build_trainee(config, prepared.tokenizer, device), at_full_length, batches, STEPS, ranks
        )
    return Forecast(
        **vars(forecast) | {"seconds_per_step": trial.seconds_per_step, "peak_memory": trial.peak_memory},
    )


def _activations(config: RunConfig, vocab_size: int, processes: int, bf16: bool) -> int:
    """What one pass keeps, in bytes: of each block all or, recomputed, its input and all of one; and the logits."""
    train, model, size = config.train, config.model, 2 if bf16 else 4
    tokens = train.batch_size * train.train_length // (processes * train.accumulation)
    vectors = model.num_layers + KEPT if train.recompute else KEPT * model.num_layers
    logits = 4 + 4 + (size if bf16 else 0)  # in float32 with their gradient, and as autocast made them
    return tokens * (vectors * model.d_model * size + vocab_size * logits)
