"""Blocks that keep the L' of their forward pass where checkpointing computes them anew in the backward pass."""

from typing import Any

import torch

from longreach.pretrained.attend import ATTRIBUTE, Extension

STATED = "longreach_stated"
"""Name of the argument by which a block is told the L' of its forward pass."""


class RemembersLength:
    """Methods of the blocks of an extended model.

    Checkpointing of transformers runs `forward` a second time, with the arguments of the first: L' is one of them.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, with what is stated as an argument more where a backward pass may come."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            extension: Extension = getattr(self, ATTRIBUTE)
            kwargs[STATED] = extension.stated
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, under the L' that it is told."""
        if STATED not in kwargs:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        extension: Extension = getattr(self, ATTRIBUTE)
        with extension.during(kwargs.pop(STATED)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
