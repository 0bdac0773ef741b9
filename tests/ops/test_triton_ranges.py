"""The kernels that bound the key ranges, held to the theorem of docs/reach.md and to the tensor operations."""

import math
from typing import Any

import pytest
import torch
from flat import key_ranges as tensor_key_ranges
from torch import Tensor
from triton_interpreter import DEVICE, swept

from longreach.ops.alibi import dense_bias
from longreach.ops.reach import key_block_norms
from longreach.ops.triton import ranges
from longreach.ops.triton.plans import PLANS
from longreach.ops.visibility import Visibility

BLOCKS = {"block_m": 128, "block_n": 64}

CASES: dict[str, dict[str, Any]] = {
    "causal": {"lengths": (700, 700)},
    "causal, half": {"lengths": (700, 700), "dtype": torch.bfloat16, "tolerance": 2.0**-14},
    "large scores": {"lengths": (500, 500), "std": 8.0},
    "grouped heads": {"lengths": (300, 300), "heads": (6, 2), "head_dim": 20},
    "chunked prefill": {"lengths": (200, 900), "head_dim": 32},
    "more queries than keys": {"lengths": (400, 200)},
    "bidirectional": {"lengths": (500, 500), "causal": False},
    "bidirectional, before all keys": {"lengths": (400, 200), "causal": False},
    "window": {"lengths": (600, 600), "window_size": 150, "slopes": 0.01},
    "window both ways": {"lengths": (600, 600), "window_size": 150, "slopes": 0.01, "causal": False},
    "documents": {"lengths": (600, 600), "documents": [0, 1, 250, 600]},
    "documents both ways": {"lengths": (600, 600), "documents": [0, 250, 600], "causal": False},
    "without slopes": {"lengths": (300, 300), "slopes": None},
    "a slope of 0": {"lengths": (300, 300), "slopes": 0.0},
    "slopes so small that 1 - e^-m loses digits": {"lengths": (300, 300), "slopes": 1e-6},
    "one query": {"lengths": (1, 1500)},
    "few queries with norms": {"lengths": (5, 1500), "norms": True},
    "a huge early key": {"lengths": (600, 600), "huge": 3},
    "what underflows": {"lengths": (700, 700), "slopes": 3.0, "tolerance": 0.0},
    "keys that share a mean": {"lengths": (500, 500), "shift": 5.0},
}


def make(case: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any], dict[str, Any]]:
    """q, k and slopes, what both functions are given, and masks as tensor operations take them."""
    torch.manual_seed(0)
    heads, kv_heads = case.get("heads", (4, 4))
    head_dim, dtype = case.get("head_dim", 16), case.get("dtype", torch.float32)
    query_length, key_length = case["lengths"]
    q = torch.randn(2, heads, query_length, head_dim, device=DEVICE) * case.get("std", 1.0)
    k = torch.randn(2, kv_heads, key_length, head_dim, device=DEVICE) + case.get("shift", 0.0)
    if "huge" in case:
        k[:, :, case["huge"]] *= 50
    slopes = case.get("slopes", "paper")
    if slopes is not None:
        steps = torch.arange(1, heads + 1, device=DEVICE)
        slopes = 2.0 ** (1 - steps).float() if slopes == "paper" else torch.full((heads,), slopes, device=DEVICE)
        slopes = slopes.expand(2, heads).contiguous()
    bounds = {
        "scale": head_dim**-0.5,
        "causal": case.get("causal", True),
        "window_size": case.get("window_size"),
        "tolerance": case.get("tolerance", 2.0**-24),
    }
    documents = case.get("documents")
    masks = {"cu_seqlens": None if documents is None else torch.tensor(documents, dtype=torch.int32, device=DEVICE)}
    masks["key_norms"] = key_block_norms(k, 64) if "norms" in case else None
    return [q.to(dtype), k.to(dtype), slopes], bounds, masks


def kernel_key_ranges(q: Tensor, k: Tensor, slopes: Tensor | None, bounds: Any, masks: Any) -> tuple[Tensor, Tensor]:
    tiles = PLANS[q.dtype.itemsize, 64].bound
    return ranges.key_ranges(q, k, slopes, slopes, **masks, **bounds, **BLOCKS, tiles=tiles)


def weights(q: Tensor, k: Tensor, slopes: Tensor | None, bounds: Any, masks: Any) -> Tensor:
    """Attention weights in float64, 0 in rows that see no key."""
    lengths = q.shape[2], k.shape[2]
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ keys.transpose(2, 3) * bounds["scale"]
    bias = dense_bias(None if slopes is None else slopes.double(), None, *lengths, torch.float64)
    scores = scores if bias is None else scores + bias
    visible = Visibility(*lengths, bounds["causal"], bounds["window_size"], None, masks["cu_seqlens"]).dense(q.device)
    scores = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1).nan_to_num(0.0)


def kept(starts: Tensor, ends: Tensor, lengths: tuple[int, int]) -> Tensor:
    """Which keys lie in the range of each query's block: (B, H, Tq, Tk)."""
    query_block = torch.arange(lengths[0], device=DEVICE) // BLOCKS["block_m"]
    key_block = torch.arange(lengths[1], device=DEVICE) // BLOCKS["block_n"]
    return (key_block >= starts[:, :, query_block, None]) & (key_block < ends[:, :, query_block, None])


@pytest.mark.parametrize("case", swept(CASES, "causal, half"))
def test_ranges_hold_all_but_the_tolerated_mass_and_little_more(case: dict[str, Any]) -> None:
    """The promise, and that at most one key block in eight is kept which the tensor operations prove unneeded."""
    tensors, bounds, masks = make(case)
    starts, ends = kernel_key_ranges(*tensors, bounds, masks)
    assert (starts <= ends).all()
    lost = weights(*tensors, bounds, masks).masked_fill(kept(starts, ends, case["lengths"]), 0.0).sum(dim=-1)
    # What tolerance=0 may drop has exponentials below half of the smallest float32.
    assert lost.max() <= (bounds["tolerance"] or 2.0**-150)
    others = tensor_key_ranges(*tensors, **bounds, **masks, **BLOCKS)
    count, other = ((end - start).sum() for start, end in ((starts, ends), others))
    assert count <= 1.125 * other


@pytest.mark.interpreted
def test_far_keys_are_dropped() -> None:
    (q, k, slopes), bounds, masks = make({"lengths": (900, 900)})
    starts, ends = kernel_key_ranges(q, k, slopes, bounds, masks)
    assert (ends - starts)[:, 0].max() <= 4  # 128 queries and slope 1


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with NumPy, which warns of NaN
@pytest.mark.parametrize("place", ["q", "k"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_cannot_be_bounded_is_kept(place: str, value: float) -> None:
    (q, k, slopes), bounds, masks = make({"lengths": (900, 900)})
    (q if place == "q" else k)[0, 1, 500, 3] = value
    starts, _ = kernel_key_ranges(q, k, slopes, bounds, masks)
    hit = starts[0, 1, 3:] if place == "k" else starts[0, 1, 3:4]  # the query blocks that see it, or hold it
    assert not hit.any()
    assert starts[1, 1, -1] > 0


@pytest.mark.interpreted
def test_zeros_are_bounded_by_the_bias_alone() -> None:
    (q, k, slopes), bounds, masks = make({"lengths": (900, 900)})
    starts, ends = kernel_key_ranges(q * 0, k, slopes, bounds, masks)
    # Head 0 has slope 1: beyond 24 log 2 + log 1 / (1 - 1 / e) + 1 of its queries nothing is left.
    assert (ends - starts)[:, 0].max() <= 3
