"""Rotary positions of models of transformers, stretched past the training length by the frequencies of their pairs."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longreach.positions import ModelSize
from longreach.positions.rotary import Rotary, RotaryOptions
from longreach.positions.scaling import Scaling
from longreach.pretrained.layout import MARK


def is_rotary(config: Any) -> bool:
    """Whether a model of this configuration has rotary positions, rather than ALiBi in their place or others."""
    text = config.get_text_config()
    taken_out = hasattr(config, MARK) or getattr(text, "alibi", False)
    return bool(getattr(text, "rope_parameters", None)) and not taken_out


def check_frequencies(config: Any, scaling: Scaling) -> None:
    """ValueError where a scaling cannot stretch the rotary positions of a configuration."""
    text = config.get_text_config()
    kind, rope_type = text.model_type, text.rope_parameters.get("rope_type")
    if "rope_theta" not in text.rope_parameters:
        raise ValueError(f'scaling="{scaling}": the rotary positions of {kind} differ from layer to layer: give none')
    if rope_type != "default":
        raise ValueError(
            f'scaling="{scaling}": this {kind} has a scaling of its own already, rope_type={rope_type}: give none'
        )
    if scaling.logn and text.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f'scaling="{scaling}": {kind} rotates a part of each head, and logn is for whole ones: leave +logn out'
        )


def stretch_frequencies(model: nn.Module, scaling: Scaling) -> Callable[[int], AbstractContextManager[None]]:
    """Stretch the rotary positions of a loaded model in place, as `longreach.positions.rotary` does our own.

    Before each forward pass the modules that turn pairs are given the frequencies for its length L', and as the factor
    of cosine and sine, which queries and keys both get, the square root of that of the logits.

    Returns:
        States the one L', in tokens, of all forward passes within: those that continue a cache need it. Any other has
        its own number of tokens.

    Raises:
        ValueError: the model does not turn its pairs by the frequencies that its configuration names.
    """
    config: Any = model.config
    base = config.get_text_config().rope_parameters["rope_theta"]
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "inv_freq")]

    def rotary(of_scaling: Scaling | str) -> Rotary:
        turned, length = 2 * len(modules[0].inv_freq), scaling.train_length or 1
        size = ModelSize(d_model=turned, num_heads=1, head_dim=turned, train_length=length, longest_length=length)
        return Rotary(RotaryOptions(base, str(of_scaling)), size)

    if not modules or not all(_turns_like(rotary("none"), module) for module in modules):
        raise ValueError(
            f'scaling="{scaling}": {type(model).__name__} does not turn the pairs of its heads by powers of its '
            "rope_theta alone: give none"
        )
    stretched = _Stretched(rotary(scaling))
    for module in modules:
        module.register_forward_pre_hook(stretched, with_kwargs=True)
    return stretched.stating


def _turns_like(method: Rotary, module: Any) -> bool:
    """Whether a module turns pairs as a method does, up to the rounding of powers in float32."""
    known = method.frequencies(1, module.inv_freq.device)  # [D / 2]
    plain = getattr(module, "attention_scaling", None) == 1.0 and module.inv_freq.shape == known.shape
    return plain and torch.allclose(module.inv_freq.float(), known, rtol=1e-4, atol=0)


class _Stretched:
    """Forward pre-hook of modules that turn pairs; the fields that it sets are those that transformers' own scalings
    set before a pass.
    """

    def __init__(self, method: Rotary):
        self._method = method
        self._stated: int | None = None

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]  # [..., T]
        length = self._stated or positions.shape[-1]
        module.inv_freq = self._method.frequencies(length, positions.device)
        module.attention_scaling = math.sqrt(self._method.logit_factor(length))

    @contextmanager
    def stating(self, length: int) -> Iterator[None]:
        """State L', in tokens."""
        before, self._stated = self._stated, length
        try:
            yield
        finally:
            self._stated = before
