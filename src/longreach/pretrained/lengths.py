"""The length that a model was trained at, as its configuration tells it, and numbers of tokens that arguments give."""

from collections.abc import Mapping
from typing import Any

LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "max_sequence_length",
    "model_max_length",
)
"""Names under which configurations give the longest input in tokens, tried in this order."""

SCALING = "alibi_scaling"
"""Name of the field of a configuration that says how slopes are scaled, None for not at all, in BTLM's schema."""

TRAIN_LENGTH = "train_length"
"""Name under which what was trained or exported by longreach gives L: the longest input may be another."""


def declared_length(config: Any) -> int | None:
    """L as the configuration of a pretrained language model tells it; None where it does not.

    First what says nothing else: `train_length`, then `train_seq_len` of an `alibi_scaling`. Then the longest input,
    at which ALiBi models were trained where nobody says otherwise.
    """
    own: int | None = getattr(config, TRAIN_LENGTH, None)
    scaling = getattr(config, SCALING, None)
    scaled_from = scaling.get("train_seq_len") if isinstance(scaling, Mapping) else None
    return own or scaled_from or longest_input(config)


def longest_input(config: Any) -> int | None:
    """The longest input in tokens that a configuration gives, under whatever name; None where it gives none."""
    return next((length for name in LENGTH_NAMES if (length := getattr(config, name, None))), None)


def require_tokens(name: str, value: Any, least: int) -> None:
    """Check a number of tokens.

    Raises:
        ValueError: it is no integer, or below `least`; the name is told.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give an integer of at least {least}, in tokens")
