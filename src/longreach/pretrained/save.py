"""Extended and converted models as files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from longreach.models.files import drop_stale_weights
from longreach.ops.arguments import validate_path
from longreach.pretrained.attend import Extension, extension_of
from longreach.pretrained.lengths import SCALING, write_alibi_scaling
from longreach.pretrained.quiet import quiet_transformers


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write an extended or converted model so that `load_pretrained` gives back one of bit-identical outputs.

    The files are those of transformers' own `save_pretrained`, with the stock name of the class. config.json says in
    addition how the slopes are scaled, by `alibi_scaling` in BTLM's schema, null for not at all, and whether the model
    was converted, by `longreach_positions`. Plain transformers loads the folder too, but heeds neither: to it a
    converted model has the positions that were taken out, and slopes are unscaled but for BTLM's and JAIS's own code.

    The model itself is left as it is. How it is run, that is tolerance and impl, is not saved.

    Args:
        model: an extended or converted model of transformers; adapters of PEFT merged into it first.
        folder: where to write; files of the same names are replaced, and weights of an earlier model deleted.
        options: those of transformers' `save_pretrained`, such as max_shard_size.

    Raises:
        ValueError: the model is not extended, or is so in a way that config.json has no place for.
        OSError: the disk is full or the folder cannot be written.
    """
    from transformers import PreTrainedModel

    extension = extension_of(model)
    validate_path("folder", folder)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no model of transformers: merge adapters first, or unwrap it")
    _require_storable(extension)
    with quiet_transformers(), _setting(model.config, SCALING, write_alibi_scaling(extension.scaling)):
        try:
            model.save_pretrained(folder, **options)
        except safetensors.SafetensorError as error:
            raise OSError(f"the weights cannot be written to {folder} ({error}): mend that and run again") from error
    drop_stale_weights(Path(folder))


def _require_storable(extension: Extension) -> None:
    """Raise ValueError where a model computes what config.json cannot say."""
    for setting, differs in (
        (f"per_step={extension.per_step}", extension.per_step),
        (f"length={extension.length}", extension.length is not None),
        (f"sinks={extension.sinks}", extension.sinks is not None),
    ):
        if differs:
            raise ValueError(f"{setting}: config.json has no place for it; extend the model without it, then save it")


@contextmanager
def _setting(config: Any, name: str, value: Any) -> Iterator[None]:
    """Give a field of a configuration a value for a while."""
    had, before = hasattr(config, name), getattr(config, name, None)
    setattr(config, name, value)
    try:
        yield
    finally:
        if had:
            setattr(config, name, before)
        else:
            delattr(config, name)
