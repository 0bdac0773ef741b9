"""A run: one trained model in its folder, with the configuration it came from."""

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from platform import platform, python_version
from typing import Any, Protocol

import numpy as np
import torch

import longreach
from longreach.data.prepare import PreparedData
from longreach.data.tokenizer import Tokenizer, load_tokenizer
from longreach.data.tokens import Batches
from longreach.evaluate.sweep import EvaluateConfig, evaluate_length
from longreach.models.decoder import Decoder
from longreach.models.pretrained import load_model
from longreach.results import Provenance, Record, Skipped, TrainingRecord
from longreach.train.config import RunConfig, claim_folder, load_config, to_toml_values
from longreach.train.loop import Step, resolve_device, train


class Progress(Protocol):
    """Told how far a stage of the work has come."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """`done` of `total` (None if unknown) units of a stage; a note says how it goes."""
        ...


@dataclass(frozen=True)
class Run:
    """A trained model with all that is needed to use it."""

    config: RunConfig
    model: Decoder
    tokenizer: Tokenizer
    device: torch.device


def train_run(config: RunConfig, folder: Path, prepared: PreparedData, progress: Progress) -> TrainingRecord:
    """Train into a folder, or go on with what is there; the record of a finished run is returned at once.

    Raises:
        ValueError: the folder holds another run, or too few tokens to train on; and as `train`.
    """
    batches = Batches(prepared.train, config.train.train_length, config.train.batch_size, config.train.seed)
    claim_folder(folder, config)
    if not (folder / "tokenizer.json").exists():
        prepared.tokenizer.save(folder / "tokenizer.json")

    def on_step(step: Step) -> None:
        note = f"{step.tokens / step.seconds:,.0f} tokens/s  loss {step.loss:.3f}"
        progress(f"training {config.method}", step.step, config.train.steps, note)

    return train(config.model_config(prepared.tokenizer.vocab_size), config.train, batches, folder, on_step)


def open_run(folder: Path, device: str | None = None) -> Run:
    """Load a trained run from its folder, on the device given, or the one that its configuration names.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: its files are damaged, or it holds a comparison, whose runs lie in folders below it.
    """
    if (folder / "results.json").exists() and not (folder / "model.safetensors").exists():
        below = sorted(path.parent.name for path in folder.glob("*/model.safetensors"))
        names = ", ".join(below) or "none is finished yet"
        raise ValueError(f"{folder} holds a comparison: give the folder of one of its runs ({names})")
    config = load_config(RunConfig, folder / "config.toml")
    resolved = resolve_device(device or config.train.device)
    return Run(config, load_model(folder, resolved), load_tokenizer(folder / "tokenizer.json"), resolved)


def validation_tokens(prepared: PreparedData, config: EvaluateConfig) -> np.ndarray:
    """The tokens that are scored, the same for every method and length, with one before them to start from.

    Raises:
        ValueError: they are fewer than the longest length.
    """
    available = len(prepared.valid) - 1
    if available < max(config.valid_lengths):
        raise ValueError(
            f"valid_lengths={','.join(map(str, config.valid_lengths))}: the validation text has {available} tokens to "
            "score; give shorter lengths, more text, or a larger valid_fraction"
        )
    scored = min(available, max((config.valid_tokens, *config.valid_lengths)))
    tokens: np.ndarray = prepared.valid.read(0, 1 + scored)
    return tokens


def evaluate_run(
    run: Run, tokens: np.ndarray, valid_length: int, config: EvaluateConfig, progress: Progress
) -> Record | Skipped:
    """Score a run's model at one length; skipped, with the reason, where its position method cannot go."""
    method, model = run.config.method, run.model
    cell: dict[str, Any] = {
        "method": method,
        "train_length": model.config.train_length,
        "valid_length": valid_length,
    }
    longest = model.positions.max_length
    if longest is not None and valid_length > longest:
        reason = f"its table holds {longest} positions"
        return Skipped(**cell, stride=valid_length, protocol="nonoverlapping", reason=reason)
    stage = f"testing {method} at {valid_length}"
    return evaluate_length(
        model,
        tokens,
        **cell,
        num_bytes=run.tokenizer.count_bytes(tokens[1:]),
        vocab_size=model.config.vocab_size,
        attention=model.attention_impl(valid_length),
        device=run.device,
        tokens_per_batch=config.tokens_per_batch,
        on_scored=lambda scored: progress(stage, scored, len(tokens) - 1),
    )


def provenance(config: Any, prepared: PreparedData, device: str, seed: int) -> Provenance:
    """What it takes to get the same results again. config is a configuration dataclass."""
    return Provenance(
        longreach=longreach.__version__,
        torch=torch.__version__,
        python=python_version(),
        platform=platform(),
        device=str(resolve_device(device)),
        num_threads=torch.get_num_threads(),
        git_commit=_git_commit(),
        seed=seed,
        corpus=prepared.corpus_name,
        corpus_hash=prepared.corpus_hash,
        tokenizer_hash=prepared.tokenizer.fingerprint,
        vocab_size=prepared.tokenizer.vocab_size,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=to_toml_values(config),
    )


def _git_commit() -> str | None:
    """The commit of the checkout that this file is tracked in; None for an installed package."""
    folder = Path(__file__).parent
    try:
        # Installed inside somebody else's checkout, the package is not tracked by it.
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True)
        if tracked.returncode != 0:
            return None
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() or None
