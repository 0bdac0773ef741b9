"""Few queries of half types, which take PyTorch's kernel for the CPU longer to multiply than to convert to float32."""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from longreach.ops.lse_bound import FEW_QUERIES
from longreach.ops.processor import CPU
from longreach.ops.transforms import is_watched, may_learn

ROWS = {torch.bfloat16: 1, torch.float16: FEW_QUERIES - 1}
"""Dtype -> the most queries for which float32 is faster, 2 to 5 times: with more bfloat16 is as fast."""

IS_FASTER = torch.backends.cpu.get_cpu_capability().startswith("AVX") and CPU != "AMX"
"""Whether this processor is of a kind on which that was measured: those with matrix units multiply what they read."""

PART = 2**20
"""Elements of the keys that are converted at a time, 4 MiB: more are out of the cache before they are read."""

LARGEST_PART = 2**22
"""Elements of the keys up to which parts have a head for each thread."""

_kept = threading.local()
"""Memory for one part of keys and one of values: to have it made anew takes longer than to convert them."""


def converts(q: Tensor, k: Tensor, *others: Tensor | None) -> bool:
    """Whether so few queries (B, H, Tq, D) of k (B, Hkv, Tk, D) are faster in float32, and nobody would notice.

    `others` are what else may want a gradient, for which what was converted would have to be kept.
    """
    if not (IS_FASTER and q.device.type == "cpu" and 0 < q.shape[2] <= ROWS.get(q.dtype, 0)):
        return False
    if is_watched() or not type(q) is type(k) is Tensor:  # what is more than a tensor may need its own operations
        return False
    return 0 < _heads_in_a_part(k) * k.shape[2] * k.shape[3] <= LARGEST_PART and not may_learn(q, k, *others)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output in the dtype of q, and the LSE (B, H, Tq) in float32.

    `bias` is broadcastable to (B, H, Tq, Tk), in float32, or bool and True where a key is seen. The rows of all heads
    that read one key head are multiplied together.
    """
    kv_heads = k.shape[1]
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill_(~bias, float("-inf"))
        bias = _by_key_head(bias.expand(*q.shape[:3], k.shape[2]), kv_heads)
    rows = _by_key_head(q, kv_heads).float().contiguous()  # [B, Hkv, G Tq, D]
    out, lse = torch.empty_like(rows), rows.new_empty(rows.shape[:3])
    for part in _parts(k):
        keys, values = (
            memory[: x.numel()].view(x.shape).copy_(x)
            for memory, x in zip(_memory(k[part].numel()), (k[part], v[part]), strict=True)
        )
        out[part], lse[part] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows[part], keys, values, 0.0, False, attn_mask=None if bias is None else bias[part], scale=scale
        )
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:3])


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Tq, n) as (B, Hkv, G Tq, n)."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _heads_in_a_part(k: Tensor) -> int:
    """As many as PART holds, and a whole number for each thread."""
    threads = torch.get_num_threads()
    return min(k.shape[0] * k.shape[1], max(1, PART // max(1, k.shape[2] * k.shape[3]) // threads) * threads)


def _parts(k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sequences and key heads whose keys are converted together."""
    heads = _heads_in_a_part(k)
    sequences, heads = max(1, heads // k.shape[1]), min(heads, k.shape[1])
    for sequence in range(0, k.shape[0], sequences):
        for head in range(0, k.shape[1], heads):
            yield slice(sequence, sequence + sequences), slice(head, head + heads)


def _memory(size: int) -> tuple[Tensor, Tensor]:
    """At least `size` elements for keys, and as many for values."""
    kept: tuple[Tensor, Tensor] | None = getattr(_kept, "memory", None)
    if kept is None or len(kept[0]) < size:
        with torch.inference_mode(False):  # or it could not be written to outside of that
            keys, values = torch.empty(2, size, dtype=torch.float32, device="cpu")
        kept = _kept.memory = keys, values
    return kept
