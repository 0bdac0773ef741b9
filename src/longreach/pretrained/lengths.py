"""What a configuration of Hugging Face says of lengths: L, the longest input, and how slopes are scaled past L."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from longreach.positions.scaling import Scaling, require_tokens

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

PRECOMPUTED = frozenset({"mpt", "gptj", "codegen", "ctrl"})
"""Types of models whose biases or rotations are computed once, up to the training length, and end there. MPT's need
not: its stock code in transformers does."""

SCALING = "alibi_scaling"
"""Name of the field of a configuration that says how slopes are scaled, None for not at all, in BTLM's schema."""

TRAIN_LENGTH = "train_length"
"""Name under which what was trained or exported by longreach gives L: the longest input may be another."""


def declared_length(config: Any) -> int | None:
    """L as the configuration of a pretrained language model tells it; None where it does not.

    First what says nothing else: `train_length`, then `train_seq_len` of an `alibi_scaling`. Then the longest input,
    at which ALiBi models were trained where nobody says otherwise.
    """
    trained_at: int | None = getattr(config, TRAIN_LENGTH, None)
    scaling = getattr(config, SCALING, None)
    scaled_from = scaling.get("train_seq_len") if isinstance(scaling, Mapping) else None
    return trained_at or scaled_from or longest_input(config)


def longest_input(config: Any) -> int | None:
    """The longest input in tokens that a configuration gives, under whatever name; None where it gives none."""
    return next((length for name in LENGTH_NAMES if (length := getattr(config, name, None))), None)


def training_length(name: str, config: Any, given: int | None) -> int:
    """L as it is given, else as a model's configuration tells it; ValueError where neither is a length."""
    length = declared_length(config.get_text_config()) if given is None else given
    if length is None:
        raise ValueError(f"model {name!r} does not say what length it was trained at: give it by --train-length")
    if length < 1:
        raise ValueError(f"train_length={length}: give a positive integer")
    return length


def longest_model_input(model: Any) -> int | None:
    """The most tokens that a model can take: what its table of positions holds, None where it has no such table."""
    declared = longest_input(model.config.get_text_config())
    if declared is None or model.config.model_type in PRECOMPUTED:
        return declared
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module not in vocabulary)
    # OPT's and BioGPT's begin with two rows that are no positions.
    held = any(table.num_embeddings in (declared, declared + 2) for table in tables)
    return declared if held else None


def read_alibi_scaling(alibi_scaling: Mapping[str, Any] | None) -> Scaling:
    """Read the `alibi_scaling` of a configuration in the schema of BTLM; ValueError for anything else, named.

    Args:
        alibi_scaling: None, or exactly {"type": "linear", "factor": float above 1}, which divides the slopes at any
            length, or {"type": "linear", "train_seq_len": int above 1}, which scales by the length of the input.
    """
    if alibi_scaling is None:
        return Scaling("none")
    if not isinstance(alibi_scaling, Mapping):
        raise ValueError(f'alibi_scaling={alibi_scaling!r}: give a mapping with "type" and one number, or None')
    fields = dict(alibi_scaling)
    for name in fields:
        if name not in ("type", "factor", "train_seq_len"):
            raise ValueError(f'alibi_scaling has the field {name!r}: give "type" and one of "factor", "train_seq_len"')
    if fields.get("type") != "linear":
        raise ValueError(f'alibi_scaling has type={fields.get("type")!r}: the one type of its schema is "linear"')
    if len(fields) != 2:
        raise ValueError(f'alibi_scaling={fields!r}: beside "type" give exactly one of "factor", "train_seq_len"')
    if "factor" in fields:
        factor = fields["factor"]
        if not isinstance(factor, float) or not 1.0 < factor < float("inf"):
            raise ValueError(f"alibi_scaling has factor={factor!r}: give a finite float above 1.0")
        return Scaling("linear-fixed", factor=factor)
    require_tokens("alibi_scaling has train_seq_len", fields["train_seq_len"], 2)
    return Scaling("linear", train_length=fields["train_seq_len"])


def write_alibi_scaling(scaling: Scaling) -> dict[str, Any] | None:
    """A scaling as `read_alibi_scaling` reads it back; ValueError where the schema has no place for it."""
    if scaling.logn or scaling.name not in ("none", "linear", "linear-fixed"):
        raise ValueError(f'scaling="{scaling}": alibi_scaling can hold "none", "linear" and "linear-fixed" only')
    if scaling.name == "none":
        return None
    if scaling.factor is not None:
        return {"type": "linear", "factor": float(scaling.factor)}
    return {"type": "linear", "train_seq_len": scaling.train_length}
