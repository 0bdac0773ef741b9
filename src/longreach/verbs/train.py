"""A run: one trained model in its folder, with the configuration it came from."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch

from longreach.cost import total_memory
from longreach.data.prepare import PreparedData, ValidationData, prepare
from longreach.data.tokenizer import Tokenizer, load_tokenizer
from longreach.files import digest, open_file
from longreach.folder import begin, hold, identity
from longreach.measure.subject import Subject
from longreach.models.decoder import count_weights
from longreach.models.files import load_model, read_model_config
from longreach.pretrained.load import holds_pretrained, load_configuration
from longreach.reading import plain_values, read_file
from longreach.results import Provenance, Start, TrainingRecord
from longreach.train.checkpoint import checkpoints
from longreach.train.config import RunConfig, TrainConfig
from longreach.train.loop import (
    Trainee,
    read_training_record,
    resolve_device,
    steps_done,
    train,
)
from longreach.train.metrics import Step
from longreach.train.optim import independent_of_steps
from longreach.train.parallel import ALONE, Ranks
from longreach.train.text import training_batches, validation_batches
from longreach.train.tracking import Tracked, Tracking, check_trackers
from longreach.verbs.start import Load, build_trainee, check_held_out, check_start, digest_of_weights


class Progress(Protocol):
    """Told how far a stage of the work has come."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """`done` of `total` (None if unknown) units of a stage; a note says how it goes."""
        ...


def train_run(
    config: RunConfig,
    folder: Path,
    progress: Progress,
    prepared: PreparedData | None = None,
    ranks: Ranks = ALONE,
    load: Load = load_configuration,
) -> TrainingRecord:
    """Train into a folder, or go on with what is there; the record of a finished run is returned at once.

    Args:
        config: what to train, on what, and how.
        folder: where to.
        progress: told of each stage as it goes on.
        prepared: the text of `config`, where it has been read already.
        ranks: the processes that train it together, all of which call this.
        load: as `starting_config` was given it.

    Raises:
        ValueError: the folder holds another run, what was read for it has changed since, too few tokens to train on,
            or the model to start from does not fit; and as `train`.
        OSError: another process works in the folder; and as `train`.
    """
    with ExitStack() as stack:
        with ranks.leading():
            device = check_run(config, ranks)
            pretrained = check_start(config, load)
            before = stack.enter_context(hold(folder, config, besides=("steps",))) if ranks.is_first else None
            if before is not None:
                _check_steps(folder, before.train, config.train)
                if (folder / "training.json").exists():
                    check_record(folder, config)
            prepared = prepared or prepare(config.data, config.train.seed, progress)
            check_held_out(config, prepared)
            batches = stack.enter_context(closing(training_batches(config.train, prepared, ranks)))
            valid_batches = validation_batches(config.train, prepared, ranks) if config.train.validate_every else ()
            if batches.description:
                progress(batches.description, 1, 1)
            if ranks.is_first:
                weights = {} if config.start_from is None else digest_of_weights(config.start_from, pretrained)
                begin(folder, config, prepared.digests | weights, device)
                if not (folder / "tokenizer.json").exists():
                    prepared.tokenizer.save(folder / "tokenizer.json")
            ranks.check_sees(folder)
        tokenizer = prepared.tokenizer
        track = stack.enter_context(tracking(config.train.track, folder, config, ranks))

        def on_step(step: Step) -> None:
            note = f"{step.tokens / step.seconds:,.0f} tokens/s  loss {step.loss:.3f}"
            progress(f"training {config.method}", step.step, config.train.steps, note)
            track(step.step, {f"training/{name}": value for name, value in step.figures().items() if name != "step"})

        def say(message: str) -> None:
            print(f"longreach train: {message}", file=sys.stderr)

        def build(device: torch.device) -> Trainee:
            return build_trainee(config, tokenizer, device, pretrained)

        return train(build, config.train, batches, folder, on_step, ranks, valid_batches, say)


def tracking(names: Sequence[str], folder: Path, config: Any, ranks: Ranks) -> Tracking:
    """What shows the figures of a folder that was begun with a configuration: one rank does."""
    if not (names and ranks.is_first):
        return Tracking((), Tracked(folder, "", {}))
    return Tracking(names, Tracked(folder, identity(folder), plain_values(config)))


def _check_steps(folder: Path, before: TrainConfig, now: TrainConfig) -> None:
    """Check that a run may have as many steps as are asked for now: those that it was begun with, or more.

    More steps only where those that are done do not depend on how many follow.
    """
    if now.steps == before.steps:
        return
    asked = f"steps={now.steps}: output={folder} was begun with steps={before.steps}"
    if now.steps < before.steps:
        raise ValueError(f"{asked}: give as many, or a new folder")
    finished = (folder / "training.json").exists()
    if not independent_of_steps(before, steps_done(folder)):
        first = "" if finished else f"finish it with steps={before.steps}, then "
        reason = "a curriculum of shares of them" if before.curriculum else "a learning rate that falls until then"
        raise ValueError(
            f"{asked} and {reason}, so that a longer run is another: {first}go on from it into a new folder "
            f"(--from {folder})"
        )
    if finished and not checkpoints(folder):
        raise ValueError(f"{asked}, and its checkpoint is gone: go on from it into a new folder (--from {folder})")


def open_run(folder: Path, device: str | None = None, method: str | None = None) -> Subject:
    """A trained run as evaluation sees a model, on the device given, or the one that its configuration names.

    method is its position method under another scaling than it was trained with, as `with_scaling` gives it.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: its files are damaged, its tokenizer is another model's, or it holds a comparison, whose runs lie in
            folders below it, or a Hugging Face model.
    """
    config = read_run(folder)
    resolved = resolve_device(config.train.device if device is None else device)
    model, tokenizer = load_model(folder, resolved, method), load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{folder} has a model of {model.config.vocab_size} tokens and a tokenizer.json of {tokenizer.vocab_size}: "
            "put the tokenizer.json there that the model was trained with"
        )
    if (folder / "training.json").exists():
        trained_with = read_training_record(folder / "training.json").tokenizer_sha256
        if trained_with not in (None, digest(folder / "tokenizer.json")):
            raise ValueError(f"{folder} has another tokenizer.json than its model was trained with: put that back")
    return Subject(
        identity=config.identity,
        model=model,
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        device=resolved,
        max_length=model.positions.max_length,
        attention=model.attention_impl,
    )


def read_run(folder: Path) -> RunConfig:
    """The configuration of a trained run.

    Raises:
        FileNotFoundError, ValueError: as `open_run`, without a look at the weights.
    """
    if holds_pretrained(folder):
        raise ValueError(
            f"{folder} holds a Hugging Face model: longreach evaluate measures it, longreach.load_pretrained loads it"
        )
    if (folder / "results.json").exists() and not (folder / "model.safetensors").exists():
        below = sorted(path.parent.name for path in folder.glob("*/model.safetensors"))
        names = ", ".join(below) or "none is finished yet"
        raise ValueError(f"{folder} holds a comparison: give the folder of one of its runs ({names})")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}: give the folder of a trained run"
        )
    if not (folder / "config.toml").exists():
        raise FileNotFoundError(
            f"{folder} holds no model: give the folder of a trained run, with its config.toml, or of a Hugging Face "
            "model, with its config.json"
        )
    config = read_file(RunConfig, folder / "config.toml")
    try:
        open_file(folder / "model.safetensors").close()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; give the folder of a trained run") from None
    made = read_model_config(folder)
    asked = config.model_config(made.vocab_size)
    for field in fields(made):
        if (of_model := getattr(made, field.name)) != (of_run := getattr(asked, field.name)):
            raise _changed(folder, field.name, of_run, of_model, "config.json")
    if (folder / "training.json").exists():
        check_record(folder, config)
    return config


def check_record(folder: Path, config: RunConfig) -> TrainingRecord:
    """The record of a finished run, after checking that it is of this one: results are named after both.

    Raises:
        ValueError: it is of another, or damaged.
    """
    record = read_training_record(folder / "training.json")
    for field in fields(record.model):
        there, asked = getattr(record.model, field.name), getattr(config.identity, field.name)
        if there != asked:
            raise _changed(folder, field.name, asked, there, "training.json")
    return record


def _changed(folder: Path, name: str, there: object, trained: object, file: str) -> ValueError:
    return ValueError(
        f"{folder / 'config.toml'} has {name}={there!r} and {file} {name}={trained!r}: "
        "put back the files that the run was trained with"
    )


def check_run(config: RunConfig, ranks: Ranks) -> torch.device:
    """Check that a run can be had here, by these processes, before anything is read for it; the device that it takes.

    Raises:
        ValueError: it cannot.
    """
    train = config.train
    ranks.check(train.parallel, train.batch_size, train.accumulation, train.context_parallel)
    device = resolve_device(train.device)
    check_trackers(train.track)
    _check_memory(config, device)
    return device


def _check_memory(config: RunConfig, device: torch.device) -> None:
    """Check that the memory of a device can hold the least that a run takes, before its folder is made.

    That is each weight with its gradient and two averages in float32, what each block hands the next for each token of
    a part of a batch, and the ids of a whole batch. What a run takes beyond that only its start can tell.

    Raises:
        ValueError: it cannot.
    """
    train, vocab_size = config.train, config.data.vocab_size if config.data.tokenizer is None else 1
    tokens = train.batch_size * train.train_length
    asked = 8 * tokens  # int64
    if config.start_from is None:
        asked += 16 * count_weights(config.model_config(vocab_size))
        asked += 4 * config.model.num_layers * config.model.d_model * tokens // train.accumulation
    memory = total_memory(device)
    if asked > memory:
        raise ValueError(
            f"num_layers={config.model.num_layers}, d_model={config.model.d_model}, vocab_size={vocab_size}, "
            f"train_length={train.train_length} and batch_size={train.batch_size} take at least {asked / 2**30:,.1f} "
            f"GiB, {device} has {memory / 2**30:,.1f}: give smaller numbers, or a larger accumulation"
        )


def provenance(
    config: Any,
    starts: tuple[Start, ...],
    tokenizer: Tokenizer,
    prepared: ValidationData | None,
    sources: dict[str, str],
) -> Provenance:
    """What it takes to get the same results again.

    config is a configuration dataclass, prepared the text that is scored, None where none is, sources all else that is
    read.
    """
    return Provenance(
        starts=starts,
        split_seed=None if prepared is None else prepared.split_seed,
        corpus="none" if prepared is None else prepared.corpus_name,
        corpus_hash="none" if prepared is None else prepared.corpus_hash,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        sources=sources,
        config=plain_values(config),
    )
