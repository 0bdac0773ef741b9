"""What of an encoder's published configuration is used, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from longreach.models.config import LARGEST
from longreach.models.files import check_numbers
from longreach.positions.scaling import Scaling, parse_scaling
from longreach.reading import read_values

LAYOUT = "longreach_layout"
"""Key under which a configuration of ours names its layout, which published ones tell by their weights alone."""


@dataclass(frozen=True)
class EncoderConfig:
    """Size and kind of an encoder, under the published names."""

    vocab_size: int
    """V."""
    hidden_size: int
    """C."""
    num_hidden_layers: int
    """Layers."""
    num_attention_heads: int
    """H."""
    intermediate_size: int
    """I, the width of the MLP."""
    type_vocab_size: int = 2
    """Token types."""
    layer_norm_eps: float = 1e-12
    """Added to variances."""
    hidden_dropout_prob: float = 0.1
    """Dropout of embeddings, of the outputs of attention and within the MLP, in training."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout of attention weights, in training."""
    feed_forward_type: Literal["geglu", "reglu", "original"] = "geglu"
    """How the MLP is gated; not at all if original."""
    hidden_act: Literal["gelu"] = "gelu"
    """The activation of an MLP without gate and of the masked language model's head: the exact one, by erf."""
    max_position_embeddings: int = 512
    """Jina's: the longest text in tokens that it is said to be for."""
    alibi_starting_size: int | None = None
    """Mosaic's: the length of the first table of biases, and that of training."""
    classifier_dropout: float | None = None
    """Dropout before a classifier, in training; hidden_dropout_prob when None."""
    architectures: tuple[str, ...] = ()
    """Names of the classes that it was saved from."""
    train_length: int | None = None
    """L in tokens, where slopes are scaled."""
    longreach_scaling: str = "none"
    """How slopes are scaled past L."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not 1 <= value <= LARGEST:
                raise ValueError(f"{field.name}={value}: give 1 to {LARGEST}")
            if field.name.endswith(("_dropout", "_dropout_prob")) and value is not None and not 0 <= value < 1:
                raise ValueError(f"{field.name}={value}: give a number of at least 0 and below 1")
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps}: give a number between 0 and 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: give a multiple of num_attention_heads={self.num_attention_heads}"
            )
        self.scaling.require_slopes()  # refuses what it cannot read, too

    @property
    def longest(self) -> int:
        """The longest text in tokens that it is said to be for: Mosaic's says so by its table alone."""
        return self.alibi_starting_size or self.max_position_embeddings

    @property
    def scaling(self) -> Scaling:
        """How slopes change with the length of a text."""
        return parse_scaling(self.longreach_scaling, self.train_length or self.longest)


def read_config(values: Mapping[str, Any], name: str) -> EncoderConfig:
    """What is used of a config.json.

    Raises:
        ValueError: it is no ALiBi encoder's, or a value is missing, of the wrong type or out of range.
    """
    if not is_alibi_encoder(values):
        raise ValueError(
            f"model {name!r} is no ALiBi encoder: its config.json says model_type={values.get('model_type')!r}, "
            f"position_embedding_type={values.get('position_embedding_type')!r} and nothing of alibi_starting_size; "
            "give JinaBERT v2, MosaicBERT, DNABERT-2 or one trained from them (for decoders longreach.extend)"
        )
    used = {field.name: values[field.name] for field in fields(EncoderConfig) if values.get(field.name) is not None}
    try:
        check_numbers(values)
        return read_values(EncoderConfig, used)
    except ValueError as error:
        raise ValueError(f"model {name!r}: config.json: {error}") from error


def is_alibi_encoder(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder with ALiBi: Jina says so, Mosaic's names its first table of biases.

    M2-BERT kept Mosaic's names and has no attention; what it has instead is in its configuration too.
    """
    if (
        values.get("is_decoder")
        or (values.get("model_type") or "bert") != "bert"
        or any("monarch" in key for key in values)
    ):
        return False
    return values.get("position_embedding_type") == "alibi" or values.get("alibi_starting_size") is not None
