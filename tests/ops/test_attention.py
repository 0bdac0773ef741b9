import math
import sys
import warnings
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_attention import CASES, TOLERANCE, slow_attention
from torch._dynamo.testing import CompileCounterWithBackend

import longreach
import longreach.ops.attention as module
from longreach.ops import sdpa
from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import IMPLEMENTATIONS, attention, choose_impl
from longreach.ops.crossovers import CROSSOVERS, ROW, Crossovers
from longreach.ops.reach import KEY_BLOCK, default_tolerance, key_block_norms, reach
from longreach.ops.triton.operators import triton_was_measured

DENSE = ("reference", "sdpa")
ON_CPU = (*DENSE, "cpu")


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))]


def test_public_name():
    assert longreach.attention is attention


@pytest.mark.parametrize("name", CASES)
def test_auto_follows_the_definition(name):
    tensors, options = CASES[name].inputs()
    out, lse = attention(*tensors, **options, return_lse=True)
    expected_out, expected_lse = slow_attention(*tensors, **options)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, expected_out, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(attention(*tensors, **options), expected_out, rtol=TOLERANCE, atol=TOLERANCE)


@st.composite
def calls(draw):
    """Tensors and options of any valid call with small integers as scores, and empty axes among them."""
    batch, kv_heads, head_dim = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 2))
    packed = draw(st.booleans())
    key_length = draw(st.integers(1 if packed else 0, 6))
    query_length = key_length if packed else draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [normal(batch, heads, query_length, head_dim)]
    tensors += [normal(batch, kv_heads, key_length, head_dim) for _ in "kv"]
    options = {"causal": draw(st.booleans()), "window_size": draw(st.none() | st.integers(1, 4))}
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(heads,), (batch, heads)]))
        options["slopes"] = draw(st.sampled_from([normal(*shape).abs(), (normal(*shape).abs(), normal(*shape).abs())]))
    if draw(st.booleans()):
        full = (batch, heads, query_length, key_length)
        shape = tuple(draw(st.sampled_from([1, size])) for size in full)
        options["bias"] = normal(*shape[draw(st.integers(0, 4)) :])
    if draw(st.booleans()):
        options["key_padding_mask"] = normal(batch, key_length) > 0
    if packed:
        inner = draw(st.lists(st.integers(0, key_length), max_size=4))
        options["cu_seqlens"] = torch.tensor([0, *sorted(inner), key_length])
    return tensors, options


@pytest.mark.parametrize("impl", ON_CPU)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_any_call_follows_the_definition(impl, call):
    tensors, options = call
    if impl == "cpu":
        options.pop("bias", None)
    expected, _ = slow_attention(*tensors, **options)
    out = attention(*tensors, **options, impl=impl)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("impl", ["auto", *ON_CPU])
@pytest.mark.parametrize(("batch", "query_length", "key_length"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)], ids=str)
def test_empty_inputs(impl, batch, query_length, key_length):
    q = torch.full((batch, 2, query_length, 4), math.nan)
    k = torch.full((batch, 1, key_length, 4), math.nan)
    out = attention(q, k, k, slopes=torch.ones(2), impl=impl)
    assert torch.equal(out, torch.zeros(batch, 2, query_length, 4))
    v, slopes = k.clone(), torch.ones(2)
    learned = [x.requires_grad_() for x in (q, k, v, slopes)]
    attention(q, k, v, slopes=slopes, impl=impl).sum().backward()
    for x in learned:
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_results(qkv, dtype):
    out, lse = attention(*(x.to(dtype) for x in qkv), slopes=torch.ones(4), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("impl", ["auto", *ON_CPU])
def test_poisoned_padding_does_not_leak(qkv, impl):
    q, k, v = (x.requires_grad_() for x in qkv)
    padding = torch.tensor([[True, True, False, False, True], [True] * 5])
    clean = attention(q, k, v, slopes=torch.ones(4), causal=False, key_padding_mask=padding, impl=impl)
    poison = padding[:, None, :, None]
    leaves = [q, k.masked_fill(poison, math.nan), v.masked_fill(poison, math.inf)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attention(*leaves, slopes=torch.ones(4), causal=False, key_padding_mask=padding, impl=impl)
    assert torch.equal(out, clean)
    assert torch.all(out[1] == 0)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert all(torch.all(x.grad.masked_select(poison) == 0) for x in leaves[1:])


@pytest.mark.parametrize("impl", ON_CPU)
def test_inputs_need_not_be_contiguous(qkv, impl):
    q, k, v = qkv
    expected = attention(q, k, v, slopes=torch.ones(4), impl=impl)
    fused = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous().transpose(1, 2)  # [B, H + 2 Hkv, T, D] views
    strided = fused.split([4, 2, 2], dim=1)
    assert not any(x.is_contiguous() for x in strided)
    slopes = torch.ones(1).expand(4)
    torch.testing.assert_close(attention(*strided, slopes=slopes, impl=impl), expected, rtol=0, atol=1e-6)


def test_slopes_give_what_their_bias_gives(qkv):
    slopes = alibi_slopes(4)
    expected = attention(*qkv, bias=longreach.alibi_bias(slopes, 5))
    torch.testing.assert_close(attention(*qkv, slopes=slopes), expected, rtol=0, atol=1e-6)


def test_a_pair_of_equal_slopes_is_one_slope(qkv):
    slopes = alibi_slopes(4)
    expected = attention(*qkv, slopes=slopes, causal=False)
    assert torch.equal(attention(*qkv, slopes=(slopes, slopes), causal=False), expected)


@pytest.mark.parametrize("impl", ["auto", *ON_CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("by_sequence", [0, 1])
def test_one_slope_of_a_pair_may_be_of_each_sequence(impl, dtype, batch, by_sequence):
    torch.manual_seed(0)
    leaves = [x.requires_grad_() for x in torch.randn(3, batch, 4, 300, 16, dtype=dtype)]
    pair = [torch.rand(4), torch.rand(4)]
    pair[by_sequence] = torch.rand(batch, 4)
    outs = [attention(*leaves, slopes=tuple(pair), causal=False, impl=name) for name in (impl, "reference")]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slopes", [None, torch.ones(1)], ids=["plain", "slopes"])
@pytest.mark.parametrize("impl", DENSE)
def test_dropout_statistics(impl, slopes):
    torch.manual_seed(5)
    length, probability = 200, 0.3
    zeros = torch.zeros(1, 1, length, length)
    eye = torch.eye(length)[None, None]  # the output is the weights
    arguments = {"slopes": None if slopes is None else 0 * slopes, "causal": False, "impl": impl}
    out = attention(zeros, zeros, eye, dropout_p=probability, **arguments)
    kept = out != 0
    deviation = math.sqrt(probability * (1 - probability) / length**2)
    assert abs(1 - kept.float().mean() - probability) < 5 * deviation
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / length / (1 - probability)))
    undropped = attention(zeros, zeros, eye, dropout_p=0.0, **arguments)
    torch.testing.assert_close(undropped, torch.full_like(out, 1 / length))


@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_autocast_casts_what_sdpa_would_and_keeps_the_bias_exact(qkv, impl):
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    bias = torch.randn(5, 5)
    low = attention(*(x.bfloat16() for x in qkv), slopes=slopes, bias=bias, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*qkv, slopes=slopes, bias=bias, impl=impl), low)
        double = attention(*(x.double() for x in qkv), slopes=slopes, impl=impl)
    assert low.dtype == torch.bfloat16
    assert torch.equal(double, attention(*(x.double() for x in qkv), slopes=slopes, impl=impl))


@pytest.mark.parametrize("impl", ["sdpa", "cpu"])
def test_gradients_of_a_backward_pass_within_autocast_are_those_without(impl, monkeypatch):
    """As PyTorch's own operators for attention have them, whose backward passes autocast does not know."""
    monkeypatch.setattr(sdpa, "MASK_LIMIT", 2**14)  # in tiles, which are computed anew
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 4, 150, 16) for _ in range(4))
    slopes, found = alibi_slopes(4), []
    for within in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, slopes)]
        out = attention(*leaves[:3], slopes=leaves[3], impl=impl)
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            found.append(torch.autograd.grad(out, leaves, grad))
    for without, under in zip(*found, strict=True):
        assert torch.equal(without, under)


def test_autocast_rounds_keys_which_may_become_longer_than_their_norms(choose_from):
    """Far keys weigh as much as near ones, and by their norms before they were rounded nothing."""
    choose_from(1)
    q, k, v = torch.ones(1, 1, 1, 64), torch.zeros(1, 1, 4096, 64), torch.zeros(1, 1, 4096, 64)
    k[:, :, :-512], v[:, :, :-512] = 1 + 2**-8 + 2**-12, 1.0
    assert k.bfloat16()[0, 0, 0, 0] == 1 + 2**-7
    options = {"slopes": torch.tensor([1.526]), "scale": 12.0}
    exact = attention(q.double(), k.bfloat16().double(), v.double(), **options, impl="reference")
    assert exact.min() > 10 * default_tolerance(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for impl in ("auto", "cpu"):
            out = attention(q, k, v, **options, key_norms=key_block_norms(k, KEY_BLOCK), impl=impl)
            torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=0)


def test_autocast_takes_mixed_inputs(qkv):
    q, k, v = qkv
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k.bfloat16(), v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        ("auto", {}),
        ("auto", {"slopes": alibi_slopes(4), "key_padding_mask": torch.arange(10).view(2, 5) < 2}),
        ("sdpa", {"slopes": alibi_slopes(4), "window_size": 2}),
        ("reference", {"slopes": alibi_slopes(4), "cu_seqlens": torch.tensor([0, 2, 5]), "return_lse": True}),
        ("cpu", {"slopes": alibi_slopes(4), "window_size": 3}),
        ("cpu", {"slopes": (alibi_slopes(4), alibi_slopes(4).flip(0)), "causal": False, "return_lse": True}),
    ],
)
def test_compiles_into_one_graph(qkv, impl, options):
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = attention(*leaves, **options, impl=impl)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(*leaves, **options, impl=impl)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    outs = (compiled[0], expected[0]) if isinstance(compiled, tuple) else (compiled, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_gradients_of_learned_slopes(qkv):
    slopes = alibi_slopes(4).requires_grad_()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (attention, compiled):
        out, lse = function(*qkv, slopes=slopes, return_lse=True, impl="cpu")
        gradients.append(torch.autograd.grad(out.square().sum() + lse.sum(), slopes)[0])
    assert torch.equal(*gradients)


def test_one_graph_serves_all_lengths():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (520, 717, 999):
        q = torch.randn(1, 4, length, 8)
        expected = attention(q, q, q, slopes=alibi_slopes(4))
        assert torch.equal(compiled(q, q, q, slopes=alibi_slopes(4)), expected)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3  # nothing is compiled again


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("with_slopes", [True, False])
@pytest.mark.parametrize("decoding", [False, True])
def test_one_graph_serves_all_lengths_of_sdpa(decoding, with_slopes, kv_heads):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    options = {"impl": "sdpa", "slopes": alibi_slopes(4) if with_slopes else None}
    frames = []
    for length in (15, 16, 40):
        q = torch.randn(1, 4, 1 if decoding else length, 8)
        k, v = torch.randn(2, 1, kv_heads, length, 8)
        expected = attention(q, k, v, **options)
        torch.testing.assert_close(compiled(q, k, v, **options), expected, rtol=1e-5, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3  # nothing is compiled again


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        ("auto", {}),
        ("auto", {"return_lse": True}),
        ("sdpa", {"window_size": 3, "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}),
        ("sdpa", {"cu_seqlens": torch.tensor([0, 2, 5])}),
        ("reference", {"bias": torch.zeros(5)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_have_the_shapes_of_results(qkv, dtype, impl, options):
    options = {**options, "slopes": alibi_slopes(4)}
    real = attention(*(x.to(dtype) for x in qkv), **options, impl=impl)
    moved = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    meta = attention(*(x.to(dtype).to("meta") for x in qkv), **moved, impl=impl)
    pairs = zip(meta, real, strict=True) if isinstance(real, tuple) else [(meta, real)]
    for ours, theirs in pairs:
        assert ours.is_meta
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("number", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=lambda x: type(x).__name__)
def test_window_of_any_integer_type(qkv, number):
    expected = attention(*qkv, slopes=torch.ones(4), window_size=2)
    for impl in ON_CPU:
        out = attention(*qkv, slopes=torch.ones(4), window_size=number, impl=impl)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", *ON_CPU])
@pytest.mark.parametrize("length", [5, 600, 4200])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_that_hides_nothing_is_none(impl, length, causal):
    """However wide: sys.maxsize, added to a position, is no integer of 64 bits."""
    q, k, v = torch.randn(3, 1, 2, length, 8, generator=torch.Generator().manual_seed(0))
    for slopes in (alibi_slopes(2), None):
        expected = attention(q, k, v, slopes=slopes, causal=causal, impl="reference")
        for window_size in (length, 2**31, 2**62, sys.maxsize):
            options = {"slopes": slopes, "causal": causal, "window_size": window_size}
            torch.testing.assert_close(attention(q, k, v, **options, impl=impl), expected, rtol=1e-4, atol=1e-5)
    kept = [reach(q, k, alibi_slopes(2), causal=causal, window_size=wide).kept for wide in (None, sys.maxsize)]
    assert torch.equal(*kept)


@pytest.mark.parametrize("impl", ["auto", *ON_CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 600])
@pytest.mark.parametrize("which", range(3))
def test_rows_that_are_one_number_apart(impl, dtype, rows, which):
    """What `unfold` makes: an `empty_like` of it lies otherwise than one of its neighbours."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, rows, 40, generator=generator).to(dtype) for _ in range(3)]
    tensors[which] = torch.randn(1, 2, rows + 39, generator=generator).to(dtype).unfold(-1, 40, 1)
    assert tensors[which].stride()[2:] == (1, 1)
    found = []
    for inputs in (tensors, [x.clone(memory_format=torch.contiguous_format) for x in tensors]):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = attention(*inputs, slopes=torch.full((2,), 0.1), impl=impl)
        found.append((out, *torch.autograd.grad(out.float().sin().sum(), inputs)))
        with torch.no_grad():
            found[-1] += (attention(*inputs, slopes=torch.full((2,), 0.1), impl=impl),)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", ["auto", *ON_CPU])
def test_numbers_may_be_of_any_kind(qkv, impl):
    expected = attention(*qkv, slopes=torch.ones(4), scale=0.125, tolerance=2**-20, impl=impl)
    for kind in (Fraction, np.float32):
        options = {"scale": kind(0.125), "tolerance": kind(2**-20), "dropout_p": kind(0)}
        out = attention(*qkv, slopes=torch.ones(4), **options, impl=impl)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.fixture
def crossovers(monkeypatch):
    """Others than those that were measured, of one CPU and one GPU."""
    for name, impl in (("AVX2", "cpu"), ("Hopper", "triton")):
        tokens = {"forward": {2: 500, 4: 1000}, "training": {2: 1500, 4: 2000}, "decoding": {2: 4000, 4: 8000}}
        tokens["cached"] = {2: 4000 * 64, 4: 8000 * 64}
        monkeypatch.setitem(CROSSOVERS, name, Crossovers(f"{name}.json", impl, **tokens, unaided=name == "Hopper"))
    monkeypatch.setattr(module, "ROW", "AVX2")


@pytest.mark.parametrize(
    ("arguments", "options", "chosen"),
    [
        (("cpu", 1000, 1000), {"reaching": True}, "cpu"),
        (("cpu", 999, 1000), {"reaching": True}, "sdpa"),
        (("cpu", 500, 2000), {"reaching": True}, "cpu"),
        (("cpu", 1000, 1000), {"reaching": True, "dtype": torch.float64}, "cpu"),
        (("cpu", 999, 999), {"reaching": True, "dtype": torch.float64}, "sdpa"),
        (("cpu", 500, 500), {"reaching": True, "dtype": torch.bfloat16}, "cpu"),
        (("cpu", 1999, 2000), {"reaching": True, "learns": True}, "sdpa"),
        (("cpu", 2000, 2000), {"reaching": True, "learns": True}, "cpu"),
        (("cpu", 2000, 2000), {"reaching": False}, "sdpa"),
        (("cpu", 64, 64), {"reaching": True, "return_lse": True}, "cpu"),
        (("cpu", 2000, 2000), {"reaching": True, "dense": True}, "sdpa"),
        (("cpu", 2000, 2000), {"reaching": True, "dense": True, "return_lse": True}, "sdpa"),
        (("cpu", 1, 7999), {"reaching": True, "has_key_norms": True}, "sdpa"),
        (("cpu", 1, 8000), {"reaching": True, "has_key_norms": True}, "cpu"),
        (("cpu", 15, 8000), {"reaching": True, "has_key_norms": True}, "cpu"),
        (("cpu", 15, 8000), {"reaching": True, "has_key_norms": True, "causal": False}, "sdpa"),
        (("cpu", 1, 8000), {"reaching": True, "has_key_norms": True, "causal": False}, "cpu"),
        (("cpu", 1, 8000), {"reaching": True, "processor": "AMX"}, "cpu"),
        (("cpu", 1, 8000), {"reaching": True, "processor": "AMX", "learns": True}, "sdpa"),
        (("cpu", 1, 8000), {"reaching": True, "has_key_norms": True, "dtype": torch.float64}, "sdpa"),
        (("cpu", 1, 65536), {"reaching": True}, "sdpa"),
        (("cuda", 8192, 8192), {"reaching": True}, "sdpa"),
        (("cuda", 8192, 8192), {"reaching": True, "return_lse": True}, "sdpa"),
        (("mps", 65536, 65536), {"reaching": True}, "sdpa"),
        (("cuda", 1000, 999), {"reaching": True, "processor": "Hopper"}, "sdpa"),
        (("cuda", 1000, 1000), {"reaching": True, "processor": "Hopper"}, "triton"),
        (("cuda", 1000, 1000), {"reaching": True, "processor": "Hopper", "return_lse": True}, "triton"),
        (("cuda", 64, 64), {"reaching": True, "processor": "Hopper", "return_lse": True}, "sdpa"),
        (("cuda", 500, 500), {"reaching": True, "processor": "Hopper", "dtype": torch.bfloat16}, "triton"),
        (("cuda", 1, 3999), {"reaching": True, "processor": "Hopper", "dtype": torch.bfloat16}, "sdpa"),
        (("cuda", 1, 4000), {"reaching": True, "processor": "Hopper", "dtype": torch.bfloat16}, "triton"),
        (("cpu", 1, 8000), {"reaching": True, "has_key_norms": True, "cache_width": 63}, "sdpa"),
        (("cpu", 1, 8000), {"reaching": True, "has_key_norms": True, "cache_width": 64}, "cpu"),
        (("cpu", 1, 7999), {"reaching": True, "has_key_norms": True, "cache_width": 6400}, "sdpa"),
        (("cpu", 8000, 8000), {"reaching": True, "cache_width": 1}, "cpu"),
        (("cuda", 1, 4000), {"reaching": True, "processor": "Hopper", "dtype": torch.half, "cache_width": 63}, "sdpa"),
        (("cuda", 8192, 8192), {"reaching": False, "processor": "Hopper"}, "sdpa"),
        (("cuda", 8192, 8192), {"reaching": False, "return_lse": True, "processor": "Hopper"}, "triton"),
        (("cuda", 8192, 8192), {"reaching": True, "dense": True, "processor": "Hopper"}, "sdpa"),
    ],
    ids=str,
)
def test_what_auto_chooses(crossovers, arguments, options, chosen):
    assert choose_impl(*arguments, **options).impl == chosen


@pytest.mark.parametrize(
    ("arguments", "options", "why"),
    [
        (("cpu", 1024, 1024), {"reaching": True, "dense": True}, "dense bias or dropout"),
        (("mps", 1024, 1024), {"reaching": True}, "PyTorch maintains it"),
        (("cpu", 1024, 1024), {"reaching": False}, "nothing can be skipped"),
        (("cpu", 64, 64), {"reaching": True, "return_lse": True}, "the LSE is wanted"),
        (("cpu", 1, 8192), {"reaching": True}, "no key_norms"),
        (("cpu", 64, 64), {"reaching": True}, "as fast at such lengths on AVX2 (benchmarks/results/AVX2.json)"),
        (("cpu", 1024, 1024), {"reaching": True}, "faster at such lengths on AVX2 (benchmarks/results/AVX2.json)"),
        (("cuda", 64, 64), {"reaching": True, "processor": "Hopper"}, "as fast at such lengths on Hopper"),
        (("cuda", 4096, 4096), {"reaching": True, "processor": "Hopper"}, "faster at such lengths on Hopper"),
    ],
    ids=str,
)
def test_the_choice_says_why(crossovers, arguments, options, why):
    assert why in choose_impl(*arguments, **options).reason


def test_auto_tells_training_from_inference(monkeypatch, choose_from):
    """By whether a gradient is wanted, of q, k, v or the slopes, or torch.func may want one."""
    choose_from(1)
    monkeypatch.setitem(CROSSOVERS, ROW, replace(CROSSOVERS[ROW], training={4: 100}))
    asked = []

    def note(name, function):
        return lambda *arguments, **options: asked.append(name) or function(*arguments, **options)

    monkeypatch.setattr(module, "cpu_attention", note("cpu", module.cpu_attention))
    monkeypatch.setattr(module, "sdpa_attention", note("sdpa", module.sdpa_attention))
    q, slopes = torch.ones(1, 2, 20, 4), torch.ones(2)
    attention(q, q, q, slopes=slopes)
    attention(q, q, q, slopes=slopes.requires_grad_())
    torch.func.grad(lambda q: attention(q, q, q, slopes=torch.ones(2)).sum())(q)
    with torch.no_grad():
        attention(q, q, q, slopes=slopes)
    assert asked == ["cpu", "sdpa", "sdpa", "cpu"]


@pytest.mark.parametrize("length", [32, 520])
@pytest.mark.parametrize("with_slopes", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_auto_runs_what_choose_impl_says(length, with_slopes, with_bias, return_lse):
    q = torch.randn(1, 4, length, 8)
    options = {"return_lse": return_lse}
    if with_slopes:
        options["slopes"] = alibi_slopes(4)
    if with_bias:
        options["bias"] = torch.randn(length)
    chosen = choose_impl("cpu", length, length, reaching=with_slopes, dense=with_bias, return_lse=return_lse).impl
    ours, theirs = attention(q, q, q, **options), attention(q, q, q, **options, impl=chosen)
    assert all(map(torch.equal, ours, theirs)) if return_lse else torch.equal(ours, theirs)


def test_explicit_impl_never_falls_back(qkv, monkeypatch):
    class Ran(Exception):
        pass

    def run_as(name):
        def run(*arguments, **options):
            raise Ran(name)

        return run

    monkeypatch.setattr(module, "reference_attention", run_as("reference"))
    monkeypatch.setattr(module, "sdpa_attention", run_as("sdpa"))
    monkeypatch.setattr(module, "triton_attention", run_as("triton"))
    monkeypatch.setattr(module, "cpu_attention", run_as("cpu"))
    monkeypatch.setattr(module.native, "run_step", run_as("cpu"))
    monkeypatch.setattr("longreach.ops.flex.flex_alibi_attention", run_as("flex"))
    for name in IMPLEMENTATIONS:
        with pytest.raises(Ran, match=f"^{name}$"):
            attention(*qkv, slopes=torch.ones(4), impl=name)


@pytest.mark.parametrize("impl", ["cpu", "triton", "flex"])
@pytest.mark.parametrize(
    ("name", "options"), [("bias", {"bias": torch.ones(5)}), ("dropout_p=0.5", {"dropout_p": 0.5})]
)
def test_what_has_no_reach_is_refused(qkv, impl, name, options):
    with pytest.raises(ValueError, match=f"^{name} with impl="):
        attention(*qkv, **options, impl=impl)


def test_key_norms_change_nothing_but_what_is_read(choose_from):
    choose_from(17000)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 17000, 16), torch.randn(1, 2, 17000, 16)
    slopes = torch.tensor([0.5, 0.4, 0.3, 0.2])
    norms = key_block_norms(k, KEY_BLOCK)
    expected = attention(q, k, v, slopes=slopes, impl="reference")
    assert choose_impl("cpu", 1, 17000, reaching=True, has_key_norms=True).impl == "cpu"
    far = torch.arange(17000) < 16000  # beyond reach: not even read
    k, v = (x.masked_fill(far[:, None], math.nan) for x in (k, v))
    torch.testing.assert_close(attention(q, k, v, slopes=slopes, key_norms=norms), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["sdpa", "reference", "flex"])
def test_key_norms_are_not_ignored_in_silence(qkv, impl):
    norms = torch.ones(2, 2, 1)
    attention(*qkv, slopes=torch.ones(4), key_norms=norms)
    with pytest.raises(ValueError, match=r"^key_norms with impl="):
        attention(*qkv, slopes=torch.ones(4), key_norms=norms, impl=impl)


with warnings.catch_warnings(action="ignore"):  # that they are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(4, 5, 8), torch.ones(4, 3, 8)])

WRONG = {
    "q of three axes": ({"q": torch.ones(4, 5, 8)}, "q of shape"),
    "q in a list": ({"q": [1]}, "q of list"),
    "k missing": ({"k": None}, "k of NoneType"),
    "v as an array": ({"v": np.ones((2, 2, 5, 8))}, "v of ndarray"),
    "q of integers": ({"q": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, "q of torch.int64"),
    "q complex": ({"q": torch.ones(2, 4, 5, 8, dtype=torch.complex64)}, "q of torch.complex64"),
    "q without head_dim": (dict.fromkeys("qkv", torch.ones(2, 4, 5, 0)), "q has head_dim"),
    "k of two axes": ({"k": torch.ones(5, 8)}, "k of shape"),
    "k of another dtype": ({"k": torch.ones(2, 2, 5, 8, dtype=torch.float64)}, "k is torch.float64"),
    "k of another device": ({"k": torch.ones(2, 2, 5, 8, device="meta")}, "k is torch.float32 on meta"),
    "k of another batch": ({"k": torch.ones(1, 2, 5, 8)}, "k of shape"),
    "k of another head_dim": ({"k": torch.ones(2, 2, 5, 9)}, "k of shape"),
    "k heads that do not divide": ({"k": torch.ones(2, 3, 5, 8), "v": torch.ones(2, 3, 5, 8)}, "k has 3 heads"),
    "k without heads": ({"k": torch.ones(2, 0, 5, 8), "v": torch.ones(2, 0, 5, 8)}, "k has 0 heads"),
    "v of another length": ({"v": torch.ones(2, 2, 6, 8)}, "v of shape"),
    "v of another dtype": ({"v": torch.ones(2, 2, 5, 8).half()}, "v is torch.float16"),
    "slopes of key heads": ({"slopes": torch.ones(2)}, "slopes of shape"),
    "slopes (1, H)": ({"slopes": torch.ones(1, 4)}, "slopes of shape"),
    "slopes of integers": ({"slopes": torch.ones(4, dtype=torch.int64)}, "slopes of torch.int64"),
    "slopes of another device": ({"slopes": torch.ones(4, device="meta")}, "slopes is on meta"),
    "slopes in a list": ({"slopes": [torch.ones(4), torch.ones(4)]}, "slopes of list"),
    "slopes, sparse": ({"slopes": torch.ones(4).to_sparse()}, "slopes of torch.sparse_coo: give a dense tensor"),
    "q nested": ({"q": NESTED}, "q of nested tensors: give a dense tensor"),
    "slopes as a number": ({"slopes": 0.5}, "slopes of float"),
    "slopes, one side missing": ({"slopes": (None, torch.ones(4))}, "slopes of NoneType"),
    "slopes, other side missing": ({"slopes": (torch.ones(4), None)}, "slopes of NoneType"),
    "slopes, right side wrong": ({"slopes": (torch.ones(4), torch.ones(3))}, "slopes of shape"),
    "slopes, a triple": ({"slopes": (torch.ones(4),) * 3}, "slopes is a tuple of 3"),
    "slopes, an empty tuple": ({"slopes": ()}, "slopes is a tuple of 0"),
    "bias too long": ({"bias": torch.ones(6)}, "bias of shape"),
    "bias as a number": ({"bias": 0.5}, "bias of float"),
    "bias of five axes": ({"bias": torch.ones(1, 2, 4, 5, 5)}, "bias of shape"),
    "bias of key heads": ({"bias": torch.ones(2, 5, 5)}, "bias of shape"),
    "bias of bool": ({"bias": torch.ones(5, 5, dtype=torch.bool)}, "bias of torch.bool"),
    "bias of another device": ({"bias": torch.ones(5, 5, device="meta")}, "bias is on meta"),
    "scale zero": ({"scale": 0.0}, "scale=0.0"),
    "scale NaN": ({"scale": math.nan}, "scale=nan"),
    "scale infinite": ({"scale": math.inf}, "scale=inf"),
    "window_size zero": ({"window_size": 0}, "window_size=0"),
    "window_size fraction": ({"window_size": 2.5}, r"window_size=2\.5"),
    "window_size of bool": ({"window_size": True}, "window_size=True"),
    "key_padding_mask of bytes": ({"key_padding_mask": torch.ones(2, 5, dtype=torch.uint8)}, "key_padding_mask of"),
    "key_padding_mask in a list": ({"key_padding_mask": [[True] * 5] * 2}, "key_padding_mask of list"),
    "key_padding_mask too short": ({"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_padding_mask of"),
    "key_padding_mask of another device": (
        {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
        "key_padding_mask is on meta",
    ),
    "cu_seqlens of floats": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens of"),
    "cu_seqlens in a list": ({"cu_seqlens": [0, 5]}, "cu_seqlens of list"),
    "cu_seqlens of one": ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens of"),
    "cu_seqlens of two axes": ({"cu_seqlens": torch.tensor([[0, 5]])}, "cu_seqlens of"),
    "cu_seqlens while decoding": (
        {"q": torch.ones(2, 4, 1, 8), "cu_seqlens": torch.tensor([0, 5])},
        "cu_seqlens with Tq=1 and Tk=5",
    ),
    "cu_seqlens begins late": ({"cu_seqlens": torch.tensor([2, 5])}, "cu_seqlens begins with 2"),
    "cu_seqlens ends early": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens ends with 4"),
    "cu_seqlens ends late": ({"cu_seqlens": torch.tensor([0, 2, 6])}, "cu_seqlens ends with 6"),
    "cu_seqlens falls": ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "cu_seqlens falls from 3 to 2"),
    "cu_seqlens falls below zero": ({"cu_seqlens": torch.tensor([0, -1, 5])}, "cu_seqlens falls from 0 to -1"),
    "cu_seqlens of another device": ({"cu_seqlens": torch.tensor([0, 5], device="meta")}, "cu_seqlens is on meta"),
    "dropout_p of one": ({"dropout_p": 1.0}, r"dropout_p=1\.0"),
    "dropout_p negative": ({"dropout_p": -0.1}, r"dropout_p=-0\.1"),
    "tolerance negative": ({"tolerance": -1e-9}, "tolerance=-1e-09"),
    "tolerance of one": ({"tolerance": 1.0}, r"tolerance=1\.0"),
    "tolerance NaN": ({"tolerance": math.nan}, "tolerance=nan"),
    "key_norms as a number": ({"key_norms": 1.0}, "key_norms of float"),
    "key_norms of another block": ({"key_norms": torch.ones(2, 2, 5)}, "key_norms of shape"),
    "impl unknown": ({"impl": "fastest"}, "impl='fastest'"),
    "impl missing": ({"impl": None}, "impl=None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(qkv, name):
    changed, message = WRONG[name]
    arguments = {**dict(zip("qkv", qkv, strict=True)), **changed}
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "runs"),
    [
        ("cuda", (9, 0), torch.bfloat16, 128, True),
        ("cuda", (8, 0), torch.bfloat16, 128, False),
        ("cuda", (9, 0), torch.float64, 64, False),
        ("cuda", (9, 0), torch.float32, 129, False),
        ("cpu", (9, 0), torch.float32, 64, False),
    ],
)
def test_where_the_kernels_were_measured(monkeypatch, device, capability, dtype, head_dim, runs):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("longreach.ops.triton.operators._HAS_TRITON", True)
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert triton_was_measured(torch.device(device), dtype, head_dim) == runs


def test_auto_leaves_long_inputs_to_the_kernels_where_they_run(monkeypatch, choose_from):
    class Ran(Exception):
        pass

    def run(*arguments, **options):
        raise Ran

    asked = []
    monkeypatch.setattr(module, "processor_of", lambda *arguments: asked.append(arguments) or "Hopper")
    monkeypatch.setattr(module, "triton_attention", run)
    choose_from(5, "Hopper")
    monkeypatch.setattr(module, "FEW_QUERIES", 2)
    q, slopes = torch.randn(1, 2, 5, 8), torch.ones(2)
    attention(q, q, q, slopes=slopes, bias=torch.zeros(5))
    attention(q[:, :, :4], q, q, slopes=slopes)
    with pytest.raises(Ran):
        attention(q, q, q, slopes=slopes)
    assert set(asked) == {(torch.device("cpu"), torch.float32, 8)}


def test_triton_that_is_not_installed_is_named(qkv, monkeypatch):
    monkeypatch.setattr("longreach.ops.triton.operators._HAS_TRITON", False)
    with pytest.raises(ValueError, match=r'^impl="triton" needs Triton: pip install triton'):
        attention(*qkv, slopes=torch.ones(4), impl="triton")
