"""From files to a model, every weight accounted for: nothing is left random, and nothing is left over."""

import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longreach.encoders.config import LAYOUT, read_config
from longreach.encoders.layouts import layout_of
from longreach.encoders.source import Source
from longreach.ops.arguments import shown

Model = TypeVar("Model", bound=nn.Module)

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
"""What names of a layer's weights begin with."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""In what an encoder can compute."""

HEADS = ("cls.", "classifier.", "linear.")
"""What names of weights begin with that are of heads, ColBERT's last: a model without such a head leaves them."""


def build(kind: type[Model], source: Source, config: Any, dtype: torch.dtype | None = None) -> Model:
    """A model of a class of ours with the weights of its files, in their dtype when None.

    To config is added what the weights alone tell. ValueError names a weight that is missing, unexpected or misshapen.
    """
    if dtype is not None:
        _require_dtype(dtype, source.name)
    values = config.to_dict()
    sizes = read_config(values, source.name)
    tensors = source.weights()
    setattr(config, LAYOUT, layout_of(source.configuration(), tensors, source.name))
    layers = len({match[1] for key in tensors if (match := _LAYER.match(key))})
    if layers < sizes.num_hidden_layers:  # of which a file may say any number
        raise ValueError(
            f"model {source.name!r} has weights of {layers} layers, its config.json says num_hidden_layers="
            f"{sizes.num_hidden_layers}: mend one of the two"
        )
    with torch.device("meta"):
        model = kind(config)
    fitted: dict[str, Tensor] = model.fit(tensors, source.name)  # type: ignore[operator]
    fitted = _accounted(model, fitted, source.name)
    wide = next(iter(fitted.values())).dtype if dtype is None else dtype
    _require_dtype(wide, source.name)
    model.load_state_dict({key: x.to(wide) for key, x in fitted.items()}, strict=True, assign=True)
    return model


def _require_dtype(dtype: Any, name: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"model {name!r} in dtype={shown(dtype)}: give one of {', '.join(map(str, DTYPES))}")


def _accounted(model: nn.Module, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a model, by its own names, after checking that they are just those, and of its shapes."""
    expected = model.state_dict()
    unexpected = sorted(key for key in tensors if key not in expected)
    missing = sorted(key for key in expected if key not in tensors)
    for kind, keys in (("no weight", missing), ("an unexpected weight", unexpected)):
        if keys:
            others = f" and {len(keys) - 1} others" if len(keys) > 1 else ""
            raise ValueError(f"model {name!r} has {kind} {keys[0]}{others}: give files that are whole, of one model")
    for key, x in tensors.items():
        if x.shape != expected[key].shape:
            raise ValueError(
                f"model {name!r}: weight {key} has shape {tuple(x.shape)}, its config.json says "
                f"{tuple(expected[key].shape)}: mend one of the two"
            )
        if not x.is_floating_point():
            raise ValueError(f"model {name!r}: weight {key} is {x.dtype}: give floating-point weights")
    return tensors
