"""Models of transformers from their files: configuration, weights, and what their configuration says they are."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from longreach.files import MODEL_FILES, open_file
from longreach.foreign import refusing, require_transformers
from longreach.models.files import MODEL_TYPE, WEIGHTS, check_numbers, shards_of
from longreach.ops.arguments import shown, validate_path
from longreach.positions.scaling import Scaling, parse_scaling
from longreach.pretrained.attend import fixed_length
from longreach.pretrained.convert import convert
from longreach.pretrained.extend import extend
from longreach.pretrained.families import CONVERTIBLE, FAMILIES
from longreach.pretrained.frequencies import check_frequencies, is_rotary, stretch_frequencies
from longreach.pretrained.layout import MARK
from longreach.pretrained.lengths import LENGTH_NAMES, SCALING, TRAIN_LENGTH, declared_length, read_alibi_scaling
from longreach.pretrained.quiet import quiet_transformers
from longreach.reading import parse_file

LARGEST = {"vocab_size": 2**24, "hidden_size": 2**20, "num_hidden_layers": 10_000, "num_attention_heads": 2**16}
"""Counts of a model, by the names that transformers has for them -> the most that is taken for no mistake."""

BUFFERS = ("inv_freq", "position_ids", "token_type_ids", "masked_bias")
"""What files of older versions of transformers hold beside weights, wherever it stands, and models now make anew."""


def load_pretrained(name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a causal language model of transformers, and `adapt` it to what its configuration says.

    Args:
        name: a folder that `save_pretrained` wrote, or any that transformers loads, or a name on the hub.
        options: those of `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: its configuration asks for what is not known, it is a run of longreach, or its weights cannot be in
            that dtype.
        OSError: as transformers raises it, there is no such model.
    """
    from transformers import AutoModelForCausalLM

    validate_path("name", name)
    if (Path(name) / "config.toml").exists() and not holds_pretrained(Path(name)):
        raise ValueError(
            f"name={str(name)!r} is a run of longreach: longreach.models.files.load_model loads it, longreach export "
            "makes a Hugging Face model of it"
        )
    for option in ("dtype", "torch_dtype"):  # its name now, and once
        _check_dtype(option, options.get(option))
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    adapt(model)
    return model


def _check_dtype(name: str, dtype: Any) -> None:
    """Check what transformers is to load weights in: of each part, where they are named."""
    for given in dtype.values() if isinstance(dtype, dict) else (dtype,):
        found = getattr(torch, given, given) if isinstance(given, str) else given
        if not (found in (None, "auto") or (isinstance(found, torch.dtype) and found.is_floating_point)):
            raise ValueError(
                f'{name}={shown(given)}: give one of torch for floating point, such as "float32", or "auto"'
            )


def adapt(model: nn.Module) -> Callable[[int], AbstractContextManager[None]] | None:
    """Make of a loaded model in place what its configuration says: converted, or extended by its `alibi_scaling`.

    A model whose configuration says neither is left to its stock code, and so is one of an unknown family.

    Returns:
        `fixed_length` of this model, which states the length L' for a decoding loop; None where it is left as it is.
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


def check_scaling(config: Any, scaling: Scaling) -> None:
    """ValueError where the positions of a configuration have no such scaling: before weights are loaded."""
    if is_rotary(config):
        check_frequencies(config, scaling)
        return
    kind = config.get_text_config().model_type
    if kind not in FAMILIES or (kind in CONVERTIBLE and not hasattr(config, MARK)):
        raise ValueError(
            f'scaling="{scaling}": {kind} has neither ALiBi nor rotary positions, as far as longreach knows: give stock'
        )
    scaling.require_slopes()


def stretch(
    model: Any, scaling: str, train_length: int | None = None
) -> Callable[[int], AbstractContextManager[None]] | None:
    """Scale the positions of a loaded model in place: slopes where it has ALiBi, frequencies where it is rotary.

    Args:
        model: a causal language model of transformers.
        scaling: as `longreach.positions.scaling` reads it. "none" leaves rotary positions to the stock code.
        train_length: L, in tokens; what the configuration says when None.

    Returns:
        As `adapt`.
    """
    if not is_rotary(model.config):
        extend(model, scaling=scaling, train_length=train_length)
        return partial(fixed_length, model)
    named = parse_scaling(scaling, train_length or declared_length(model.config.get_text_config()))
    if named.name == "none" and not named.logn:
        return None
    check_frequencies(model.config, named)
    return stretch_frequencies(model, named)


def holds_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model of transformers, and not one of our own or none at all."""
    try:
        values = parse_file(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") != MODEL_TYPE


def load_configuration(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, by `AutoConfig`; of a folder, its files are found to be files.

    Raises:
        ValueError: transformers is not installed, there is no such model or it cannot be had now, or its files say what
            no model can be.
        OSError: a file in its folder may not be read, or is none.
    """
    _check_files(Path(name))
    config = _from_pretrained("AutoConfig", name, trust_remote_code=trust_remote_code)
    try:
        _check_counts(config.get_text_config())
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    return config


def load_causal_model(name: str, config: Any, *, dtype: str, trust_remote_code: bool = False) -> Any:
    """A model with all its weights, by `AutoModelForCausalLM`, in a dtype of torch's by name or "auto".

    A warning names what its files hold beside a language model.

    Raises:
        ValueError: as `load_configuration`, which gave config; or the weights are not those of that configuration.
    """
    model, report = _from_pretrained(
        "AutoModelForCausalLM",
        name,
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which are told below, in one line
    )
    unplaced, of_others = _unplaced(model, report["unexpected_keys"])
    if contradictions := list(_contradictions(report, unplaced)):
        more = f", and {len(contradictions) - 1} more like it" if len(contradictions) > 1 else ""
        raise ValueError(
            f"model {name!r} has other weights than its configuration says: {contradictions[0]}{more}; "
            "give a causal language model whose files belong together"
        )
    if of_others:
        more = f" and {len(of_others) - 1} more" if len(of_others) > 1 else ""
        _warn(f"model {name!r} has weights that a language model does not use: {of_others[0]}{more}")
    return model


@cache
def _warn(message: str) -> None:
    """Say it once, however often a model is loaded: filters of warnings forget it whenever somebody changes them."""
    warnings.warn(message, stacklevel=3)


def _check_files(folder: Path) -> None:
    """Check that whatever a model in a folder is made from is a file, and config.json an object.

    Libraries of others would wait for a pipe, and an index may name weights that lie anywhere.
    """
    if not folder.is_dir():
        return
    quantized = False
    with contextlib.suppress(FileNotFoundError):  # transformers says what it looks for
        path = folder / "config.json"
        try:
            values = parse_file(path)
            if not isinstance(values, dict):
                raise ValueError("it holds no object, give the configuration of a model")
            check_numbers(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        quantized = "quantization_config" in values
    for path in folder.iterdir():
        if path.suffix in MODEL_FILES:
            open_file(path).close()
        if path.suffix == ".safetensors" and not quantized:
            _check_floating(path)
    indices = {name: folder / f"{name}.index.json" for name in WEIGHTS}
    used = next((name for name in WEIGHTS if (folder / name).exists() or indices[name].exists()), None)
    if used is not None and not (folder / used).exists():
        for shard in shards_of(indices[used]):
            open_file(folder / shard).close()


def _check_floating(path: Path) -> None:
    """Check that weights are floating point, which transformers would make of anything; masks beside them need not be.

    Raises:
        ValueError: one is not. What cannot be read is left to transformers, which says so.
    """
    with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # it is no dictionary
            if key.endswith(".weight") and not (dtype := file.get_slice(key).get_dtype()).startswith(("F", "BF")):
                raise ValueError(f"{path} has {key} in {dtype}: give weights in floating point")


def _check_counts(config: Any) -> None:
    """Check the fields of a configuration that longreach reads, under the names that its own file has for them."""
    names = config.attribute_map
    for name, largest in {**LARGEST, **dict.fromkeys((*LENGTH_NAMES, TRAIN_LENGTH), 2**63 - 1)}.items():
        value = getattr(config, name, None)
        if value is None and name != "vocab_size":  # which all have, and under this name
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            shown = repr(value)[:40]
            raise ValueError(
                f"its config.json has {names.get(name, name)}={shown}: give an integer from 1 to {largest}"
            )


def _contradictions(report: Any, unplaced: Sequence[str]) -> Iterator[str]:
    """What the weights of a model have that its configuration has not, and the other way round."""
    for key, found, expected in sorted(report["mismatched_keys"]):
        yield f"{key} is {tuple(found)} and should be {tuple(expected)}"
    for key in sorted(report["missing_keys"]):
        yield f"there is no {key}"
    for key in unplaced:
        yield f"nothing is made of {key}"


def _unplaced(model: Any, keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the keys of files that a model has no place for, those that must be weights of it all the same, and others.

    Others belong to another part beside the language model, such as a head that values what is written. Neither are
    buffers, and what belongs to a module without weights, which may once have kept its mask or its rotations there.
    """
    weights, others = [], []
    for key in sorted(keys):
        module, _, name = key.rpartition(".")
        if name in BUFFERS:
            continue
        first = module.partition(".")[0]
        part = next((part for part in (model, model.base_model) if first in dict(part.named_children())), None)
        if part is None:
            others.append(key)
            continue
        found = dict(part.named_modules()).get(module)
        if found is None or any(True for _ in found.parameters(recurse=False)):
            weights.append(key)
    return weights, others


def _from_pretrained(auto: str, name: str, **options: Any) -> Any:
    """What a class of transformers, given by its name, makes of a model's files."""
    require_transformers(name)
    import transformers

    if Path(name).is_dir():
        pickled = any(Path(name).glob("*.bin")) and not any(Path(name).glob("*.safetensors"))
        subject = f"model {name!r} cannot be loaded from this folder"
        mend = "convert its pickled weights to safetensors, where you trust them" if pickled else "mend its files"
    else:
        subject = f"model {name!r} is no folder here, nor to be had from the Hugging Face hub"
        mend = "give a folder, or a hub name while there is a network"
    with quiet_transformers(), refusing(subject, mend):
        return getattr(transformers, auto).from_pretrained(name, **options)
