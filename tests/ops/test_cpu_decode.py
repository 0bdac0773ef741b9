"""Decoding steps by native code: few queries, which read keys until the rest is out of reach."""

import pytest
import torch
from adversarial import Case, assert_within_the_rule, magnitudes, probabilities, random_grads, shaken
from flat import cpu_attention, reference_attention
from hypothesis import given, settings
from hypothesis import strategies as st

import longreach.ops.cpu.native as native
import longreach.ops.cpu.workers as workers
from longreach import alibi_slopes
from longreach.ops.reach import KEY_BLOCK, default_tolerance, key_block_norms

DTYPES = native.STEP_DTYPES


@pytest.fixture(autouse=True)
def decoded(monkeypatch):
    """How many calls native code decoded, on any processor that has some."""
    assert native.library(torch.float32) is not None, "decode.c is not compiled: python hatch_build.py"
    decode, calls = native.decode, []

    def watched(*arguments, **options):
        calls.append(1)
        return decode(*arguments, **options)

    monkeypatch.setattr(native, "decode", watched)
    return calls


def check(case, dtype, seed=0, *, with_norms=True, size=1.0):
    """Output within the rule, and the LSE within what sums of float32 and the tolerance leave."""
    tensors, options = case.inputs(dtype, seed)
    tensors[0] *= size
    norms = {"key_norms": key_block_norms(tensors[1], KEY_BLOCK)} if with_norms else {}
    golden, golden_lse = reference_attention(*(x.double() for x in tensors), **options)
    plain, _ = reference_attention(*tensors, **options)
    out, lse = cpu_attention(*tensors, **options, **norms)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    terms = magnitudes(tensors, options, random_grads(tensors))

    def output(tensors, options):
        return [reference_attention(*tensors, **options)[0]]

    by_scores = shaken(output, tensors, options, [golden]) if dtype == torch.float32 else None
    assert_within_the_rule([golden], [plain], [out], terms, by_scores)
    largest = golden_lse[golden_lse.isfinite()].abs().max() if golden_lse.isfinite().any() else 0.0
    bound = default_tolerance(dtype) + 2**-20 * (1 + float(largest) + float(tensors[0].float().norm(dim=-1).max()))
    torch.testing.assert_close(lse.double(), golden_lse, rtol=0, atol=bound)


@settings(max_examples=150, deadline=None, derandomize=False)
@given(data=st.data())
def test_any_shape(data):
    keys = data.draw(st.integers(1, 400), "keys")
    batch = data.draw(st.integers(1, 2), "batch")
    group = data.draw(st.integers(1, 3), "group")
    kv_heads = data.draw(st.integers(1, 2), "kv heads")
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    hides = data.draw(st.sampled_from(["nothing", "ends", "holes"]), "padding")
    if hides == "ends":
        padding[-1, : keys // 2] = padding[0, keys - keys // 3 :] = True
    if hides == "holes":
        padding[:] = torch.rand(batch, keys) < 0.4
    heads = group * kv_heads
    slopes = torch.rand(heads) if data.draw(st.booleans(), "alike") else torch.rand(batch, heads)
    case = Case(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=data.draw(st.integers(1, 15), "queries"),
        keys=keys,
        head_dim=data.draw(st.sampled_from([1, 7, 8, 16, 33, 64, 80, 128, 200]), "head_dim"),
        slopes=slopes * data.draw(st.sampled_from([0.0, 0.05, 2.0]), "slopes"),
        options={"window_size": data.draw(st.sampled_from([None, 1, 70]), "window")}
        | ({} if hides == "nothing" else {"key_padding_mask": padding}),
    )
    size = data.draw(st.sampled_from([0.1, 1.0, 30.0]), "size")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    check(case, dtype, data.draw(st.integers(0, 99), "seed"), with_norms=data.draw(st.booleans(), "norms"), size=size)


@pytest.mark.parametrize("slope", [0.0, 2**-8])
def test_sums_of_many_terms_are_rounded_no_more(slope):
    """As they would be, if each value was added to the sum of all before."""
    check(Case(queries=1, keys=5000, heads=8, kv_heads=8, head_dim=64, slopes=torch.full((8,), slope)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [700, 5000])
def test_far_keys_are_not_read_and_nothing_is_missed(dtype, length, decoded):
    """Those beyond the reach may be anything at all; their weights sum to no more than the tolerance."""
    case = Case(queries=2, keys=length, heads=4, kv_heads=2, head_dim=64, slopes=torch.tensor([0.5, 0.25, 0.7, 0.3]))
    (q, k, v), options = case.inputs(dtype)
    norms = key_block_norms(k, KEY_BLOCK)
    expected = cpu_attention(q, k, v, **options, key_norms=norms)
    reads = 448  # 30 times 1 / 0.25 and what is left of 64
    k[:, :, :-reads], v[:, :, :-reads] = float("nan"), float("nan")
    for x, y in zip(cpu_attention(q, k, v, **options, key_norms=norms), expected, strict=True):
        assert torch.equal(x, y)
    assert len(decoded) == 2


@pytest.mark.parametrize("far", [64, 1000, 1930])
def test_far_keys_that_outweigh_near_ones_are_read(far):
    def outweigh(q, k, v):
        k[:, :, -far - 1] = q[:, :, -1] * 40

    check(Case(queries=1, keys=2000, heads=2, kv_heads=2, slopes=torch.full((2,), 0.3), change=outweigh), torch.float32)


@pytest.mark.parametrize("tolerance", [0.0, 2**-24, 1e-3, 0.3])
def test_what_is_left_out_is_tolerated(tolerance):
    case = Case(queries=3, keys=3000, heads=4, kv_heads=4, slopes=torch.tensor([0.01, 0.05, 0.2, 1.0]))
    (q, k, v), options = case.inputs(torch.float32)
    weights = probabilities(q, k, **options).double()
    # With values that are 1 for all keys, the output times what was summed is that share of the weights.
    _, lse = cpu_attention(q, k, v, **options, tolerance=tolerance, key_norms=key_block_norms(k, KEY_BLOCK))
    _, golden = reference_attention(q.double(), k.double(), v.double(), **options)
    left_out = -torch.expm1(lse.double() - golden)
    assert left_out.max() <= tolerance + 2**-19
    if tolerance == 0.3:
        assert left_out.max() > 2**-19  # it is made use of
    assert weights.sum(dim=-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["model", "columns", "cache"])
def test_inputs_that_lie_in_any_way(layout):
    """Heads beside each other, rows that are no rows in memory, and a part of a larger cache."""
    tensors, options = Case(batch=2, queries=3, keys=300, heads=4, kv_heads=2, head_dim=16).inputs(torch.float32)
    expected = cpu_attention(*tensors, **options)
    if layout == "model":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    elif layout == "columns":
        tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    else:
        tensors = [torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in tensors]
    for x, y in zip(cpu_attention(*tensors, **options), expected, strict=True):
        assert torch.equal(x, y)


def test_what_is_padding_may_be_anything():
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[0, 100:140] = padding[1, :] = True
    (q, k, v), options = Case(batch=2, queries=2).inputs(torch.float32)
    for x in (k, v):
        x.masked_fill_(padding[:, None, :, None], float("nan"))
    out, lse = cpu_attention(q, k, v, **options, key_padding_mask=padding)
    assert out.isfinite().all()
    assert (out[1] == 0).all()
    assert (lse[1] == float("-inf")).all()


@pytest.mark.parametrize("where", range(3))
def test_what_is_no_number_is_none_in_the_output(where):
    tensors, options = Case(queries=2).inputs(torch.float32)
    tensors[where][0, 0, -1, 3] = float("nan")
    out, _ = cpu_attention(*tensors, **options)
    assert out[0, 0, 1].isnan().any()
    assert out[:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [7, 16, 64, 128])
def test_a_score_of_minus_infinity_hides_its_key_alone(head_dim, dtype):
    """Wherever in the key it comes from. Of other sizes some numbers are read twice, the second time times 0."""
    case = Case(queries=1, keys=100, heads=head_dim, kv_heads=head_dim, head_dim=head_dim)
    (q, k, v), options = case.inputs(dtype)
    q.abs_()
    for number in range(head_dim):
        k[:, number, 90, number] = float("-inf")
    out, lse = cpu_attention(q, k, v, **options)
    hidden = torch.zeros(len(q), 100, dtype=torch.bool)
    hidden[:, 90] = True
    expected, expected_lse = cpu_attention(q, k, v, **options, key_padding_mask=hidden)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("key", [0, 100, 1500])
def test_what_is_no_number_has_no_bound(key):
    """However far it is."""
    (q, k, v), options = Case(queries=1, keys=2000, slopes=torch.full((4,), 0.9)).inputs(torch.float32)
    k[0, 0, key, 3] = float("nan")
    out, _ = cpu_attention(q, k, v, **options, key_norms=key_block_norms(k, KEY_BLOCK))
    assert out[0, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "kv_heads", "queries", "threads"), [(3, 3, 2, 2), (1, 1, 1, 4), (1, 2, 3, 7), (1, 6, 1, 16)]
)
def test_threads_make_the_same_of_it(dtype, batch, kv_heads, queries, threads, monkeypatch, decoded):
    """Each with heads of its own or, where there are more threads than key heads, with queries of its own."""
    monkeypatch.setattr(native, "SHARED_NUMBERS", 1)
    case = Case(batch=batch, heads=6, kv_heads=kv_heads, queries=queries, keys=900, slopes=alibi_slopes(6))
    (q, k, v), options = case.inputs(dtype)
    alone = cpu_attention(q, k, v, **options)
    torch.set_num_threads(threads)
    try:
        assert workers.address_of_region() is not None
        for x, y in zip(cpu_attention(q, k, v, **options), alone, strict=True):
            assert torch.equal(x, y)
        assert len(decoded) == 2
    finally:
        torch.set_num_threads(1)


def test_what_it_does_not_serve_is_computed_otherwise(decoded):
    """float64, both ways, packed documents, and where a gradient is wanted."""
    tensors, options = Case(queries=3, keys=3).inputs(torch.float32)
    cpu_attention(*(x.double() for x in tensors), **options)
    cpu_attention(*tensors, **options, causal=False)
    cpu_attention(*tensors, **options, cu_seqlens=torch.tensor([0, 1, 3]))
    cpu_attention(*(x.requires_grad_() for x in tensors), **options)
    assert not decoded


def test_a_single_query_sees_no_key_after_it(decoded):
    (q, k, v), options = Case(queries=1, keys=700).inputs(torch.float32)
    expected = cpu_attention(q, k, v, **options)
    for x, y in zip(cpu_attention(q, k, v, **options, causal=False), expected, strict=True):
        assert torch.equal(x, y)
    assert len(decoded) == 2


def test_a_query_whose_squares_underflow_has_a_norm():
    """By which far keys outweigh near ones."""
    q, k, v = torch.full((1, 1, 1, 64), 1e-19), torch.zeros(1, 1, 4096, 64), torch.zeros(1, 1, 4096, 64)
    k[:, :, :2048], v[:, :, :2048] = 1e18, 1.0
    norms = key_block_norms(k, KEY_BLOCK)
    out, _ = cpu_attention(q, k, v, slopes=torch.tensor([0.01]), scale=20.0, key_norms=norms)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("slope", [3e38, torch.finfo(torch.float32).max])
def test_the_steepest_slopes_leave_the_last_key_alone(slope):
    (q, k, v), _ = Case(queries=2).inputs(torch.float32)
    out, lse = cpu_attention(q, k, v, slopes=torch.full((4,), slope))
    torch.testing.assert_close(out, v[:, :, -2:], rtol=0, atol=0)
    torch.testing.assert_close(lse, (q * k[:, :, -2:]).sum(dim=-1) / 4)
