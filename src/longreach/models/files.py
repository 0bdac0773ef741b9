"""A model as files: model.safetensors, config.json, and beside them the tokenizer.json that others write."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from longreach.files import replacing
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.reading import parse_file, read_values

MODEL_TYPE = "longreach"


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
        ValueError: a file is damaged, or the weights are not those of the configuration.
    """
    folder = Path(folder)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the folder of a trained run")
    try:
        values = parse_file(config_path)
        if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
            raise ValueError(f"model_type is not {MODEL_TYPE!r}")
        config = read_values(ModelConfig, values)
        weights = safetensors.torch.load_file(weights_path)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder}: damaged or not a longreach model ({error}); train it again") from error
    model = Decoder(config if method is None else dataclasses.replace(config, method=method))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first_line = str(error).splitlines()[-1].strip()
        raise ValueError(f"{weights_path}: not the weights of {config_path} ({first_line})") from error
    return model.to(device).eval()
