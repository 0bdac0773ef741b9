"""The Triton kernels, interpreted on the CPU, or compiled where there is a GPU."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from adversarial import CASES as SHARED_CASES
from adversarial import Case, magnitudes, random_grads
from adversarial import run as run_case
from flat import key_ranges, reference_attention, triton_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import DEVICE, swept

from longreach.ops.alibi import alibi_distance
from longreach.ops.reach import _sums_within_one
from longreach.ops.triton import launch as kernels
from longreach.ops.triton import ranges
from longreach.ops.triton.kernels import _queries_that_need
from longreach.ops.triton.plans import COMMON_HEAD_DIM, DECODE_ROWS, REACH_M, REACH_N

CASES: dict[str, dict[str, Any]] = {
    "causal": {"lengths": (203, 203)},
    "causal, half": {"lengths": (290, 290), "head_dim": 64, "dtype": torch.bfloat16},
    "causal, slopes of each batch row": {"lengths": (131, 131), "slopes": "batch", "dtype": torch.float16},
    "without slopes": {"lengths": (150, 259), "slopes": None, "causal": False},
    "without slopes, causal": {"lengths": (150, 259), "slopes": None, "dtype": torch.float16},
    "chunked prefill": {"lengths": (70, 261), "head_dim": 24},
    "more queries than keys": {"lengths": (190, 77), "head_dim": 5},
    "bidirectional": {"lengths": (210, 290), "causal": False, "dtype": torch.bfloat16},
    "left and right slopes": {"lengths": (170, 200), "causal": False, "slopes": "pair"},
    "left and right slopes, half": {"lengths": (140, 400), "causal": False, "slopes": "pair", "dtype": torch.float16},
    "left and right slopes, causal": {"lengths": (100, 100), "slopes": "pair"},
    "window": {"lengths": (259, 259), "window_size": 37, "dtype": torch.bfloat16},
    "window over tiles": {"lengths": (130, 390), "window_size": 200, "causal": False, "dtype": torch.float16},
    "narrow window": {"lengths": (67, 67), "window_size": 3, "causal": False},
    "documents": {"lengths": (270, 270), "documents": [0, 100, 101, 270], "dtype": torch.float16},
    "documents both ways": {"lengths": (200, 200), "documents": [0, 1, 64, 150, 200], "causal": False},
    "padding on the left": {"lengths": (140, 140), "padding": [100, 0], "dtype": torch.bfloat16},
    "padding on the right": {"lengths": (70, 140), "padding": [-100, -3], "causal": False},
    "grouped heads": {"lengths": (70, 100), "heads": (6, 2), "causal": False, "slopes": "pair"},
    "grouped heads, half": {"lengths": (135, 135), "heads": (3, 1), "head_dim": 96, "dtype": torch.bfloat16},
    "wide heads": {"lengths": (40, 70), "head_dim": 256},
    "wide heads, half": {"lengths": (40, 70), "head_dim": 200, "dtype": torch.float16},
    "everything": {
        "lengths": (200, 200),
        "heads": (2, 1),
        "causal": False,
        "slopes": "pair",
        "window_size": 140,
        "documents": [0, 10, 200],
        "padding": [20, -30],
        "dtype": torch.float16,
    },
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element which no kernel writes shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture(autouse=DEVICE == "cpu")
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a tile takes the same time whatever its size: float32 gets the large ones of half types too."""
    half = kernels.PLANS[2, 64]
    monkeypatch.setattr(kernels, "PLANS", dict.fromkeys(kernels.PLANS, half))


def surrounded(*shape: int, dtype: torch.dtype, layout: str = "BHTD") -> Tensor:
    """Normal numbers between NaNs: whatever is read before or after them shows."""
    batch, heads, length, head_dim = shape
    if layout == "BTHD":
        buffer = torch.full((batch, length + 5, heads, head_dim + 8), float("nan"), dtype=dtype, device=DEVICE)
        view = buffer.transpose(1, 2)[:, :, 2:-3, :head_dim]
    else:
        buffer = torch.full((batch, heads, length + 5, head_dim + 8), float("nan"), dtype=dtype, device=DEVICE)
        view = buffer[:, :, 2:-3, :head_dim]
    return view.copy_(torch.randn(shape, device=DEVICE))


def make(
    lengths: tuple[int, int],
    *,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    slopes: str | None = "head",
    padding: list[int] | None = None,
    documents: list[int] | None = None,
    layout: str = "BHTD",
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to differentiate, by name, and the other arguments of attention."""
    torch.manual_seed(0)
    batch = 2 if padding is not None or slopes == "batch" else 1
    query_length, key_length = lengths
    tensors = {
        "q": surrounded(batch, heads[0], query_length, head_dim, dtype=dtype, layout=layout),
        "k": surrounded(batch, heads[1], key_length, head_dim, dtype=dtype, layout=layout),
        "v": surrounded(batch, heads[1], key_length, head_dim, dtype=dtype, layout=layout),
    }
    steepness = torch.logspace(-0.15, -3, heads[0], device=DEVICE)
    if slopes == "batch":
        tensors["slopes"] = torch.stack([steepness, steepness.flip(0)])
    elif slopes == "pair":
        steepness[-1] = 0.0
        tensors["left"], tensors["right"] = steepness, steepness.flip(0) / 2
    elif slopes == "head":
        tensors["slopes"] = steepness
    if padding is not None:
        position = torch.arange(key_length, device=DEVICE)
        hidden = [position < count if count >= 0 else position >= key_length + count for count in padding]
        options["key_padding_mask"] = torch.stack(hidden)
    if documents is not None:
        options["cu_seqlens"] = torch.tensor(documents, dtype=torch.int32, device=DEVICE)
    return tensors, options


def run(
    function: Any,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, Tensor],
    *,
    dtype: torch.dtype | None = None,
    hidden: float = 0.0,
) -> dict[str, Tensor]:
    """Output, LSE and gradients; in dtype if given; with `hidden` for what padded keys and values hold."""
    leaves = {}
    for name, x in tensors.items():
        if name in ("k", "v") and "key_padding_mask" in options:
            x = torch.where(options["key_padding_mask"][:, None, :, None], hidden, x)
        # Keep the strides: detach gives a view.
        leaves[name] = (x.to(dtype) if dtype else x).detach().requires_grad_()
    slopes = leaves.get("slopes", (leaves["left"], leaves["right"]) if "left" in leaves else None)
    out, lse = function(leaves["q"], leaves["k"], leaves["v"], slopes=slopes, **options)
    grads = (grads[0].to(out.dtype), grads[1].to(lse.dtype))
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), grads, allow_unused=True)
    named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def difference(x: Tensor, exact: Tensor) -> Tensor:
    """Absolute differences where there is a number and not -inf."""
    return (x.double() - exact)[exact > float("-inf")].abs()


def assert_within(
    ours: dict[str, Tensor],
    plain: list[dict[str, Tensor]],
    golden: dict[str, Tensor],
    roundings: dict[str, Tensor] | None = None,
) -> None:
    """The project's rule: errors, max and mean, at most 2 (output) or 3 (gradients) times those of the plain way.

    Of plain results that differ by the order of their sums the worst counts: how little one of them errs is chance.
    Where `roundings` are given, errors of rounding the terms of a result once, they come on top.
    """
    for name, exact in golden.items():
        assert ours[name].shape == exact.shape, name
        assert torch.equal(ours[name] > float("-inf"), exact > float("-inf")), name
        error, *allowed = (difference(x[name], exact) for x in (ours, *plain))
        factor = 2 if name in ("out", "lse") else 3
        for reduce in (Tensor.max, Tensor.mean):
            limit = factor * max(reduce(x) for x in allowed)
            if roundings is not None and name in roundings:
                limit += reduce(roundings[name])
            assert reduce(error) <= limit, f"{name}: {reduce(error)} against {limit}"


def lse_rounding(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the kernels' LSE errs by beside the plain one: it is made from one by base 2, rounded once more, and a GPU's
    exp2 has a relative error of up to 2^-22 (ex2.approx.ftz in the PTX ISA), which a sum of weights keeps.
    """
    lse = golden["lse"]
    return {"lse": 2.0**-24 * lse[lse > float("-inf")].abs() + 2.0**-22}


def orders(head_dim: int) -> list[Tensor]:
    """Four orders of the head dims: as many roundings of the same scores."""
    return [torch.randperm(head_dim, device=DEVICE) for _ in range(4)]


def check(tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    q = tensors["q"]
    grads = torch.randn(q.shape, device=DEVICE), torch.randn(q.shape[:3], device=DEVICE)
    grads = grads[0].to(q.dtype).double(), grads[1].to(q.dtype).double()
    golden = run(reference_attention, tensors, options, grads, dtype=torch.float64)
    plain = []
    for order in orders(q.shape[3]):
        moved = tensors | {name: tensors[name][..., order] for name in "qk"}
        results = run(reference_attention, moved, options, grads, dtype=q.dtype)
        plain.append(results | {name: results[name][..., order.argsort()] for name in ("dq", "dk")})
    ours = run(triton_attention, tensors, options, grads, hidden=float("nan"))
    assert_within(ours, plain, golden, lse_rounding(golden))


@pytest.mark.parametrize(
    "case",
    swept(
        CASES, "left and right slopes, causal", "narrow window", "wide heads, half", "grouped heads, half", "everything"
    ),
)
def test_output_and_gradients(case: dict[str, Any]) -> None:
    check(*make(**case))


def on_device(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(on_device, x))
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def triton_case(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`triton_attention` of tensors on the CPU, wherever its kernels run."""
    moved = {name: on_device(option) for name, option in options.items()}
    out, lse = triton_attention(*map(on_device, tensors), **moved)
    return out.cpu(), lse.cpu()


def results(function: Any, tensors: list[Tensor], options: dict[str, Any], grads: Any) -> dict[str, Tensor]:
    out, lse, gradients = run_case(function, tensors, options, grads)
    return {"out": out, "lse": lse} | dict(zip(GRADIENTS, gradients, strict=False))


def sums_of_absolute_terms(tensors: list[Tensor], options: dict[str, Any], grads: Any) -> dict[str, Tensor]:
    return dict(zip(("out", *GRADIENTS), magnitudes(tensors, options, grads), strict=False))


GRADIENTS = ("dq", "dk", "dv", "dleft", "dright")


def huge_key_and_large_logits(q: Tensor, k: Tensor, v: Tensor) -> None:
    q *= 8
    k[:, :, 3] *= 40


ADVERSARIAL = SHARED_CASES | {"one huge early key, logits of std 8": Case(change=huge_key_and_large_logits)}


ADVERSARIAL_IN = {
    (name, dtype): (name, dtype)
    for number, name in enumerate(ADVERSARIAL)
    for dtype in (torch.float32, (torch.bfloat16, torch.float16)[number % 2])
}


@pytest.mark.parametrize(
    "name_and_dtype",
    swept(ADVERSARIAL_IN, ("single token", torch.float32)),
)
def test_adversarial_inputs(name_and_dtype: tuple[str, torch.dtype]) -> None:
    """The rule for output, LSE and all gradients, and for what decoding gives where queries are few."""
    name, dtype = name_and_dtype
    case = ADVERSARIAL[name]
    tensors, options = case.inputs(dtype)
    grads = random_grads(tensors)
    golden = results(reference_attention, [x.double() for x in tensors], options, grads)
    plain, ours = (results(function, tensors, options, grads) for function in (reference_attention, triton_case))
    terms = sums_of_absolute_terms(tensors, options, grads)
    roundings = {name: torch.finfo(dtype).eps / 2 * x for name, x in terms.items()}
    roundings |= lse_rounding(golden)
    assert_within(ours, [plain], golden, roundings)
    if case.heads // case.kv_heads * case.queries <= DECODE_ROWS:
        decoded = dict(zip(("out", "lse"), triton_case(*tensors, **options), strict=True))
        assert_within(decoded, [plain], {name: golden[name] for name in decoded}, roundings)


@pytest.mark.interpreted
@settings(max_examples=15)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 200), "keys")
    group = data.draw(st.integers(1, 3), "group")
    kv_heads = data.draw(st.integers(1, 2), "kv heads")
    batch = data.draw(st.integers(1, 2), "batch")
    queries = data.draw(st.sampled_from([1, 5, keys, max(1, keys - 77), keys + 9]), "queries")
    slopes = torch.rand(2, group * kv_heads) * data.draw(st.sampled_from([0.0, 0.2, 2.0]), "slopes")
    options: dict[str, Any] = {
        "causal": data.draw(st.booleans(), "causal"),
        "window_size": data.draw(st.sampled_from([None, 1, 50]), "window"),
    }
    sided = not options["causal"] and queries > 1 and data.draw(st.booleans(), "two slopes")
    if queries == keys and data.draw(st.booleans(), "packed"):
        options["cu_seqlens"] = torch.tensor([0, data.draw(st.integers(0, keys), "border"), keys])
    if data.draw(st.booleans(), "padded"):
        shown, position = data.draw(st.integers(0, keys), "shown"), torch.arange(keys)
        options["key_padding_mask"] = torch.stack([position >= shown, position < keys - shown])[:batch]
    case = Case(
        batch=batch,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=data.draw(st.sampled_from([1, 16, 33]), "head_dim"),
        slopes=tuple(slopes) if sided else slopes[0],
        options=options,
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    tensors, options = case.inputs(dtype)
    grads = random_grads(tensors)
    golden = results(reference_attention, [x.double() for x in tensors], options, grads)
    ours = results(triton_case, tensors, options, grads)
    with torch.no_grad():
        decoded = dict(zip(("out", "lse"), triton_case(*tensors, **options), strict=True))
    # So few terms that the errors of the plain way are chance, hence a bound instead of the rule. What a score and an
    # LSE err by is what their weight errs by, relatively: at most 8 roundings in float32, each, of the largest size of
    # their terms. A term of a result passes through at most 8 more in its dtype, those of the output included.
    longest = [x.double().norm(dim=-1).amax() for x in tensors[:2]]
    score = longest[0] * longest[1] * case.head_dim**-0.5 + slopes.max() * max(keys, queries)
    of_weight = 16 * (1 + score) * 2.0**-24
    relative = of_weight + 8 * torch.finfo(dtype).eps / 2
    limits = {name: relative * x.max() for name, x in sums_of_absolute_terms(tensors, options, grads).items()}
    limits["lse"] = of_weight
    for found in (ours, decoded):
        for name in found:
            assert torch.equal(found[name] > float("-inf"), golden[name] > float("-inf")), name
            error = difference(found[name], golden[name])
            assert (error <= limits[name]).all(), f"{name}: {error.max()} against {limits[name]}"


def test_transposed_layout_needs_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = make((70, 70), heads=(4, 2), layout="BTHD")
    assert all(tensors[name].stride(1) < tensors[name].stride(2) for name in "qkv")
    copied = []
    for module in (kernels, ranges):
        monkeypatch.setattr(module, "unit_stride", lambda x: copied.append(x.stride(-1) != 1) or x)
    check(tensors, options)
    assert copied
    assert not any(copied)


def test_strided_head_dim_is_copied() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 40, device=DEVICE).transpose(2, 3) for _ in range(3))
    out, _ = triton_attention(q.requires_grad_(), k, v)
    torch.testing.assert_close(out, reference_attention(q, k, v)[0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_compiled_at_length(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    check(*make((3001, 3001), heads=(4, 2), head_dim=head_dim, dtype=dtype, causal=causal))


@pytest.mark.parametrize(
    "case",
    [
        {"lengths": (1, 1)},
        {"lengths": (1, 700), "heads": (8, 2)},
        {"lengths": (1, 700), "dtype": torch.bfloat16, "slopes": "batch", "window_size": 301},
        {"lengths": (5, 600), "heads": (6, 2), "head_dim": 24, "dtype": torch.float16, "slopes": "pair"},
        {"lengths": (5, 600), "heads": (6, 2), "slopes": "pair", "causal": False, "window_size": 400},
        {"lengths": (3, 590), "slopes": None, "padding": [590, -300]},
        {"lengths": (9, 4)},
    ],
)
def test_decoding(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoding kernels against the reference, over several splits, none of whose memory is read unwritten."""
    tensors, options = make(**case)
    monkeypatch.setattr(kernels, "forward", None)
    hidden = options.get("key_padding_mask")
    slopes = tensors.get("slopes", (tensors["left"], tensors["right"]) if "left" in tensors else None)
    q, k, v = (tensors[name] for name in "qkv")
    if hidden is not None:
        k, v = (x.masked_fill(hidden[:, None, :, None], float("nan")) for x in (k, v))
    assert q.shape[1] // k.shape[1] * q.shape[2] <= DECODE_ROWS
    out, lse = triton_attention(q, k, v, slopes=slopes, **options)
    k, v = tensors["k"], tensors["v"]
    golden = reference_attention(q.double(), k.double(), v.double(), slopes=slopes, **options)
    moved = ((q[..., order], k[..., order]) for order in orders(q.shape[3]))
    plain = [reference_attention(*scored, v, slopes=slopes, **options) for scored in moved]
    ours, exact, *others = (dict(zip(("out", "lse"), pair, strict=True)) for pair in ((out, lse), golden, *plain))
    assert_within(ours, others, exact, lse_rounding(exact))


def test_decoding_combines_many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More live splits than the combining kernel takes at a time."""
    tensors, options = make((2, 20 * REACH_N), slopes=None)
    narrow = kernels.Tiles(block_m=16, block_n=16, num_warps=4, num_stages=1)
    plan = kernels.Plan(*6 * [narrow])
    monkeypatch.setattr(kernels, "plan", lambda q: plan)
    out, lse = triton_attention(*tensors.values(), slopes=None, **options)
    expected = reference_attention(*tensors.values(), slopes=None)
    torch.testing.assert_close((out, lse), expected)


def test_many_sequences_fit_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axis x of a grid takes 2^31 - 1 programs, y and z take 65,535."""
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("decode_kernel", "combine_kernel"):
        monkeypatch.setattr(kernels, name, Kernel())
    batch, key_length = 70_000, 3 * REACH_N
    q, k = (torch.zeros(1, 1, 1, 16, device=DEVICE).expand(batch, 1, length, 16) for length in (1, key_length))
    starts = torch.zeros(batch, 1, 1, dtype=torch.int32, device=DEVICE)
    kernels.decode(q, k, k, None, None, None, starts, starts + 3, causal=True, scale=1.0, window_size=None)
    assert [max(grid[1:]) <= 65_535 and math.prod(grid) % batch == 0 for grid in grids] == [True, True]


def ranges_of_the_last(count: int, lengths: tuple[int, int], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges of the last key blocks before each causal query block, and what they hide as a bias of -inf."""
    query_length, key_length = lengths
    last_rows = (torch.arange(REACH_M, query_length + REACH_M, REACH_M).clamp(max=query_length)) - 1
    ends = torch.div(last_rows + key_length - query_length, REACH_N, rounding_mode="floor") + 1
    starts = (ends - count).clamp(min=0)
    block = torch.arange(query_length) // REACH_M
    key_block = torch.arange(key_length) // REACH_N
    needed = (key_block >= starts[block, None]) & (key_block < ends[block, None])
    starts, ends = (x.to(torch.int32).expand(1, heads, -1).contiguous().to(DEVICE) for x in (starts, ends))
    return starts, ends, torch.where(needed, 0.0, float("-inf")).to(DEVICE)


def test_only_key_ranges_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NaN keys lie out of range of all queries, results are those of attention that masks out of range keys."""
    lengths = (200, 500)
    # Tiles of two key blocks would give dK and dV of keys that a neighbouring key block's queries need.
    tiles = kernels.Tiles(block_m=64, block_n=REACH_N, num_warps=4, num_stages=1)
    monkeypatch.setattr(kernels, "plan", lambda q: kernels.Plan(*6 * [tiles]))
    tensors, _ = make(lengths, slopes=None)
    q, k, v = (x.contiguous() for x in tensors.values())
    starts, ends, bias = ranges_of_the_last(3, lengths, 2)
    far = int(starts.min()) * REACH_N
    assert far > 2 * REACH_N
    reference = [x.double().requires_grad_() for x in (q, k, v)]
    expected = reference_attention(*reference, bias=bias.double())
    grads = torch.randn_like(q), torch.randn(q.shape[:3], device=DEVICE)
    expected_gradients = torch.autograd.grad(expected, reference, tuple(x.double() for x in grads))
    k[:, :, :far] = v[:, :, :far] = float("nan")
    needed = (None, None, None, None, starts, ends, kernels.work_order(starts, ends))
    options: dict[str, Any] = {"causal": True, "scale": 0.25, "window_size": None}
    out, log2_lse = kernels.forward(q, k, v, *needed, **options)
    lse = log2_lse * math.log(2.0)
    grads = grads[0], grads[1] * math.log(2.0)
    gradients = kernels.backward(*grads, q, k, v, *needed, out, log2_lse, **options, slopes_gradient=False)
    for ours, exact in zip((out, lse, *gradients[:3]), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert not gradients[1][:, :, :far].any()
    assert [x.shape for x in gradients[3:]] == [(0,), (0,)]
    last = (starts[..., -1:].contiguous(), ends[..., -1:].contiguous())
    decoded = kernels.decode(q[:, :, -4:], k, v, None, None, None, *last, **options)
    torch.testing.assert_close(decoded, (out[:, :, -4:], lse[:, :, -4:]))


@pytest.mark.interpreted
def test_reach_skips_far_keys() -> None:
    """A steep head reads a small part of 64k keys in bfloat16, in which the nearest keys keep distinct biases."""
    length = 2**16
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16, device=DEVICE)
    k = torch.zeros(1, 1, length, 16, dtype=torch.bfloat16, device=DEVICE)
    v = torch.zeros(1, 1, length, 16, dtype=torch.bfloat16, device=DEVICE)
    nearest = torch.arange(16, device=DEVICE)
    v[0, 0, length - 1 - nearest, nearest] = 1.0  # channel d of the output is the weight of the key at distance d
    v[:, :, : length - 4096] = float("nan")
    weights, _ = triton_attention(q, k, v, slopes=torch.tensor([0.5], device=DEVICE))
    expected = torch.exp(-0.5 * nearest.double()) * (1 - 2.718281828459045**-0.5)
    # Weights and output are each rounded to bfloat16 once.
    torch.testing.assert_close(weights[0, 0, 1].double(), expected, rtol=2 * 2.0**-8, atol=0)


class Operators(TorchDispatchMode):
    """Records the operators that run, and the dtypes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.add((function.overloadpacket.__name__, result.dtype))
        return result


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(1, 700), (300, 300)])
def test_key_ranges_of_a_device_are_deterministic(lengths: tuple[int, int], causal: bool) -> None:
    """CUDA has no deterministic running sum of floats, and raises where only deterministic operators are allowed."""
    q, k = (torch.empty(1, 2, length, 16, device="meta") for length in lengths)
    slopes = torch.empty(2, device="meta")
    with Operators() as operators:
        key_ranges(q, k, slopes, scale=0.25, causal=causal, tolerance=1e-6, block_m=REACH_M, block_n=REACH_N)
    assert ("cumsum", torch.int64) in operators.seen
    assert not any(name == "cumsum" and dtype.is_floating_point for name, dtype in operators.seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_sums_in_integers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(50, 700, generator=generator, dtype=torch.float64).mul(-40).exp().to(dtype)
    mass[:, 0] = 0.0
    mass[::2, 600:] = float("inf")
    mass[1::2, 500] = float("nan")
    sums = mass.double().cumsum(dim=-1)
    within = _sums_within_one(mass)
    assert within.any()
    assert not within[sums > 1].any()
    assert not within[1::2, 500:].any()
    assert within[sums <= 1 - 700 * 2.0**-40].all()  # each term is rounded up by less than 2^-40
    exact = torch.tensor([[0.5, 0.5, 0.0, 2.0**-40]], dtype=dtype)
    assert _sums_within_one(exact).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    tensors, options = make((140, 140), heads=(2, 1), dtype=dtype)
    grads = torch.randn(1, 2, 140, 16, device=DEVICE), torch.randn(1, 2, 140, device=DEVICE)
    first, second = (run(triton_attention, tensors, options, grads) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_without_keys() -> None:
    """Output 0, LSE -inf, and no gradient to or from them, where padding or position leaves a row no key."""
    for case in ({"lengths": (140, 140), "padding": [140, 20]}, {"lengths": (200, 60)}):
        tensors, options = make(**case)
        grads = torch.ones_like(tensors["q"]), torch.ones(tensors["q"].shape[:3], device=DEVICE)
        ours = run(triton_attention, tensors, options, grads, hidden=float("nan"))
        empty = ours["lse"] == float("-inf")
        assert empty.any()
        assert not empty.all()
        assert not ours["out"][empty].any()
        assert not ours["dq"][empty].any()
        assert all(x.isfinite().all() for name, x in ours.items() if name != "lse")


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
def test_empty_inputs(shape: tuple[int, int, int, int]) -> None:
    batch, heads, query_length, key_length = shape
    q = torch.randn(batch, heads, query_length, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(batch, heads, key_length, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    slopes = torch.ones(heads, device=DEVICE, requires_grad=True)
    out, lse = triton_attention(q, k, v, slopes=slopes)
    assert not out.any()
    assert (lse == float("-inf")).all()
    for x, gradient in zip((q, k, v, slopes), torch.autograd.grad(out.sum(), (q, k, v, slopes)), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()
    with torch.no_grad():
        decoded, _ = triton_attention(q, k, v, slopes=slopes)
    assert decoded.shape == q.shape
    assert not decoded.any()


@pytest.mark.parametrize(("length", "options"), [(1, {}), (67, {"window_size": 1, "causal": False})])
def test_one_key_gets_all_the_weight(length: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 2, length, 16, device=DEVICE, requires_grad=True) for _ in range(4))
    out, lse = triton_attention(q, k, v, slopes=torch.ones(2, device=DEVICE), **options)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(lse, (q * k).sum(dim=-1) / 4)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(dv, grad)
    torch.testing.assert_close((dq, dk), (torch.zeros_like(q), torch.zeros_like(k)))


@pytest.mark.parametrize("group", [1, 2])
def test_pairs_with_the_most_work_come_first(group: int) -> None:
    torch.manual_seed(0)
    starts = torch.randint(0, 3, (5, 26, 7), dtype=torch.int32, device=DEVICE)
    ends = starts + torch.randint(0, 2, starts.shape, dtype=torch.int32, device=DEVICE)
    counts = (ends - starts).sum(dim=-1).view(-1, group).sum(dim=1)
    expected = counts.argsort(descending=True, stable=True).to(torch.int32)
    assert torch.equal(kernels.work_order(starts, ends, group), expected)


def random_ranges(num_query_blocks: int, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    borders = torch.randint(0, num_key_blocks + 1, (2, 1, 20, num_query_blocks), generator=generator)
    borders = borders.int().to(DEVICE)
    return borders.amin(dim=0), borders.amax(dim=0)


@triton.jit
def queries_that_need_kernel(
    starts, ends, firsts, lasts, query_length, num_key_blocks, BLOCK_N: tl.constexpr, REACH_M: tl.constexpr,
    REACH_N: tl.constexpr,
):  # fmt: skip
    """Runs the function of the kernel for dK and dV that finds its queries, for each head and block of keys."""
    head = tl.program_id(0)
    block = tl.program_id(1)
    first, last = _queries_that_need(starts, ends, head, query_length, block * BLOCK_N, BLOCK_N, REACH_M, REACH_N)
    tl.store(firsts + head * num_key_blocks + block, first)
    tl.store(lasts + head * num_key_blocks + block, last)


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("num_query_blocks", [1, 7, pytest.param(131, marks=pytest.mark.interpreted)])
def test_each_key_block_meets_the_queries_that_need_it(ratio: int, num_query_blocks: int) -> None:
    """Their hull exactly, over several steps of 128 blocks and with tiles of several key blocks."""
    starts, ends = random_ranges(num_query_blocks, 11)
    num_key_blocks = -(-11 // ratio)
    firsts, lasts = (torch.empty(20, num_key_blocks, dtype=torch.int32, device=DEVICE) for _ in range(2))
    query_length = num_query_blocks * REACH_M - 3
    queries_that_need_kernel[(20, num_key_blocks)](
        starts, ends, firsts, lasts, query_length, num_key_blocks, ratio * REACH_N, REACH_M, REACH_N
    )
    for head in range(20):
        for block in range(num_key_blocks):
            needing = [
                row
                for row in range(num_query_blocks)
                if any(
                    starts[0, head, row] <= c < ends[0, head, row] for c in range(block * ratio, (block + 1) * ratio)
                )
            ]
            hull = (min(needing), max(needing) + 1) if needing else (num_query_blocks, num_query_blocks)
            assert (firsts[head, block], lasts[head, block]) == tuple(REACH_M * border for border in hull)


@pytest.mark.parametrize("plan", kernels.PLANS.values(), ids=map(str, kernels.PLANS))
def test_tiles_fit_the_key_ranges(plan: kernels.Plan) -> None:
    for tiles in (plan.bound, plan.forward, plan.query_gradient, plan.key_gradient):
        assert REACH_M % tiles.block_m == 0
    assert plan.key_gradient.block_n % REACH_N == 0
    assert REACH_N % plan.decode.block_n == REACH_N % plan.decode_rows.block_n == 0
    assert plan.decode_rows.block_m == DECODE_ROWS
    # The second kernel reads statistics of no query that the first did not write.
    assert plan.query_gradient.block_m % plan.key_gradient.block_m == 0


def test_errors_name_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="q of float64"):
        triton_attention(q.double(), q.double(), q.double())
    wide = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(ValueError, match=r"head_dim D=257.*at most 256"):
        triton_attention(wide, wide, wide)
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"q is on cpu.*GPU"):
        triton_attention(q.cpu(), q.cpu(), q.cpu())


@pytest.mark.interpreted
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU all other tests compile")
@pytest.mark.parametrize(
    ("capability", "plan", "masks"),
    [
        *((90, plan, ()) for plan in kernels.PLANS),
        (90, (2, 64), ("everything",)),
        (80, (2, COMMON_HEAD_DIM), ()),  # of the plans that all chips are to run, the one with the largest tiles
    ],
    ids=str,
)
def test_kernels_compile(capability: int, plan: tuple[int, int], masks: tuple[str, ...], tmp_path: Path) -> None:
    """Compiled without a GPU they fit its shared memory, and those of half types use the matrix units of Hopper."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(script), str(capability), *map(str, plan), *masks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    with_products = ["key_ranges_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel"]
    names = ["key_radius_kernel", *with_products[:1], "work_order_kernel", *with_products[1:3], "work_order_kernel"]
    assert [line[0] for line in lines] == [*names, with_products[3], *2 * ["decode_kernel", "combine_kernel"]]
    for name, shared_bytes, matrix_instructions in lines:
        assert int(shared_bytes) <= (227 if capability == 90 else 99) * 1024, (name, shared_bytes)
        if capability == 90 and plan[0] == 2 and name in with_products:
            assert int(matrix_instructions) > 0, name


def test_distance_convention() -> None:
    """What the kernels call query - key is the distance of the equations."""
    tensors, _ = make((3, 5), slopes=None)
    q, k, v = tensors.values()
    slopes = torch.tensor([2.0, 2.0], device=DEVICE)
    bias = -2.0 * alibi_distance(3, 5, device=DEVICE)
    expected = reference_attention(q, k, v, bias=bias.expand(1, 2, 3, 5).float())
    torch.testing.assert_close(triton_attention(q, k, v, slopes=slopes), expected)
