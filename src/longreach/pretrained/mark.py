"""What the configuration of a converted model says, and a saved one's config.json with it; and its layout."""

from typing import Any

from torch import nn

from longreach.ops.alibi import alibi_slopes
from longreach.pretrained.lengths import declared_length
from longreach.pretrained.masks import hand_mask
from longreach.pretrained.state import Layout

MARK = "longreach_positions"
"""Name of the field that says which positions a model's weights are for; models that were never converted lack it."""


def converted_layout(family: str, base: Any, *, positions: str, swaps: tuple[tuple[nn.Module, type], ...]) -> Layout:
    """The layout of a model that was converted to ALiBi, with the paper's slopes.

    Args:
        family: its name.
        base: the module that is handed the mask and calls the blocks.
        positions: what its architecture has instead of ALiBi, in words.
        swaps: module -> class whose methods take the place of its own.

    Raises:
        ValueError: it was not converted.
    """
    config = base.config
    if getattr(config, MARK, None) != "alibi":
        raise ValueError(
            f'this {config.model_type} has {positions} and no ALiBi: longreach.convert(model, "alibi") puts it in, '
            "and fine-tuning must follow"
        )
    return Layout(
        family=family,
        base=base,
        swaps=swaps,
        prepare=hand_mask,
        slopes=alibi_slopes(config.num_attention_heads),
        train_length=declared_length(config),
        faithful=None,
    )
