"""Published encoders from their files: `longreach.load_encoder`."""

import os
from typing import Any, Literal

import torch

from longreach.encoders.heads import EncoderForMaskedLM, EncoderForSequenceClassification
from longreach.encoders.loading import DTYPES
from longreach.encoders.model import HUB_OPTIONS, EncoderModel, PublishedConfig
from longreach.encoders.source import Source
from longreach.ops.arguments import shown, validate_choice, validate_device, validate_kind, validate_path
from longreach.positions.scaling import Scaling, require_tokens

KINDS: dict[str, type[Any]] = {
    "none": EncoderModel,
    "masked-lm": EncoderForMaskedLM,
    "classification": EncoderForSequenceClassification,
}
"""Name of a head -> the class of a model that has it."""


def load_encoder(
    name: str | os.PathLike[str],
    *,
    head: Literal["none", "masked-lm", "classification"] = "none",
    scaling: str | Scaling | None = None,
    train_length: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **hub: Any,
) -> Any:
    """Load a published ALiBi encoder (JinaBERT v2, MosaicBERT, DNABERT-2) without the code that came with it.

    Attention is softmax(q_i . k_j / sqrt(D) - m_h |i - j|) v over the whole text, by `longreach.attention`. Every
    weight is accounted for. What was pickled is read as tensors alone.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        head: "none" for the encoder, whose `encode` makes vectors of texts; "masked-lm" and "classification"
            (rerankers) for a model that has the encoder as its `bert`.
        scaling: how slopes change with the length of a text, as in `longreach.extend`: "linear", "ntk",
            "linear-fixed=4"; as its configuration says when None, which is not at all for what is published.
        train_length: L in tokens, from which slopes are scaled, where `scaling` is no `Scaling`, which has its own; by
            default what its configuration says: Mosaic's alibi_starting_size, else max_position_embeddings.
        tokenizer: a folder or hub name whose tokenizer.json it has; its own when None.
        dtype: of the weights. By default what its configuration says, else that of the files, but float32 for half
            types on the CPU.
        device: where to put it.
        hub: how the hub is asked: revision, token, cache_dir, subfolder, local_files_only.

    Returns:
        `EncoderModel`, or with a head `EncoderForMaskedLM` or `EncoderForSequenceClassification`: each a model of
        transformers, in evaluation mode.

    Raises:
        ValueError: it is no ALiBi encoder, cannot be had, lacks a weight or has one too many; all are named.
    """
    validate_path("name", name)
    validate_choice("head", head, tuple(KINDS))
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={shown(dtype)}: give one of {', '.join(map(str, DTYPES))}, or None")
    validate_device(device)
    validate_kind("scaling", scaling, str | Scaling | None, 'a name such as "linear", a longreach.Scaling or None')
    if train_length is not None:
        require_tokens("train_length", train_length, 1)
    if tokenizer is not None:
        validate_path("tokenizer", tokenizer)
    if unknown := [option for option in hub if option not in HUB_OPTIONS]:
        raise ValueError(
            f"{unknown[0]}={shown(hub[unknown[0]])}: beside its own options, give {', '.join(HUB_OPTIONS)}"
        )
    source = Source(os.fspath(name), hub)
    changes: dict[str, Any] = {} if scaling is None else {"longreach_scaling": str(scaling)}
    if isinstance(scaling, Scaling):
        if train_length is not None:
            raise ValueError(f"train_length={train_length} beside {scaling!r}: it has its own, give only one")
        train_length = scaling.train_length
    if train_length is not None:
        changes["train_length"] = train_length
    model = KINDS[head].from_pretrained(source.name, config=PublishedConfig.of(source, **changes), dtype=dtype, **hub)
    model.to(device)
    if dtype is None and model.device.type == "cpu" and model.dtype.itemsize < 4:
        model.float()
    if tokenizer is not None:
        model.base_model.tokenizer_source = Source(os.fspath(tokenizer))
    return model
