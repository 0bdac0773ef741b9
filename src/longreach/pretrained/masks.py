"""What the blocks of an extended model are handed in place of a mask.

Stock models expand a causal mask of T x T, and the padding with it. The attention of this package needs no such
thing: it knows what causal means and takes the padding per key. So the base model is handed a *carrier* instead, which
transformers passes on untouched because it has four axes: uint8, (B, 1, 1, Tk) with 1 where a key is padding, or
(1, 2, 1, T) whose second channel has 1 where a packed document starts, or (1, 1, 1, 0) where there is neither. No mask
that a user could give is uint8, and being an argument it survives gradient checkpointing and moves between devices.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def pack(padding: Tensor | None, starts: Tensor | None, device: torch.device) -> Tensor:
    """Carrier of padding (B, Tk) bool, or of the starts of documents (T,) bool, or of neither."""
    if starts is not None:
        return torch.stack((torch.zeros_like(starts), starts)).to(device, torch.uint8)[None, :, None]  # [1, 2, 1, T]
    if padding is not None:
        return padding.to(device, torch.uint8)[:, None, None]  # [B, 1, 1, Tk]
    return torch.zeros((1, 1, 1, 0), dtype=torch.uint8, device=device)


def is_carrier(mask: Any) -> bool:
    """Whether a mask was made by `pack`."""
    return isinstance(mask, Tensor) and mask.dtype == torch.uint8 and mask.dim() == 4


def unpack(carrier: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Padding (B, Tk) bool and borders of documents (N + 1,) int64 of a carrier, or of None, which carries neither.

    MPT turns its mask into bool on the way; that loses nothing.
    """
    if carrier is None or carrier.numel() == 0:
        return None, None
    if carrier.shape[1] == 1:
        return carrier[:, 0, 0].bool(), None
    starts = carrier[0, 1, 0].nonzero().flatten()
    return None, torch.cat((starts, starts.new_tensor([carrier.shape[3]])))


def read_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Padding (B, Tk) bool of the 2-D attention mask of transformers, or None when nothing is padding.

    Raises:
        ValueError: the mask has other axes, values that are neither 0 nor 1, or padding between tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: an extended model takes (B, T) with 0 for padding"
        )
    padding = attention_mask == 0
    strange = attention_mask[~padding & (attention_mask != 1)]  # Baichuan's code numbers packed documents like that
    if strange.numel():
        raise ValueError(
            f"attention_mask holds {strange[0].item()}: an extended model takes 1, and 0 for padding; tell packed "
            "documents by position_ids"
        )
    if not padding.any():
        return None
    begins = (~padding[:, 1:] & padding[:, :-1]).sum(dim=1) + ~padding[:, 0]
    if (begins > 1).any():
        raise ValueError(
            "attention_mask has padding between tokens, where families measure distance differently: pad on the left"
        )
    return padding


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
    if mask is not None and not (mask.dim() == 2 and mask.all()):
        return None
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1  # [B, T]
    if not starts[:, 1:].any():
        return None
    if (starts != starts[:1]).any():
        raise ValueError("position_ids pack the rows of the batch differently: pack all documents into one row")
    return starts[0]


def hand_mask(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an extended base model with a carrier in place of attention_mask.

    Raises:
        ValueError: attention weights are wanted, or the mask cannot be carried.
    """
    refuse_attentions(module, kwargs)
    if not is_carrier(kwargs.get("attention_mask")):
        inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is not None:  # else the stock code says what is missing
            padding = read_padding(kwargs.get("attention_mask"))
            return {**kwargs, "attention_mask": pack(padding, read_documents(kwargs), inputs.device)}
    return kwargs


def hand_documents(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of what stands around the base model, which may not pass on what tells of packing."""
    starts = read_documents(kwargs)
    if starts is None:
        return None
    return args, {**kwargs, "attention_mask": pack(None, starts, starts.device)}


def refuse_attentions(module: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError when a forward pass asks for attention weights, which an extended model never forms."""
    wanted = kwargs.get("output_attentions")
    if wanted if wanted is not None else getattr(module.config, "output_attentions", False):
        raise ValueError("output_attentions=True: an extended model forms no weights, restore(model) does")
