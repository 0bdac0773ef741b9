"""What is found of a pretrained model: its parts, slopes and training length; and the mark of a converted one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longreach.conformance.golden import Dialect
from longreach.ops.alibi import alibi_slopes
from longreach.positions.scaling import Scaling
from longreach.pretrained.lengths import SCALING, declared_length, read_alibi_scaling
from longreach.pretrained.masks import hand_mask, wants_weights

WEIGHTS = "weights_wanted"
"""Name under which attention modules of converted models are told that attention weights are wanted."""

MARK = "longreach_positions"
"""Name of the field that says which positions a model's weights are for; models that were never converted lack it."""


@dataclass(frozen=True)
class Layout:
    """A pretrained model as its family's file finds it."""

    base: nn.Module
    """The module that is handed the mask and calls the blocks."""
    swaps: tuple[tuple[nn.Module, type], ...]
    """Module -> class whose methods take the place of its own."""
    prepare: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
    """(base model, arguments by name) -> those that it runs with, the mask as the attention modules read it."""
    slopes: Tensor
    """Slopes (H,) float32, before any scaling."""
    dialect: Dialect | None
    """How its stock code computes ALiBi in float32; None where it has none."""
    rounds_bias: bool = False
    """Whether its stock code rounds the bias to the dtype of the model, where that is a half type."""
    heeds_scaling: bool = False
    """Whether its stock code looks at `alibi_scaling`."""
    keeps_tuples: bool = False
    """Whether the stock code caches keys and values in tuples, and cannot read a Cache of transformers."""

    @property
    def family(self) -> str:
        """Name of the family, the model_type of its configuration."""
        config: Any = self.base.config
        return str(config.model_type)

    @property
    def train_length(self) -> int | None:
        """The length trained on, as far as the configuration tells."""
        return declared_length(self.base.config)

    @property
    def scaling(self) -> Scaling:
        """How the configuration says that slopes are scaled."""
        return read_alibi_scaling(getattr(self.base.config, SCALING, None))

    def dialect_in(self, dtype: torch.dtype) -> Dialect:
        """How stock code that has ALiBi computes it in a dtype."""
        assert self.dialect is not None, "diagnose refused the others"
        return replace(self.dialect, bias_dtype=dtype) if self.rounds_bias and dtype.itemsize == 2 else self.dialect


def require_layout(module: nn.Module, attributes: tuple[str, ...], parameter: str | None = None) -> None:
    """ValueError where a module of remote code lacks attributes, or its forward a parameter, that are known."""
    name = type(module).__name__
    for attribute in attributes:
        if not hasattr(module, attribute):
            raise ValueError(f"{name} has no {attribute!r}: this version of its code is unknown to longreach")
    if parameter is not None and parameter not in inspect.signature(type(module).forward).parameters:
        raise ValueError(f"{name}.forward takes no {parameter!r}: this version of its code is unknown to longreach")


def hand_converted(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """As `hand_mask`; a mask of four axes is added, or bool with True where a key is seen.

    Attention is told whether weights are wanted by a name of ours: GPT-2 passes on its other arguments alone.
    """
    wish = {WEIGHTS: True} if wants_weights(module, kwargs) else {}
    return {**hand_mask(module, kwargs, dense=_added_or_hidden), **wish}


def _added_or_hidden(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise ValueError(
            f"attention_mask of {tuple(mask.shape)} in {mask.dtype}: give bool, True where a key is seen, or what is "
            "added to scores in floating point"
        )
    return mask


def converted_layout(base: Any, *, positions: str, swaps: tuple[tuple[nn.Module, type], ...]) -> Layout:
    """The layout of a model with the paper's slopes in place of `positions`; ValueError where it was not converted."""
    config = base.config
    if getattr(config, MARK, None) != "alibi":
        raise ValueError(
            f"this {config.model_type} has {positions} and no ALiBi: longreach.convert(model) puts it in, "
            "and fine-tuning must follow"
        )
    return Layout(
        base=base,
        swaps=swaps,
        prepare=hand_converted,
        slopes=alibi_slopes(config.num_attention_heads, device="cpu"),
        dialect=None,
    )
