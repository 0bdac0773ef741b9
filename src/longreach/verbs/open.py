"""Models of Hugging Face opened for measurement."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longreach.data.tokenizer import Tokenizer, load_tokenizer
from longreach.encoders.config import is_alibi_encoder
from longreach.encoders.source import Source
from longreach.foreign import refusing
from longreach.measure.subject import Subject
from longreach.measure.transformers import HuggingFaceModel, StateLength
from longreach.pretrained.attend import find_extension
from longreach.pretrained.lengths import longest_model_input, training_length
from longreach.pretrained.load import holds_pretrained, load_causal_model, load_configuration
from longreach.pretrained.quiet import quiet_transformers
from longreach.reading import read_file
from longreach.results import Model
from longreach.train.config import RunConfig

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""In what weights may be loaded, auto for what their files are in."""


def named_dtype(name: str) -> torch.dtype | None:
    """The dtype of a name, None for auto; ValueError where weights cannot be in it."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: give one of {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)


def names_pretrained(name: str) -> bool:
    """Whether a name is that of a model of Hugging Face, fine-tuned here or not, rather than the folder of a run."""
    folder = Path(name)
    if holds_pretrained(folder):
        return True
    return not (folder / "config.toml").exists() and (not folder.is_dir() or (folder / "config.json").exists())


def is_encoder(name: str) -> bool:
    """Whether a name is that of an ALiBi encoder that can be had now."""
    try:
        return is_alibi_encoder(Source(name).configuration())
    except ValueError:  # whoever opens it next says what is wrong
        return False


def require_decoder(name: str) -> None:
    """ValueError for the name of an ALiBi encoder."""
    if is_encoder(name):
        raise ValueError(f"model {name!r} is an encoder: longreach embed is for it; give a decoder")


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of a model of Hugging Face; ValueError that names the model where it has none that serves."""
    try:
        return load_tokenizer(name)
    except ValueError as error:
        refusal = str(error).replace("tokenizer=", "tokenizer ", 1)  # nobody gave it by that name
        raise ValueError(f"model {name!r}: its {refusal}") from error


def fine_tuning(name: str) -> RunConfig | None:
    """How a model of Hugging Face was fine-tuned by `train --from`; None for one that was not.

    Raises:
        ValueError: its config.toml is damaged.
    """
    path = Path(name) / "config.toml"
    return read_file(RunConfig, path) if path.exists() else None


def load_subject(
    name: str,
    config: Any = None,
    *,
    device: torch.device,
    dtype: str = "auto",
    train_length: int | None = None,
    trust_remote_code: bool = False,
    adapt: Callable[[Any], StateLength | None] = lambda model: None,
) -> Subject:
    """Load a causal language model with its tokenizer by `from_pretrained`.

    Args:
        name: a name on the Hugging Face hub, or a folder that `save_pretrained` wrote, tokenizer.json included.
        config: its configuration, where it has been loaded already.
        device: where to put it.
        dtype: a name of torch's, such as "float32", or "auto" for the one that the files are in.
        train_length: L, the length in tokens that it was trained at; its configuration's when None.
        trust_remote_code: run code that comes with the model.
        adapt: applied to the loaded model. Where it changed the model's positions, it gives what the model must be
            told a length by, and there is no limit on length.

    Raises:
        ValueError: transformers is not installed, there is no such model or it cannot be had now, a file is missing
            or damaged, the tokenizer is not the model's, or the training length is not known.
    """
    named_dtype(dtype)  # refuses
    if config is None:
        config = load_configuration(name, trust_remote_code=trust_remote_code)
    length = training_length(name, config, train_length)
    tokenizer = tokenizer_of(name)
    vocab_size = config.get_text_config().vocab_size
    if tokenizer.text_vocab_size > vocab_size:  # padding and the like may be added beyond
        raise ValueError(
            f"model {name!r} has {vocab_size} tokens and its tokenizer {tokenizer.text_vocab_size}: "
            "the tokenizer is not the model's"
        )
    loaded = load_causal_model(name, config, dtype=dtype, trust_remote_code=trust_remote_code)
    state_length = adapt(loaded)
    extended = find_extension(loaded) is not None
    max_length = longest_model_input(loaded) if state_length is None else None
    with quiet_transformers(), refusing(f"model {name!r} is loaded and does not run", "mend its configuration"):
        model = HuggingFaceModel(loaded.to(device), max_length, state_length, heeds_positions=not extended)
    if extended:
        implementation = "longreach"
    else:
        implementation = f"transformers {loaded.config._attn_implementation}"  # the only place where it is told
    return Subject(
        identity=Model(name, length, seed=None),
        model=model,
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        device=device,
        max_length=model.max_length,
        attention=lambda query_length, key_length, windowed: implementation,
    )
