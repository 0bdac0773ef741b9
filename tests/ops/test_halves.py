"""Few queries of half types, computed in float32 on the CPU."""

import math
import threading

import pytest
import torch
from adversarial import Case
from flat import reference_attention

from longreach.ops import halves
from longreach.ops.attention import attention
from longreach.ops.cpu import passes
from longreach.ops.reach import default_tolerance

PADDING = torch.arange(300).remainder(7).lt(3).repeat(2, 1)
PADDING[1, :150] = True
CASES = {
    "one query": Case(batch=2, queries=1),
    "several queries": Case(batch=2, queries=15),
    "grouped heads": Case(batch=2, heads=8, kv_heads=2, queries=1),
    "one key head": Case(heads=4, kv_heads=1, queries=3, keys=333),
    "no slopes": Case(queries=1, options={"slopes": None}),
    "no slopes, several queries": Case(queries=5, options={"slopes": None}),
    "no slopes, a whole sequence": Case(queries=9, keys=9, options={"slopes": None}),
    "no slopes, a whole sequence, both directions": Case(queries=9, keys=9, options={"slopes": None, "causal": False}),
    "a whole sequence": Case(queries=15, keys=15),
    "a window": Case(heads=4, kv_heads=2, queries=4, options={"window_size": 50}),
    "padding": Case(batch=2, queries=1, options={"key_padding_mask": PADDING}),
    "padding, no slopes": Case(batch=2, queries=2, options={"key_padding_mask": PADDING, "slopes": None}),
    "both directions": Case(queries=9, options={"causal": False}),
    "one key": Case(queries=1, keys=1),
    "slopes for each sequence": Case(batch=2, queries=1, slopes=torch.rand(2, 4, generator=torch.Generator())),
}

EXP_OF_HALVES = 1.0704e-4
"""By how much of itself an exponential is off at most that PyTorch's kernel takes of half types, and the LSE as much:
2^f is 1 + f less a cubic of f there, which is off most at 0, by its constant term."""


@pytest.fixture
def converted(monkeypatch):
    """Shapes of the queries that were computed in float32, whatever this processor is."""
    shapes, attend = [], halves.attend

    def watched(q, *others):
        shapes.append(q.shape)
        return attend(q, *others)

    monkeypatch.setattr(halves, "attend", watched)
    monkeypatch.setattr(halves, "IS_FASTER", True)
    monkeypatch.setattr(passes, "HAS_NATIVE", False)  # which converts them by itself
    return shapes


@pytest.mark.parametrize("part", [1, 5000, 2**20])
@pytest.mark.parametrize("impl", ["sdpa", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_error_of_few_queries(name, dtype, impl, part, converted, monkeypatch):
    """The rule, in one part and in many."""
    monkeypatch.setattr(halves, "PART", part)
    tensors, options = CASES[name].inputs(dtype)
    golden, golden_lse = reference_attention(*(x.double() for x in tensors), **options)
    plain, _ = reference_attention(*tensors, **options)
    with torch.no_grad():
        if impl == "cpu":
            out, lse = attention(*tensors, **options, impl=impl, return_lse=True)
            allowed = -math.log1p(-default_tolerance(dtype))  # by what may be dropped
            allowed += 0.0 if converted else EXP_OF_HALVES
            torch.testing.assert_close(lse.double(), golden_lse, rtol=2**-20, atol=allowed)
        else:
            out = attention(*tensors, **options, impl=impl)
    whole = impl == "sdpa" and name == "no slopes, a whole sequence"  # which PyTorch's kernel needs no mask for
    assert bool(converted) == (not whole and (dtype == torch.float16 or tensors[0].shape[2] == 1))
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps * golden.abs().max()
    assert (out.double() - golden).abs().max() <= 2 * (plain.double() - golden).abs().max() + rounding
    assert (out.double() - golden).abs().mean() <= 2 * (plain.double() - golden).abs().mean() + rounding


def test_inputs_may_lie_in_memory_in_any_way(converted):
    (q, k, v), options = Case(heads=6, kv_heads=3, queries=4, keys=100).inputs(torch.float16)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    with torch.no_grad():
        first, *others = (attention(*x, **options, impl="sdpa") for x in ((q, k, v), strided, turned))
    assert len(converted) == 3
    for other in others:
        torch.testing.assert_close(other, first, rtol=2**-10, atol=2**-10)


def test_what_is_wanted_for_gradients_is_not_in_memory_that_is_used_again(converted):
    tensors, options = CASES["one query"].inputs(torch.bfloat16)
    leaves = [x.requires_grad_() for x in tensors]
    out = attention(*leaves, **options)
    bias = torch.zeros(4, 1, 300, requires_grad=True)
    of_bias = attention(*(x.detach() for x in leaves), bias=bias, **options)
    assert not converted
    with torch.no_grad():
        attention(*(torch.randn_like(x) for x in tensors), **options)
    assert converted
    expected = torch.autograd.grad(reference_attention(*leaves, **options)[0].sum(), leaves)
    for actual, right in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=0.05, atol=0.05)
    assert torch.autograd.grad(of_bias.sum(), bias)[0].isfinite().all()


def test_a_result_stays_when_more_is_computed(converted):
    """Also by another thread, at the same time, and in and out of inference mode."""
    (q, k, v), options = Case(queries=1, keys=5000, head_dim=64).inputs(torch.bfloat16)
    expected = attention(q, k, v, **options)
    kept, differing = expected.clone(), []

    def compute(own_q):
        with torch.no_grad():
            right = attention(own_q, k, v, **options)
            differing.extend(not torch.equal(attention(own_q, k, v, **options), right) for _ in range(20))

    threads = [threading.Thread(target=compute, args=(q * size,)) for size in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(attention(q, k, v, **options), kept)
    assert torch.equal(expected, kept)
    assert len(differing) == 60
    assert not any(differing)
    assert len(converted) == 1 + 63 + 3


def test_few_heads_for_many_threads_are_left_to_pytorch(converted, monkeypatch):
    """Or those would wait that no head of a part is for."""
    q, k, _ = Case(heads=8, kv_heads=8, queries=1, keys=3000).inputs(torch.bfloat16)[0]
    for threads, most, converts in ((2, 2 * 3000 * 16, True), (4, 2 * 3000 * 16, False), (64, 8 * 3000 * 16, True)):
        monkeypatch.setattr(halves, "PART", 3000 * 16)
        monkeypatch.setattr(halves, "LARGEST_PART", most)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert halves.converts(q, k) == converts


def test_more_than_a_tensor_is_left_as_it_is(converted):
    class Named(torch.Tensor):
        pass

    (q, k, v), options = CASES["one query"].inputs(torch.bfloat16)
    with torch.no_grad():
        out = attention(*(x.as_subclass(Named) for x in (q, k, v)), **options)
    assert type(out) is Named
    assert not converted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_types_are_left_as_they_are(dtype, converted):
    tensors, options = CASES["one query"].inputs(dtype)
    attention(*tensors, **options)
    assert not converted
