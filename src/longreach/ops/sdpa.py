"""Attention by PyTorch's scaled_dot_product_attention: the biases become a dense mask where there are any."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.alibi import dense_bias
from longreach.ops.visibility import Visibility, without_padding

TAKES_WIDE_MASKS = ("cpu",)
"""Devices whose kernels add a float32 mask to the scores of half-type queries as it is."""


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    slopes: Tensor | tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Output (B, H, Tq, D) of `longreach.attention`, which documents and validates the arguments.

    Plain causal or bidirectional attention runs PyTorch's fused kernel without a mask. Everything else pays for
    a mask of H Tq Tk elements, in float32 unless q is float64, whatever the dtype of q: a mask in bfloat16 would
    round the biases of distant keys. On other devices than TAKES_WIDE_MASKS, such a call is computed in float32.
    """
    query_length, key_length = q.shape[2], k.shape[2]
    if not (q.numel() and k.numel()):
        everything = torch.ones((), dtype=torch.bool, device=q.device)
        return q.masked_fill(everything, 0.0)  # nothing to attend with or to; keeps the graph
    # Options that are there or not: under torch.compile a comparison of sizes is a symbol, which SDPA does not take.
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    if q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    causal, plain = visibility.causal, slopes is None and bias is None and not visibility.hides_past
    if plain and (not causal or query_length in (1, key_length)):
        if causal and query_length == key_length:
            options["is_causal"] = True  # but a single query stands at the last key and sees all of them
        return F.scaled_dot_product_attention(q, k, v, **options)
    k, v = without_padding(k, v, visibility.key_padding_mask)
    visible = visibility.dense(q.device)
    # A row that sees no key would be a softmax over nothing: let it see all, then set its output to 0.
    can_be_empty = visibility.key_padding_mask is not None or (visible is not None and query_length > key_length)
    empty = None
    if can_be_empty and visible is not None:
        empty = ~visible.any(dim=-1, keepdim=True)  # [B or 1, 1, Tq, 1] or [Tq, 1]
        visible = visible | empty
    mask = dense_bias(slopes, bias, query_length, key_length, torch.promote_types(q.dtype, torch.float32))
    if mask is None:
        mask = visible
    elif visible is not None:
        mask = mask.masked_fill(~visible, float("-inf"))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]  # SDPA wants at least two axes, and reads three as (B, Tq, Tk)
    dtype = q.dtype
    if mask is not None and mask.is_floating_point() and q.device.type not in TAKES_WIDE_MASKS:
        # Fused kernels of other devices want the mask in the dtype of q: they refuse another, or read its bytes as if
        # it were that. All of them take float32 throughout, and q, k and v lose nothing by it.
        q, k, v = (x.to(mask.dtype) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).to(dtype)
    return out if empty is None else out.masked_fill(empty, 0.0)
