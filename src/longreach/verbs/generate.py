"""A text continued by a trained run or a pretrained model: `generate`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longreach.data.tokenizer import StreamingDecoder
from longreach.measure.generation import sampler, stream_tokens
from longreach.measure.subject import Subject
from longreach.measure.transformers import HuggingFaceModel, StateLength
from longreach.positions.scaling import parse_scaling
from longreach.pretrained.attend import find_extension
from longreach.pretrained.families import find_layout
from longreach.pretrained.lengths import declared_length
from longreach.pretrained.load import adapt, stretch
from longreach.reading import refuse_below, refuse_empty
from longreach.train.loop import resolve_device
from longreach.verbs.open import fine_tuning, load_subject, named_dtype, names_pretrained, require_decoder
from longreach.verbs.train import open_run


@dataclass(frozen=True)
class GenerateConfig:
    """What is to be continued, and how."""

    model: str
    """Folder of a trained run, or a Hugging Face model: a folder or a name on the hub."""
    prompt: str | None = None
    """Text to continue, or - for standard input; by default the start of a document."""
    max_new_tokens: int = 256
    """How many tokens to add at most."""
    temperature: float = 0.8
    """0 takes the likeliest token; otherwise logits are divided by it and a token is drawn."""
    top_k: int | None = None
    """Draw only among the k likeliest tokens."""
    top_p: float | None = None
    """Draw only among the likeliest tokens that together hold probability p."""
    seed: int = 0
    """Seed of the draws."""
    device: str | None = None
    """Where to run; by default where the model was trained, and cuda for one trained elsewhere where there is one."""
    dtype: str | None = None
    """Of a Hugging Face model: float32, bfloat16, float16, or auto for that of its files, the default."""
    train_length: int | None = None
    """L in tokens of a Hugging Face model, where its configuration does not tell it."""
    scaling: str | None = None
    """How the slopes of a Hugging Face model with ALiBi, or its rotary positions, are scaled past L, as in evaluate; by
    default as its configuration says."""

    def __post_init__(self) -> None:
        refuse_empty(self, "model")
        refuse_below(self, 0, "seed")
        refuse_below(self, 1, "max_new_tokens", "top_k", "train_length")
        if self.prompt == "":
            raise ValueError("prompt is empty: give text, or leave it out to start a document")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give 0 for the likeliest token, or a positive number")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: give more than 0 and at most 1")
        if self.dtype is not None:
            named_dtype(self.dtype)  # refuses
        if self.scaling is not None:
            parse_scaling(self.scaling, train_length=2)  # any L will do to see that it can be read

    def idle(self) -> dict[str, str]:
        """Name of a field that nothing heeds beside the others -> why."""
        if self.temperature > 0:
            return {}
        return dict.fromkeys(("top_k", "top_p", "seed"), "temperature=0 draws nothing, it takes the likeliest token")


def generate(config: GenerateConfig) -> Iterator[str]:
    """The prompt, then what the model adds, piece by piece as it is drawn.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: there is no such model, its files are damaged, or a setting is not for such a model.
    """
    subject = (_pretrained if names_pretrained(config.model) else _run)(config)
    tokenizer = subject.tokenizer
    choose = sampler(
        subject.device, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed
    )
    ids = tokenizer.encode(config.prompt) if config.prompt else [tokenizer.eos_id]
    tokens = stream_tokens(subject, ids, config.max_new_tokens, choose)
    decoder = StreamingDecoder(tokenizer)
    yield config.prompt or ""
    for token in tokens:
        yield decoder.push(token)
    yield decoder.finish()


def _run(config: GenerateConfig) -> Subject:
    for name in ("dtype", "train_length", "scaling"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(f"{name}={value}: {config.model} is a run, which has its own; leave it out")
    return open_run(Path(config.model), config.device)


def _pretrained(config: GenerateConfig) -> Subject:
    require_decoder(config.model)
    fine_tuned = fine_tuning(config.model)
    train_length = config.train_length or (fine_tuned.train.train_length if fine_tuned else None)
    default = fine_tuned.train.device if fine_tuned else "auto"
    subject = load_subject(
        config.model,
        device=resolve_device(default if config.device is None else config.device),
        dtype="auto" if config.dtype is None else config.dtype,
        train_length=train_length,
        adapt=partial(_extended, config.scaling, train_length),
    )
    if config.train_length is not None:
        _check_length_is_heeded(config.train_length, config.scaling, subject)
    return subject


def _check_length_is_heeded(train_length: int, scaling: str | None, subject: Subject) -> None:
    """Raise ValueError where L is given, is told by the configuration, and nothing is scaled by it."""
    assert isinstance(subject.model, HuggingFaceModel)  # load_subject makes no other
    extension = find_extension(subject.model.model)
    told = declared_length(subject.model.model.config.get_text_config())
    asked = parse_scaling(scaling, 2) if scaling else extension and extension.scaling
    if told is not None and not (asked and (asked.depends_on_length or asked.kind == "yarn")):
        raise ValueError(
            f"train_length={train_length}: nothing is scaled by it here, and its configuration says {told}; give a "
            "scaling that is, such as linear, or leave it out"
        )


def _extended(scaling: str | None, train_length: int | None, model: Any) -> StateLength | None:
    """Make a loaded model exact in place where it has ALiBi, and longer where a scaling is named."""
    if scaling is None:
        if (state_length := adapt(model)) is not None:
            return state_length
        try:
            find_layout(model)
        except ValueError:  # no ALiBi
            return None
        return stretch(model, "none", train_length)
    try:
        return stretch(model, scaling, train_length)
    except ValueError as error:
        raise ValueError(f"scaling={scaling}: {error}") from error
