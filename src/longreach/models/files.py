"""A model as files: model.safetensors, config.json, and beside them the tokenizer.json that others write."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from longreach.files import MODEL_FILES, open_file, replacing
from longreach.foreign import refusing
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder, count_weights
from longreach.reading import parse_file, read_values

MODEL_TYPE = "longreach"

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights of Hugging Face, in the order in which they are looked for: each whole, then by its index."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""Name that transformers gives to a part of the first of them."""

MOST_LABELS = 2**16
"""The most labels of a classifier that are taken for no mistake."""


def save_model(
    model: Decoder, folder: str | os.PathLike[str], weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write model.safetensors, of these weights or else those that it has, and config.json, each whole or not at all.

    Raises:
        OSError: the disk is full or the folder cannot be written; files of these names are as they were.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **dataclasses.asdict(model.config)}
    weights = {name: tensor.contiguous() for name, tensor in (weights or model.state_dict()).items()}
    path = folder / "model.safetensors"
    try:
        # The configuration takes its place first: a folder that has the weights is whole.
        with replacing(path) as new_weights, replacing(folder / "config.json") as new_config:
            new_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            safetensors.torch.save_file(weights, new_weights)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): mend that and run again") from error


def read_model_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The configuration that `save_model` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = Path(folder) / "config.json"
    try:
        values = parse_file(path)
        if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
            raise ValueError(f"model_type is not {MODEL_TYPE!r}")
        return read_values(ModelConfig, values)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; give the folder of a trained run") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged or not a longreach model ({error}); train it again") from error


def load_model(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", method: str | None = None
) -> Decoder:
    """Read what `save_model` wrote, as a model ready for evaluation.

    Args:
        folder: where it was written to.
        device: where to put it.
        method: its position method under another scaling, as `longreach.positions.with_scaling` gives it; its own when
            None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the weights are not those of the configuration, or no numbers.
    """
    config, path = read_model_config(folder), Path(folder) / "model.safetensors"
    try:
        open_file(path).close()  # the library would wait for a pipe
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; give the folder of a trained run") from None
    mend = "train it again"
    with refusing(f"{path}: damaged or not a longreach model", mend):
        weights = safetensors.torch.load_file(path)
        for name, weight in weights.items():
            if not (weight.is_floating_point() and weight.isfinite().all()):
                raise ValueError(f"{name} is not all finite numbers")
    with refusing(f"{path}: not the weights of {path.with_name('config.json')}", mend):
        # Counted before anything is made of a configuration that may ask for any number of layers.
        there, asked = sum(weight.numel() for weight in weights.values()), count_weights(config)
        if there != asked:
            raise ValueError(f"it holds {there:,} numbers, not {asked:,}")
        model = Decoder(config if method is None else dataclasses.replace(config, method=method))
        model.load_state_dict(weights)
    return model.to(device).eval()


def check_numbers(config: Mapping[str, Any]) -> None:
    """ValueError for numbers that no model has, and that transformers takes as they are.

    It makes a name for each of any number of labels, and normalised with an infinite epsilon all texts are alike.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_numbers(value)
        elif name == "num_labels" and isinstance(value, int) and value > MOST_LABELS:
            raise ValueError(f"num_labels={value}: give at most {MOST_LABELS}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value}: give a finite number")
        elif str(name).endswith(("eps", "epsilon")) and isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"{name}={value}: give a number of at least 0 and below 1")


def shards_of(index: Path) -> list[str]:
    """Names of the files that the index of somebody's weights says they are in, which lie beside it.

    Raises:
        ValueError: it is damaged, or names files that lie elsewhere or are no weights.
    """
    try:
        values = parse_file(index)
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from error
    shards = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(shards, dict) or not isinstance(values.get("metadata", {}), dict):
        raise ValueError(f"{index} is no index of weights: it needs a weight_map, an object")
    names = list(dict.fromkeys(map(str, shards.values())))
    for name in names:
        if Path(name).name != name or Path(name).suffix not in MODEL_FILES:
            raise ValueError(f"{index} names weights in {name!r}: give files of weights that lie beside it")
    return names


def drop_stale_weights(folder: Path) -> None:
    """Delete what is of an earlier model, after transformers has saved one: the index, or the whole file beside it.

    It deletes earlier shards alone, of names as it gives them, and reads a whole file whatever index there is: weights
    saved in shards beside one would never be read.
    """
    whole = folder / WEIGHTS[0]
    index = folder / f"{WEIGHTS[0]}.index.json"
    if whole.is_file() and index.is_file():
        with contextlib.suppress(ValueError):  # a damaged one was not written now, nor is it read
            shards = shards_of(index)
            is_new = shards and all(_SHARD.fullmatch(shard) and (folder / shard).is_file() for shard in shards)
            (whole if is_new else index).unlink()
