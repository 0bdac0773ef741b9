"""Extended and converted models as files, and models made from files what their configuration says they are."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from longreach.models.files import MODEL_TYPE
from longreach.pretrained.convert import convert
from longreach.pretrained.extend import FAMILIES, extend, extension_of, fixed_length
from longreach.pretrained.interpolation import read_alibi_scaling, write_alibi_scaling
from longreach.pretrained.lengths import SCALING
from longreach.pretrained.mark import MARK
from longreach.pretrained.state import Extension
from longreach.reading import parse_file


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write an extended or converted model so that `load_pretrained` gives back one of bit-identical outputs.

    The files are those of transformers' own `save_pretrained`, with the stock name of the class. config.json says in
    addition how the slopes are scaled, by `alibi_scaling` in BTLM's schema, null for not at all, and whether the model
    was converted, by `longreach_positions`. Plain transformers loads the folder too, but heeds neither: to it a
    converted model has the positions that were taken out, and slopes are unscaled but for BTLM's and JAIS's own code.

    The model itself is left as it is. How it is run, that is tolerance and impl, is not saved.

    Args:
        model: an extended or converted model of transformers; adapters of PEFT merged into it first.
        folder: where to write; files of the same names are replaced.
        options: those of transformers' `save_pretrained`, such as max_shard_size.

    Raises:
        ValueError: the model is not extended, or is so in a way that config.json has no place for.
        OSError: the disk is full or the folder cannot be written.
    """
    from transformers import PreTrainedModel

    extension = extension_of(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no model of transformers: merge adapters first, or unwrap it")
    _require_storable(extension)
    with _setting(model.config, SCALING, write_alibi_scaling(extension.scaling)):
        try:
            model.save_pretrained(folder, **options)
        except safetensors.SafetensorError as error:
            raise OSError(f"the weights cannot be written to {folder} ({error}): mend that and run again") from error


def load_pretrained(name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a causal language model of transformers, and `adapt` it to what its configuration says.

    Args:
        name: a folder that `save_pretrained` wrote, or any that transformers loads, or a name on the hub.
        options: those of `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: its configuration asks for what is not known.
        OSError: as transformers raises it, there is no such model.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, **options)
    adapt(model)
    return model


def adapt(model: nn.Module) -> Callable[[int], AbstractContextManager[None]] | None:
    """Make of a loaded model in place what its configuration says: converted, or extended by its `alibi_scaling`.

    A model whose configuration says neither is left to its stock code, and so is one of an unknown family.

    Returns:
        `fixed_length` of this model, which states the length L' for a decoding loop; None where it is left as it is.

    Raises:
        ValueError: the configuration says what is not known, or does not fit the model.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or not (hasattr(config, MARK) or hasattr(config, SCALING)):
        return None
    scaling = read_alibi_scaling(getattr(config, SCALING, None))
    if hasattr(config, MARK):
        convert(model, getattr(config, MARK), scaling=scaling)
    else:
        extend(model, scaling=scaling)
    return partial(fixed_length, model)


def holds_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model of transformers, and not one of our own or none at all."""
    try:
        values = parse_file(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") != MODEL_TYPE


def _require_storable(extension: Extension) -> None:
    """Raise ValueError where a model computes what config.json cannot say."""
    for told, differs in (
        (f"logn={extension.logn}", extension.logn),
        (f'bias="{extension.bias}"', extension.bias != "exact"),
        (f"per_step={extension.per_step}", extension.per_step),
        (f"length={extension.length}", extension.length is not None),
        (f"sinks={extension.sinks}", extension.sinks is not None),
    ):
        if differs:
            raise ValueError(f"{told}: config.json has no place for it; extend the model without it, then save it")


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
