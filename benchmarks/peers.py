"""Workloads of benchmarks/attention.py, and every way to compute them: longreach's, its peers', and the ceiling.

A contender is a maker: it prepares for a workload what its users could prepare once (masks, gates, compiled kernels)
and returns a function of q, k and v, or None where it is not meant to run. It may raise: that is measured too.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longreach.ops.alibi import alibi_bias, alibi_distance, alibi_slopes
from longreach.ops.attention import attention
from longreach.ops.reach import KEY_BLOCK, key_block_norms

MASK_BYTES = 3 * 2**30
"""Largest dense mask that is tried."""

OURS = "longreach"
NO_NORMS = "longreach, no key_norms"
HALF = "longreach, half the length"
"""Itself on half as many tokens: how time grows, where dense attention takes minutes."""
DENSE = "impl=sdpa"
CEILING = "causal SDPA, no bias"
"""Dense attention without ALiBi: what no dense peer can pass, and no peer itself."""
PRUNED = "Forgetting Transformer, pruned"
"""The one peer that skips keys as longreach does; the others are dense."""
FLEX = "FlexAttention"
FLEX_FLASH = "FlexAttention, FLASH"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """What is computed."""

    mode: str
    """forward, training (forward and backward) or decode (one query against a cache)."""
    dtype: str
    """Name of a torch dtype."""
    length: int
    """Keys; and queries, unless decoding."""
    std: float = 1.0
    """Standard deviation of the scaled scores q . k."""
    batch: int = 1
    """Sequences."""
    heads: int = 8
    """Query heads and key heads."""
    head_dim: int = 64
    """D."""
    busy: bool = False
    """Whether another process keeps a core busy meanwhile."""

    def tensors(self, device: str) -> list[Tensor]:
        """q, k and v, Gaussian."""
        generator = torch.Generator().manual_seed(0)
        queries = 1 if self.mode == "decode" else self.length
        shapes = [(self.batch, self.heads, n, self.head_dim) for n in (queries, self.length, self.length)]
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        dtype = getattr(torch, self.dtype)
        return [x.to(device, dtype).requires_grad_(self.mode == "training") for x in (q * self.std, k, v)]


Maker = Callable[[Workload, list[Tensor]], Attend | None]


def implementation(workload: Workload, tensors: list[Tensor], impl: str, cached_norms: bool = True) -> Attend:
    """An implementation of `longreach.attention` by name; decoding by reach with the norms that KVCache keeps."""
    slopes = alibi_slopes(workload.heads, device=tensors[0].device)
    takes_norms = cached_norms and workload.mode == "decode" and impl in ("auto", "cpu", "triton")
    norms = key_block_norms(tensors[1], KEY_BLOCK) if takes_norms else None
    return lambda q, k, v: attention(q, k, v, slopes=slopes, key_norms=norms, impl=impl)  # type: ignore[return-value]


def ours(workload: Workload, tensors: list[Tensor], cached_norms: bool = True) -> Attend:
    return implementation(workload, tensors, "triton" if tensors[0].is_cuda else "cpu", cached_norms)


def sdpa_with_mask(workload: Workload, tensors: list[Tensor]) -> Attend | None:
    query_length, length = tensors[0].shape[2], tensors[1].shape[2]
    if 4 * workload.heads * query_length * length > MASK_BYTES:
        return None
    slopes = alibi_slopes(workload.heads, device=tensors[0].device)
    mask = alibi_bias(slopes, query_length, length)
    mask = mask.masked_fill_(alibi_distance(query_length, length, device=mask.device) < 0, float("-inf"))[None]
    if tensors[0].is_cuda:
        mask = mask.to(tensors[0].dtype)  # the fused kernels there take no other
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def extra_dims(workload: Workload, tensors: list[Tensor]) -> Attend:
    """The bias m j as products of extra entries of q and k; causal SDPA, whose rows ignore the missing - m i.

    In half types positions are 256 hi + lo and slopes a sum of three parts, so that every product is exact.
    """
    q, k, _ = tensors
    scaled = alibi_slopes(workload.heads, device=q.device) * workload.head_dim**0.5  # SDPA scales it back
    position = torch.arange(workload.length, device=q.device)
    if q.dtype == torch.float32:
        of_q, of_k = [scaled], [position.float()]
    else:
        parts: list[Tensor] = []
        for _ in range(3):
            parts.append((scaled - sum(parts)).to(q.dtype).float())
        parts = [part for part in parts if part.any()]
        of_q = [part * step for part in parts for step in (256, 1)]
        of_k = [piece for _ in parts for piece in (position // 256, position % 256)]
    missing = -len(of_q) % 8
    extra_q = F.pad(torch.stack(of_q, dim=-1), (0, missing)).to(q.dtype)[None, :, None]  # [1, H, 1, E]
    extra_k = F.pad(torch.stack(of_k, dim=-1), (0, missing)).to(q.dtype)[None, None]  # [1, 1, T, E]
    extra_q = extra_q.expand(*q.shape[:3], -1)
    extra_k = extra_k.expand(*k.shape[:3], -1)
    is_causal, width, scale = q.shape[2] > 1, extra_q.shape[-1], workload.head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = torch.cat([q, extra_q], -1), torch.cat([k, extra_k], -1), F.pad(v, (0, width))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
        return out[..., :-width]

    return attend


def flex(workload: Workload, tensors: list[Tensor], backend: str | None = None) -> Attend | None:
    query_length, length = tensors[0].shape[2], tensors[1].shape[2]
    device = tensors[0].device
    if device.type == "cpu" and workload.mode == "training":
        return None  # FlexAttention has no backward pass there
    slopes, offset = alibi_slopes(workload.heads, device=device), length - query_length
    mask = create_block_mask(lambda b, h, i, j: i + offset >= j, None, None, query_length, length, device=device.type)
    options: Any = {"BACKEND": backend} if backend else None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i + offset - j)

    # fullgraph: torch raises where it will not compile, rather than to run dense and unfused in silence.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, score_mod=score_mod, block_mask=mask, kernel_options=options)

    return attend


def flex_flash(workload: Workload, tensors: list[Tensor]) -> Attend | None:
    importlib.import_module("flash_attn.cute")  # says in one line that it is missing
    return flex(workload, tensors, "FLASH")


def forgetting(workload: Workload, tensors: list[Tensor]) -> Attend:
    """Log forget gates of -m throughout sum up to ALiBi's bias; it prunes all but e^-10 of each row's mass."""
    forgetting_attention = importlib.import_module("forgetting_transformer").forgetting_attention
    batch, heads, length, _ = tensors[1].shape
    gates = -alibi_slopes(heads, device=tensors[1].device)[None, :, None].expand(batch, heads, length).contiguous()
    return lambda q, k, v: forgetting_attention(q, k, v, gates, head_first=True, adaptive_threshold="auto")


def causal_sdpa(workload: Workload, tensors: list[Tensor]) -> Attend:
    is_causal = tensors[0].shape[2] > 1
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def contenders(device: str) -> dict[str, Maker]:
    """Everything that may run on a device; ours comes first, by what "auto" takes."""
    makers: dict[str, Maker] = {
        OURS: functools.partial(implementation, impl="auto"),
        "SDPA, dense mask": sdpa_with_mask,
        "SDPA, extra head dims": extra_dims,
        FLEX: flex,
        CEILING: causal_sdpa,
    }
    if device == "cuda":
        makers |= {FLEX_FLASH: flex_flash, PRUNED: forgetting}
    return makers


def alternatives(mode: str) -> dict[str, Maker]:
    """What `choose_impl` decides between; sdpa makes its dense mask anew at each call, as it does there."""
    makers: dict[str, Maker] = {OURS: ours, DENSE: functools.partial(implementation, impl="sdpa")}
    if mode == "decode":
        makers[NO_NORMS] = functools.partial(ours, cached_norms=False)
    return makers


def is_dense_peer(contender: str) -> bool:
    """Whether it computes what longreach does, without skipping any keys."""
    return not contender.startswith(OURS) and contender not in (CEILING, PRUNED)
