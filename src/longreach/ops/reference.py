"""The definition of attention, dense and slow: the specification that every implementation is tested on."""

import torch
from torch import Tensor

from longreach.ops.alibi import dense_bias
from longreach.ops.visibility import Visibility, without_padding


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    slopes: Tensor | tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T - m |i - j| + bias) v over the visible keys, by its definition.

    Arguments as in `longreach.attention`, which validates them. Everything is computed in the dtype of q, so
    that float64 inputs give the golden answer and lower ones the plain answer in that dtype. A query that sees
    no key gives output 0 and LSE -inf, and gradients of 0.

    Returns:
        The output (B, H, Tq, D), and the natural log of each row's sum of exponentials, LSE (B, H, Tq).
    """
    num_heads, query_length, head_dim = q.shape[1:]
    num_kv_heads, key_length = k.shape[1:3]
    k, v = without_padding(k, v, visibility.key_padding_mask)
    k = k.repeat_interleave(num_heads // num_kv_heads, dim=1)
    v = v.repeat_interleave(num_heads // num_kv_heads, dim=1)
    scores = q @ k.transpose(-2, -1) * (head_dim**-0.5 if scale is None else scale)  # [B, H, Tq, Tk]
    added = dense_bias(slopes, bias, query_length, key_length, q.dtype)
    if added is not None:
        scores = scores + added
    visible = visibility.dense(q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if bias is not None:
        # A key that the bias hides leaves the graph like all others: the gradient of a softmax over nothing is NaN.
        scores = scores.masked_fill(scores.isneginf(), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if key_length else scores.new_full(scores.shape[:-1], float("-inf"))
    # A row without keys has LSE -inf, and -inf - -inf is NaN: shift such rows by 0 instead, exp(-inf) is 0.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(scores - shift[..., None])
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    return weights @ v, lse
