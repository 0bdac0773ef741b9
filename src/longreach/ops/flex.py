"""FlexAttention driven by reach: a BlockMask that holds only the key blocks which can matter.

An example of how another kernel is driven by `longreach.reach`, and a second fast path on GPUs without our kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from longreach.ops.reach import Reach, find_reach
from longreach.ops.visibility import Visibility, without_padding

WHOLE_ROWS: Any = {"PARTITION_SIZE": 1}
"""Keeps FlexAttention on the CPU from splitting the keys of a single query, which it does by whole blocks or not: that
code does not compile unless there are blocks that no mask touches, and takes a part without keys for a score of 0."""


def reach_block_mask(found: Reach, visibility: Visibility) -> BlockMask:
    """Build the BlockMask of FlexAttention that computes the blocks in `found` and hides what is not visible.

    Its index table has one number for each pair of a query block and a key block, as every BlockMask has.

    Args:
        found: of `longreach.reach`, with the same masks.
        visibility: which keys each query sees, the arguments that `reach` was given.
    """
    num_key_blocks = -(-visibility.key_length // found.block_n)
    numbers = torch.arange(num_key_blocks, dtype=torch.int32, device=found.starts.device)
    return BlockMask.from_kv_blocks(
        found.ends - found.starts,
        (found.starts[..., None] + numbers).clamp(max=max(num_key_blocks - 1, 0)),  # the first `count` are read
        BLOCK_SIZE=(found.block_m, found.block_n),
        mask_mod=_mask_mod(visibility),
        seq_lengths=(visibility.query_length, visibility.key_length),
    )


def flex_alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    slopes: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tolerance: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, H, Tq, D) of `longreach.attention`, and LSE (B, H, Tq) if it is wanted, by compiled FlexAttention.

    Arguments as in `longreach.attention`. The first call with new options compiles, which takes seconds.

    Raises:
        ValueError: on the CPU, where FlexAttention has neither, a gradient or the LSE is wanted; or an empty tensor.
    """
    if q.device.type == "cpu":
        sides = () if slopes is None else slopes if isinstance(slopes, tuple) else (slopes,)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *sides)):
            raise ValueError(
                'q, k, v or slopes needs a gradient with impl="flex" on the CPU: use impl="cpu", or torch.no_grad()'
            )
        if return_lse:
            raise ValueError('return_lse=True with impl="flex" on the CPU, which has no LSE there: use impl="cpu"')
    if q.dtype == torch.float64:
        raise ValueError('q of float64 with impl="flex": give float32, bfloat16 or float16, or another impl')
    if not (q.numel() and k.numel()):
        raise ValueError(f'q {tuple(q.shape)} or k {tuple(k.shape)} is empty with impl="flex": use impl="auto"')
    k, v = without_padding(k, v, visibility.key_padding_mask)
    found = find_reach(q, k, slopes, visibility, scale=scale, tolerance=tolerance)
    out, aux = _compiled_flex_attention()(
        q,
        k,
        v,
        score_mod=None if slopes is None else _score_mod(slopes, q.shape[:2], visibility.offset),
        block_mask=reach_block_mask(found, visibility),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=return_lse),
        kernel_options=WHOLE_ROWS if q.device.type == "cpu" else None,
    )
    return out, aux.lse


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _score_mod(slopes: Tensor | tuple[Tensor, Tensor], heads: torch.Size, offset: int) -> Callable[..., Tensor]:
    """The bias of ALiBi, in float32 from distances; `heads` is (B, H)."""
    pair = slopes if isinstance(slopes, tuple) else (slopes, slopes)
    left, right = (side.to(torch.float32).expand(heads).contiguous() for side in pair)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        distance = row + offset - key
        return score - torch.where(distance >= 0, left[b, h], -right[b, h]) * distance

    return score_mod


def _mask_mod(visibility: Visibility) -> Callable[..., Tensor]:
    padding, offset = visibility.key_padding_mask, visibility.offset

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        near = visibility.near(row + offset, key)
        visible = key == key if near is None else near
        return visible if padding is None else visible & ~padding[b, key]

    return mask_mod
