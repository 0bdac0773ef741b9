"""The scalings that `evaluate` and `extend` measure a model under: read, checked against it, and given to it."""

from dataclasses import replace
from functools import partial
from typing import Any

from longreach.measure.transformers import StateLength
from longreach.positions import with_scaling
from longreach.positions.scaling import Scaling, parse_scaling
from longreach.pretrained.attend import extension_of, fixed_length
from longreach.pretrained.extend import extend
from longreach.pretrained.frequencies import is_rotary
from longreach.pretrained.load import check_scaling, stretch
from longreach.reading import respelled
from longreach.train.config import RunConfig

_LISTED = {"scaling": "scalings"}
"""Name of one -> the field that lists them."""


def require_scaling(text: str) -> Scaling:
    """Read one of the scalings, of which any but stock is one of `longreach.positions.scaling`; its L is not known.

    Raises:
        ValueError: there is no such scaling.
    """
    try:
        return parse_scaling(text, train_length=2)
    except ValueError as error:
        raise ValueError(f"{respelled(str(error), _LISTED)}; or stock") from None


def scaled_method(run: RunConfig, scaling: str, name: str) -> str:
    """The position method of a run of our own under a scaling.

    Raises:
        ValueError: it has no such scaling; the run is named.
    """
    if scaling == "stock":
        raise ValueError(f"scalings=stock: {name} was trained by longreach and has no other code; give none")
    try:
        return replace(run, method=with_scaling(run.method, scaling)).method
    except ValueError as error:
        raise ValueError(f"{respelled(str(error), _LISTED)} ({name})") from None


def check_pretrained_scaling(name: str, configuration: Any, scaling: str) -> None:
    """As `check_scaling`, with the name of the model; any has stock.

    Raises:
        ValueError: its positions have no such scaling.
    """
    if scaling == "stock":
        return
    try:
        check_scaling(configuration, require_scaling(scaling))
    except ValueError as error:
        raise ValueError(f"{respelled(str(error), _LISTED)} ({name})") from None


def adapt_by(scaling: str, train_length: int | None, model: Any) -> StateLength | None:
    """Scale the positions of a loaded model in place, or leave it to its stock code."""
    if scaling == "stock":
        return None
    named = require_scaling(scaling)
    if named.name != "none" or is_rotary(model.config):
        return stretch(model, scaling, train_length)
    declared = extension_of(extend(model, train_length=train_length)).scaling  # as the configuration says
    extend(model, scaling=replace(declared, logn=named.logn))
    return partial(fixed_length, model)
