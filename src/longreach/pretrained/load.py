"""Models of transformers from their files: configuration, weights, and what their configuration says they are."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from longreach.models.files import MODEL_TYPE
from longreach.ops.arguments import validate_path
from longreach.pretrained.attend import fixed_length
from longreach.pretrained.convert import convert
from longreach.pretrained.extend import extend
from longreach.pretrained.families import FAMILIES
from longreach.pretrained.layout import MARK
from longreach.pretrained.lengths import SCALING, read_alibi_scaling
from longreach.reading import parse_file


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

    validate_path("name", name)
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
        if getattr(config, MARK) != "alibi":
            raise ValueError(
                f'{MARK}={getattr(config, MARK)!r}: only "alibi" is known, load it with transformers alone'
            )
        convert(model, scaling=scaling)
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


def load_configuration(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, by `AutoConfig`.

    Raises:
        ValueError: transformers is not installed, there is no such model or it cannot be had now, or a file is damaged.
    """
    return _from_pretrained("AutoConfig", name, trust_remote_code=trust_remote_code)


def load_causal_model(name: str, *, dtype: str, trust_remote_code: bool = False) -> Any:
    """A model with all its weights, by `AutoModelForCausalLM`, in a dtype of torch's by name or "auto".

    Raises:
        ValueError: as `load_configuration`, or weights are missing.
    """
    model, report = _from_pretrained(
        "AutoModelForCausalLM",
        name,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model {name!r} has no weights for {missing[0]} and {len(missing) - 1} others: "
            "give a causal language model whose files are whole"
        )
    return model


def _from_pretrained(auto: str, name: str, **options: Any) -> Any:
    """What a class of transformers, given by its name, makes of a model's files."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"model {name!r} is no run here; one of Hugging Face needs transformers: pip install 'longreach[hf]'"
        ) from error
    try:
        return getattr(transformers, auto).from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if Path(name).is_dir():
            raise ValueError(f"model {name!r} cannot be loaded from this folder ({reason}); mend its files") from error
        raise ValueError(
            f"model {name!r} is no folder here, nor to be had from the Hugging Face hub ({reason}); "
            "give a folder, or a hub name while there is a network"
        ) from error
