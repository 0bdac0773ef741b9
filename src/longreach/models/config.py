"""What a decoder is made of."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

import torch

from longreach.positions import ModelSize, build_method, parse_method
from longreach.reading import check_fields, refuse_below

LARGEST = 2**24
"""The most layers, heads, tokens of a vocabulary and so on that are taken for no mistake."""


@dataclass(frozen=True)
class Architecture:
    """The shape of a pre-LN decoder."""

    num_layers: int = 2
    """Number of blocks."""
    num_heads: int = 4
    """H, the number of query heads."""
    num_kv_heads: int | None = None
    """Hkv, the number of key/value heads, which divides H; H when None."""
    d_model: int = 64
    """C, the width of the residual stream."""
    d_ff: int | None = None
    """Width inside the feed-forward block; 4 C when None."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm or RMSNorm, both before each sublayer and before the output."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Exact GELU, or SwiGLU (two input projections instead of one)."""
    bias: bool = False
    """Whether linear layers and LayerNorm have biases."""
    tied_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""
    embedding_dropout: float = 0.0
    """Dropout of the embedded tokens."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    activation_dropout: float = 0.0
    """Dropout inside the feed-forward block."""
    residual_dropout: float = 0.0
    """Dropout of what each sublayer adds to the residual stream."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_counts("num_layers", "num_heads", "num_kv_heads", "d_model", "d_ff")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}: change one of them")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: change one")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_dropout") and not 0 <= value < 1:
                raise ValueError(f"{field.name}={value!r}: give a number of at least 0 and below 1")

    def _check_counts(self, *names: str) -> None:
        """Refuse what is not positive, and what is too much to be counted up to; None is let through."""
        refuse_below(self, 1, *names)
        for name in names:
            value = getattr(self, name)
            if value is not None and value > LARGEST and not name.endswith("_length"):
                raise ValueError(f"{name}={value}: give at most {LARGEST}")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.d_model // self.num_heads

    @property
    def shape(self) -> str:
        """Layers x width, as in 2x128."""
        return f"{self.num_layers}x{self.d_model}"

    def of_shape(self, shape: str) -> "Architecture":
        """The same with the layers and width of a shape as in 2x128; num_heads stays, and d_ff where it is given."""
        layers, _, width = shape.partition("x")
        if not (re.fullmatch("[1-9][0-9]*", layers) and re.fullmatch("[1-9][0-9]*", width)):
            raise ValueError(f"shapes={shape!r}: give layers x width, as in 2x128")
        try:
            return dataclasses.replace(self, num_layers=int(layers), d_model=int(width))
        except ValueError as error:
            raise ValueError(f"shapes={shape!r}: {error}") from error


ARCHITECTURES = {
    "demo": Architecture(),
    # Baevski & Auli's WikiText-103 model as the ALiBi paper trains it, but for their adaptive vocabulary: its bands
    # are of words sorted by frequency, our tokenizers give pieces of words by the order in which they were merged.
    "wikitext103-247m": Architecture(
        num_layers=16,
        num_heads=8,
        d_model=1024,
        d_ff=4096,
        bias=True,
        embedding_dropout=0.3,
        attention_dropout=0.1,
        activation_dropout=0.1,
        residual_dropout=0.3,
    ),
    # The ALiBi paper's largest model.
    "cc100-1.3b": Architecture(num_layers=25, num_heads=16, d_model=2048, d_ff=8192),
}
"""Named shapes."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """A whole model: its shape, its vocabulary and how it knows positions."""

    vocab_size: int
    """V, the number of token ids."""
    method: str = "alibi"
    """The position method with its options, as in `rotary:base=500000`."""
    train_length: int
    """L, the length in tokens that the model is trained at."""
    longest_length: int | None = None
    """The longest length in tokens that the model is meant for; L when None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("vocab_size", "train_length", "longest_length")
        if self.longest_length is not None and self.longest_length < self.train_length:
            raise ValueError(f"longest_length={self.longest_length} is below train_length={self.train_length}")
        parse_method(self.method)
        try:
            with torch.device("meta"):  # what the method itself refuses, without memory for its tables
                build_method(self.method, self.size)
        except ValueError as error:
            raise ValueError(f"method={self.method!r}: {error}") from error
        except RuntimeError as error:  # of a table whose size overflows
            raise ValueError(
                f"method={self.method!r} with d_model={self.d_model}, train_length={self.train_length}, "
                f"longest_length={self.longest_length}: its table is too large for any machine; give smaller numbers"
            ) from error

    @property
    def size(self) -> ModelSize:
        """What the position method may know."""
        return ModelSize(
            d_model=self.d_model,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            train_length=self.train_length,
            longest_length=self.longest_length or self.train_length,
        )
