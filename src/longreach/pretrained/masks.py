"""What the blocks of an extended model are handed in place of a mask.

Stock models expand a causal mask of T x T, and the padding with it. The attention of this package needs no such
thing: it knows what causal means and takes the padding per key. So the base model is handed a *carrier* instead, which
transformers passes on untouched because it has four axes:

- (1, 1, 1, 0): every token is one.
- (B, COUNTED, Tk, 1): not 0 where a key is padding, which counts in distances as all others do.
- (B, UNCOUNTED, Tk, 1): likewise, and tokens before and after padding are neighbours. Which of the two a family does is
  its stock code's choice.
- (1, DOCUMENTS, T, 1): not 0 where a packed document starts.
- any other: a mask of four axes that was given, as what is added to the scores, or as bool, True where a key is hidden.

Its second axis, along which all is the same, tells what it is, and more rows than columns that it is none of the masks
that a user could give. Being an argument it survives gradient checkpointing and moves between devices. Under
torch.compile, and for tensors without values, nothing here depends on what a mask holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Carried:
    """What a carrier says."""

    padding: Tensor | None = None
    """(B, Tk) bool, True where a key is padding; None where none is."""
    counted: bool = True
    """Whether padding between tokens is between them, in distance too."""
    borders: Tensor | None = None
    """(N + 1,) int64 borders of packed documents."""
    mask: Tensor | None = None
    """(B or 1, H or 1, Tq, Tk) what is added to the scores, or bool, True for a hidden key, in place of all else."""

    def over(self, key_length: int) -> "Carried":
        """What it says of the first keys, or of a static cache's buffer, in which it may cover what is filled alone."""
        if self.padding is not None and self.padding.shape[1] != key_length:
            padding = F.pad(self.padding[:, :key_length], (0, max(0, key_length - self.padding.shape[1])))
            return Carried(padding, self.counted)
        if self.mask is not None and self.mask.shape[3] != key_length:
            return Carried(mask=self.mask[..., :key_length])
        return self

    def positions(self, key_length: int, device: torch.device) -> Tensor:
        """Where keys stand, (B, Tk), or (1, Tk) for all rows alike."""
        if self.counted or self.padding is None:
            return torch.arange(key_length, device=device)[None]
        return (~self.padding).cumsum(dim=1) - 1


COUNTED, UNCOUNTED, DOCUMENTS = 1, 2, 3
"""What a carrier says, by the size of its second axis."""

NOTHING = Carried()
"""Neither padding nor documents."""


def pack(padding: Tensor | None, starts: Tensor | None, device: torch.device, *, counted: bool = True) -> Tensor:
    """Carrier of padding (B, Tk) bool, or of the starts of documents (T,) bool, or of neither."""
    if starts is None and padding is None:
        return torch.zeros((1, 1, 1, 0), dtype=torch.uint8, device=device)
    kind = DOCUMENTS if starts is not None else COUNTED if counted else UNCOUNTED
    said = starts[None] if starts is not None else padding
    assert said is not None, "one of the two is"
    if said.shape[1] == 1:
        said = F.pad(said, (0, 1))  # as a mask of the one key might be
    return said.to(device, torch.uint8)[:, None, :, None].expand(-1, kind, -1, -1)


def is_carrier(mask: Any) -> bool:
    """Whether a mask was made by `pack`."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and (mask.shape[3] == 0 or mask.shape[3] == 1 < mask.shape[2])


def unpack(carrier: Tensor | None) -> Carried:
    """What a carrier says; None says nothing. MPT may turn its carriers into bool on the way, which loses nothing."""
    if carrier is None or carrier.shape[3] == 0:
        return NOTHING
    if not is_carrier(carrier):
        return Carried(mask=carrier)
    said = carrier[:, 0, :, 0].bool()
    if carrier.shape[1] != DOCUMENTS:
        return Carried(said, counted=carrier.shape[1] == COUNTED)
    starts = said[0].nonzero().flatten()
    return Carried(borders=torch.cat((starts, starts.new_tensor([said.shape[1]]))))


def has_values(mask: Tensor) -> bool:
    """Whether a mask may be looked into: not what is traced, nor a tensor of device meta, nor a fake one."""
    return type(mask) is Tensor and not mask.is_meta and not torch.compiler.is_compiling()


def read_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Padding (B, Tk) bool of the 2-D attention mask of transformers, or None when nothing is seen to be padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: give (B, T) with 0 for padding")
    padding = attention_mask == 0
    if not has_values(attention_mask):
        return padding
    strange = attention_mask[~padding & (attention_mask != 1)]  # Baichuan's code numbers packed documents like that
    if strange.numel():
        raise ValueError(
            f"attention_mask holds {strange[0].item()}: an extended model takes 1, and 0 for padding; tell packed "
            "documents by position_ids"
        )
    return padding if padding.any() else None


def has_holes(padding: Tensor) -> bool:
    """Whether padding (B, Tk) is anywhere between tokens."""
    begins = (~padding[:, 1:] & padding[:, :-1]).sum(dim=1) + ~padding[:, 0]
    return bool((begins > 1).any())


def read_documents(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Where packed documents start, (T,) bool, from the arguments of a forward pass; None when nothing is packed.

    A batch is packed when `cu_seq_lens_q` is given, or when `position_ids` start anew within a row and there is
    neither padding nor a cache, which is how transformers' own collators and masks have it.

    Raises:
        ValueError: rows of a batch are packed differently.
    """
    borders = kwargs.get("cu_seq_lens_q")
    if borders is not None:
        starts = torch.zeros(int(borders[-1]), dtype=torch.bool, device=borders.device)
        starts[borders[:-1].long()] = True
        return starts if len(borders) > 2 else None
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None or positions.dim() != 2 or kwargs.get("past_key_values") is not None:
        return None
    if positions.is_meta or (mask is not None and not (mask.dim() == 2 and mask.all())):
        return None
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1  # [B, T]
    if not starts[:, 1:].any():
        return None
    if (starts != starts[:1]).any():
        raise ValueError("position_ids pack the rows of the batch differently: pack all documents into one row")
    return starts[0]


def hand_mask(
    module: Any,
    kwargs: dict[str, Any],
    *,
    counted: bool = True,
    dense: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Arguments of an extended base model with a carrier in place of attention_mask, which must be of this input.

    Args:
        module: the base model.
        kwargs: its arguments by name.
        counted: whether padding between tokens counts in distances, as the stock code has it.
        dense: makes a carrier of a mask of four axes; None where the stock code takes none.
    """
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    mask = kwargs.get("attention_mask")
    if is_carrier(mask) or inputs is None:  # without inputs the stock code says what is missing
        return kwargs
    if mask is not None:
        require_size(mask, inputs, kwargs.get("past_key_values"))
    if mask is not None and mask.dim() == 4 and dense is not None:
        carrier = dense(mask.to(inputs.device)).expand(-1, -1, inputs.shape[1], -1)
    else:
        padding = read_padding(mask)
        if padding is not None and not counted and has_values(padding):
            counted = not has_holes(padding)  # and distances are the same either way
        carrier = pack(padding, read_documents(kwargs), inputs.device, counted=counted)
    return {**kwargs, "attention_mask": carrier}


def require_size(mask: Tensor, inputs: Tensor, cache: Any) -> None:
    """ValueError where a mask is not of the tokens that there are, those in the cache first.

    Args:
        mask: (B, Tk), or (B or 1, H or 1, T or 1, Tk); Tk may be that of a static cache's buffer.
        inputs: token ids (B, T), or their embeddings (B, T, C).
        cache: a Cache of transformers, tuples of keys and values, or None.
    """
    batch, length = inputs.shape[:2]
    dense = mask.dim() == 4
    lengths = _lengths(cache, length)
    fits = mask.shape[0] == batch or (dense and mask.shape[0] == 1)
    if not fits or mask.shape[-1] not in lengths or (dense and mask.shape[2] not in (1, length)):
        axes = f"({batch}, 1, {length}, {lengths[0]})" if dense else f"(B, T) = ({batch}, {lengths[0]})"
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: give {axes}, with what the cache holds")


def _lengths(cache: Any, length: int) -> Sequence[int]:
    """How many tokens a mask may cover where a cache is continued by `length`."""
    if cache is None:
        return (length,)
    if not hasattr(cache, "get_seq_length"):  # tuples
        return (length + (0 if not cache or cache[0] is None else cache[0][0].shape[2]),)
    past = cache.get_seq_length()
    if not getattr(cache, "is_compileable", False):
        return (past + length,)
    size = cache.layers[0].max_cache_len
    if isinstance(past, Tensor) and not has_values(past):
        return range(length, size + 1)
    return (int(past) + length, size)


def wants_weights(module: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward pass asks for attention weights."""
    wanted = kwargs.get("output_attentions")
    return bool(wanted if wanted is not None else getattr(module.config, "output_attentions", False))


def hand_documents(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of what stands around the base model, which may not pass on what tells of packing."""
    starts = read_documents(kwargs)
    if starts is None:
        return None
    return args, {**kwargs, "attention_mask": pack(None, starts, starts.device)}
