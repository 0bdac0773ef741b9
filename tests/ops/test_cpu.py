from itertools import chain, combinations, pairwise

import pytest
import torch
from adversarial import (
    CASES,
    LARGE_SCORES,
    Case,
    assert_within_the_rule,
    magnitudes,
    probabilities,
    random_grads,
    run,
    shaken,
)
from flat import cpu_attention, key_ranges, reference_attention
from hypothesis import given, settings
from hypothesis import strategies as st

import longreach.ops.cpu.native as native
import longreach.ops.cpu.passes as passes
import longreach.ops.cpu.products as module
from longreach.ops.alibi import alibi_slopes
from longreach.ops.cpu.bounding import heads_worth_bounding
from longreach.ops.cpu.plan import (
    BLOCK_M,
    BLOCK_N,
    HostVisibility,
    blocks_of_heads,
    kernel_cost,
    plan,
    product_cost,
    reading_cost,
)
from longreach.ops.lse_bound import FEW_QUERIES
from longreach.ops.reach import key_block_norms, reach
from longreach.ops.visibility import Visibility

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["bounded", "near", "dense"])
def bounded(request, monkeypatch):
    """Run with either ranges and without them, whatever the cost model thinks of such small inputs."""
    dense = request.param == "dense"
    monkeypatch.setattr(passes, "heads_worth_bounding", lambda q, *_, **__: slice(0, 0 if dense else q.shape[1]))
    monkeypatch.setattr("longreach.ops.cpu.bounding.NEAR_KEYS", 4096 if request.param == "near" else 0)


@pytest.fixture(params=["products", "kernel"])
def differentiated(request, monkeypatch):
    """Differentiate by each, whatever is faster on this processor: by the kernel where its rounding does."""
    by_kernel = {torch.float64, *HALF} if request.param == "kernel" else set()
    monkeypatch.setattr(passes, "DIFFERENTIATED", by_kernel)
    use_native(monkeypatch, request.param == "native")


def use_native(monkeypatch, is_faster):
    """Compute by native code where it can, or nowhere."""
    assert native.library(torch.float32) is not None, "tiles.c is not compiled: python hatch_build.py"
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", is_faster)
    monkeypatch.setattr(passes, "HAS_NATIVE", is_faster)


def run_without_slopes(function, tensors, options, grads):
    """Output and the gradients of q, k and v, with fixed slopes, for a given gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, _ = function(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grads[0].to(out.dtype))


def double(x):
    return tuple(map(double, x)) if isinstance(x, tuple) else x.double()


@pytest.mark.usefixtures("bounded", "differentiated")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_in_float64(name):
    """The default tolerance there is the rounding of float64, so nothing but rounding may differ."""
    tensors, options = CASES[name].inputs(torch.float64)
    grads = random_grads(tensors)
    expected, actual = (run(f, tensors, options, grads) for f in (reference_attention, cpu_attention))
    # Scores stay below 1000 and sums below 2000 terms: 1000 * 2000 * 2^-53 = 2e-10 bounds the worst case.
    for x, y in zip((*expected[:2], *expected[2]), (*actual[:2], *actual[2]), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
    expected, actual = (run_without_slopes(f, tensors, options, grads) for f in (reference_attention, cpu_attention))
    for x, y in zip(expected, actual, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


def ways():
    """(case, ranges, dtype) that differ in the logic which rounds.

    Each case in float32 within ranges, where scores are made and added up otherwise than by the definition, and in a
    half type by the kernel, and in bfloat16 by native code, which has matrix units for it on some processors. What is
    left are conversions around the same tiles: of half types, and of whole heads, in every third case.
    """
    for number, name in enumerate(CASES):
        yield name, "bounded", torch.float32, "products"
        yield name, "bounded", torch.float32, "native"
        yield name, "bounded", torch.bfloat16, "native"
        yield name, "near", HALF[number % 2], "kernel"
        if number % 3 == 0:
            yield name, "near", torch.float16, "native"
            yield name, "dense", torch.float32, "native"
            yield name, "bounded", HALF[number % 2], "products"
            yield from ((name, ranges, torch.float32, "products") for ranges in ("near", "dense"))
    for name in LARGE_SCORES:
        yield name, "dense", torch.float32, "products"
        yield name, "dense", torch.float32, "native"
        yield name, "dense", torch.bfloat16, "native"
        yield name, "dense", torch.bfloat16, "kernel"


@pytest.mark.parametrize(
    ("name", "bounded", "dtype", "differentiated"), list(ways()), indirect=["bounded", "differentiated"], ids=str
)
def test_error_is_within_the_rule(name, bounded, dtype, differentiated):
    """Max and mean error against float64 at most 2x (3x for gradients) that of the plain reference in this dtype."""
    tensors, options = (CASES | LARGE_SCORES)[name].inputs(dtype)
    grads = random_grads(tensors)
    for fixed_slopes in (False, True):
        if fixed_slopes:
            grads = grads[0], torch.zeros_like(grads[1])
        function = run_without_slopes if fixed_slopes else outputs
        golden = function(reference_attention, [x.double() for x in tensors], options, grads)
        plain, actual = (function(f, tensors, options, grads) for f in (reference_attention, cpu_attention))
        assert actual[0].dtype == dtype
        assert_within_the_rule(golden, plain, actual, magnitudes(tensors, options, grads))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bounded", ["bounded", "near", "dense"], indirect=True)
@pytest.mark.parametrize("means", passes.Means)
def test_error_without_a_gradient_is_within_the_rule(name, bounded, means, monkeypatch):
    """By whatever is faster on some processor."""
    monkeypatch.setattr(passes, "_products_are_faster", lambda q, k: means == passes.Means.PRODUCTS)
    use_native(monkeypatch, means == passes.Means.NATIVE)
    dtypes = (torch.float32, *HALF)
    tensors, options = CASES[name].inputs(dtypes[len(name) % 3])
    golden, _ = reference_attention(*(x.double() for x in tensors), **options)
    (plain, _), (actual, _) = (f(*tensors, **options) for f in (reference_attention, cpu_attention))
    terms = magnitudes(tensors, options, random_grads(tensors))
    assert_within_the_rule([golden], [plain], [actual], terms)


@pytest.fixture
def by_kernel(monkeypatch):
    """The tiles that the kernel differentiates, where it may."""
    tiles, add = [], passes.KernelGradients.add

    def watched(self, tile):
        tiles.append(tile)
        add(self, tile)

    monkeypatch.setattr(passes.KernelGradients, "add", watched)
    monkeypatch.setattr(passes, "DIFFERENTIATED", {torch.float32, torch.bfloat16})
    return tiles


@pytest.mark.parametrize(
    ("case", "threads", "is_used"),
    [
        (Case(), 1, True),
        (Case(batch=2, options={"key_padding_mask": torch.zeros(2, 300, dtype=torch.bool)}), 1, True),
        (Case(batch=1, options={"key_padding_mask": torch.arange(300)[None] > 290}), 1, False),
        (Case(queries=301), 1, False),
        (Case(queries=8), 1, True),
        (Case(), 2, False),  # too few pairs to be shared out
    ],
    ids=["all", "no padding", "padding", "queries without keys", "few queries", "two threads"],
)
def test_where_the_kernel_differentiates(case, threads, is_used, by_kernel):
    tensors, options = case.inputs(torch.bfloat16)
    torch.set_num_threads(threads)
    try:
        run_without_slopes(cpu_attention, tensors, options, random_grads(tensors))
    finally:
        torch.set_num_threads(1)
    assert bool(by_kernel) == is_used


def test_the_kernel_knows_no_slopes_that_learn_and_no_gradient_of_the_lse(by_kernel):
    tensors, options = Case().inputs(torch.bfloat16)
    grads = random_grads(tensors)
    run(cpu_attention, tensors, options, (grads[0], torch.zeros_like(grads[1])))
    leaves = [x.detach().requires_grad_() for x in tensors]
    torch.autograd.grad(cpu_attention(*leaves, **options)[1].sum(), leaves[:2])
    assert not by_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_error_where_each_query_is_its_own_key(head_dim, dtype):
    """One key outweighs the others in each row, by scores that are not large."""
    tensors, options = Case(queries=512, keys=512, head_dim=head_dim).inputs(dtype)
    tensors[0] = tensors[1].clone()
    grads = random_grads(tensors)
    for function in (run_without_slopes, outputs):
        golden = function(reference_attention, [x.double() for x in tensors], options, grads)
        plain, actual = (function(f, tensors, options, grads) for f in (reference_attention, cpu_attention))
        assert_within_the_rule(golden, plain, actual, magnitudes(tensors, options, grads))


@pytest.mark.parametrize("flushed", [False, True])
def test_denormals_count_as_zero_while_the_kernel_differentiates(flushed, by_kernel):
    """In whose thread they are then what the caller has set, as before: a weight of 1e-40 makes products slow."""
    torch.set_flush_denormal(flushed)
    q, k = torch.zeros(2, 1, 1, 185, 8)
    v = torch.randn(1, 1, 185, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = cpu_attention(*leaves, slopes=torch.tensor([0.5]), tolerance=0.0)
    last = torch.zeros_like(out)
    last[:, :, -1] = 1.0
    of_v = torch.autograd.grad(out, leaves, last)[2][0, 0, :, 0]
    assert by_kernel
    assert of_v[0] == 0.0 < of_v[20] < 1e-35
    product = torch.full((1,), 1e-30) * torch.full((1,), 1e-10)
    assert product.item() == (0.0 if flushed else pytest.approx(1e-40, rel=1e-3))


def outputs(function, tensors, options, grads):
    """The output and all gradients."""
    out, _, gradients = run(function, tensors, options, grads)
    return out, *gradients


@pytest.mark.parametrize(
    ("is_native", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)], ids=str
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_error_of_scores_of_any_size(is_native, dtype, data):
    """The rule where one key may outweigh all others, and what is subtracted from a score is as large as the score."""
    case = Case(
        heads=2,
        kv_heads=2,
        queries=data.draw(st.sampled_from([1, 2, 9, 40, 130]), "queries"),
        keys=data.draw(st.sampled_from([1, 3, 40, 130]), "keys"),
        head_dim=data.draw(st.sampled_from([8, 64, 80, 256]), "head_dim"),
        options={"causal": data.draw(st.booleans(), "causal")},
    )
    tensors, options = case.inputs(dtype, data.draw(st.integers(0, 99), "seed"))
    for x in tensors:
        x *= data.draw(st.sampled_from([0.1, 1.0, 10.0, 30.0]), "size")
    tensors[1][:, :, data.draw(st.integers(0, case.keys - 1), "key")] *= data.draw(
        st.sampled_from([1, 30, 1000]), "more"
    )
    grads = random_grads(tensors)

    def by_definition(tensors, options):
        return outputs(reference_attention, tensors, options, grads)

    golden, plain = by_definition([x.double() for x in tensors], options), by_definition(tensors, options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_native(monkeypatch, is_native)
        actual = outputs(cpu_attention, tensors, options, grads)
    by_scores = shaken(by_definition, tensors, options, golden) if dtype == torch.float32 else None
    assert_within_the_rule(golden, plain, actual, magnitudes(tensors, options, grads), by_scores)


@pytest.mark.parametrize("head_dim", [1, 33, 64, 128, 256])
def test_dot_products_are_rounded_alike_whatever_is_beside_them(head_dim):
    """What the backward pass relies on to make of equal scores, and of equal dP and delta, what is equal."""
    torch.manual_seed(0)
    rows, columns = torch.randn(1, 640, head_dim), torch.randn(1, 640, head_dim)
    whole = module._dots(rows, columns)
    assert torch.equal(module._dots(columns, rows).transpose(1, 2), whole)
    assert torch.equal(module._own_dots(rows, columns)[:, 0], whole.diagonal(dim1=1, dim2=2))
    added = torch.randn(1, 1, 640)
    assert torch.equal(module._dots(rows, columns, added), whole + added)
    for part in (slice(0, 1), slice(3, 12), slice(0, 64), slice(100, 611)):
        assert torch.equal(module._dots(rows[:, part], columns), whole[:, part])
        assert torch.equal(module._dots(rows, columns[:, part], added[..., part]), (whole + added)[..., part])
        assert torch.equal(module._own_dots(rows[:, part], columns[:, part])[0, 0], whole[0].diagonal()[part])
        lanes = module._dots(rows[:, part].expand(3, -1, -1), columns.expand(3, -1, -1))
        assert torch.equal(lanes, whole[:, part].expand(3, -1, -1))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    keys = data.draw(st.integers(1, 700), "keys")
    group = data.draw(st.integers(1, 2), "group")
    kv_heads = data.draw(st.integers(1, 2), "kv heads")
    case = Case(
        batch=data.draw(st.integers(1, 2), "batch"),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        keys=keys,
        queries=data.draw(st.sampled_from([1, keys, max(1, keys - 131), keys + 9]), "queries"),
        head_dim=data.draw(st.sampled_from([1, 16, 33]), "head_dim"),
        slopes=torch.rand(group * kv_heads) * data.draw(st.sampled_from([0.0, 0.2, 2.0]), "slopes"),
        options={
            "causal": data.draw(st.booleans(), "causal"),
            "window_size": data.draw(st.sampled_from([None, 1, 150]), "window"),
        },
    )
    tensors, options = case.inputs(torch.float64)
    grads = random_grads(tensors)
    expected, actual = (run(f, tensors, options, grads) for f in (reference_attention, cpu_attention))
    for x, y in zip((*expected[:2], *expected[2]), (*actual[:2], *actual[2]), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal):
    tensors, _ = Case(heads=2, kv_heads=1, queries=5, keys=7, head_dim=3).inputs(torch.float64)
    slopes = (torch.tensor([0.3, 0.9]).double(), torch.tensor([0.2, 0.5]).double())
    inputs = [x.requires_grad_() for x in (*tensors, *slopes)]

    def function(q, k, v, left, right):
        return cpu_attention(q, k, v, slopes=(left, right), causal=causal)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("with_norms", [False, True])
def test_decoding_in_chunks_equals_one_forward(with_norms):
    tensors, options = Case(queries=700, keys=700, heads=2, kv_heads=1, slopes=torch.tensor([0.8, 0.1])).inputs(
        torch.float64
    )
    q, k, v = tensors
    expected, _ = cpu_attention(q, k, v, **options)
    row = 0
    for size in (1, 3, 140, 1, 1, 400, 153, 1):
        past = row + size
        norms = key_block_norms(k[:, :, :past], BLOCK_N) if with_norms else None
        out, _ = cpu_attention(q[:, :, row:past], k[:, :, :past], v[:, :, :past], key_norms=norms, **options)
        torch.testing.assert_close(out, expected[:, :, row:past], rtol=1e-12, atol=1e-12)
        row = past
    assert row == 700


def test_decoding_reads_only_what_is_within_reach():
    """Values beyond the reach may be anything at all, were they in the cache or not."""
    (q, k, v), _ = Case(queries=1, keys=20_000, heads=4, kv_heads=4).inputs(torch.float32)
    norms = key_block_norms(k, BLOCK_N)
    expected, _ = cpu_attention(q, k, v, slopes=torch.full((4,), 0.5))
    k[:, :, :19_000], v[:, :, :19_000] = float("nan"), float("nan")
    actual, _ = cpu_attention(q, k, v, slopes=torch.full((4,), 0.5), key_norms=norms)
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("queries", [1, 300])
def test_scores_far_below_zero_are_no_hidden_keys(queries):
    (q, k, v), options = Case(queries=queries).inputs(torch.float32)
    q, k = 1e16 * q.abs(), -1e16 * k.abs()
    out, lse = cpu_attention(q, k, v, **options)
    golden, golden_lse = reference_attention(q.double(), k.double(), v.double(), **options)
    assert golden_lse.amax() < -1e31
    torch.testing.assert_close(out, golden.float())
    torch.testing.assert_close(lse, golden_lse.float())


def test_near_keys_keep_distinct_biases_at_64k_in_bfloat16():
    """Equal scores, so that the LSE is that of the biases alone: a geometric series."""
    length, slope = 65_536, 2**-8
    q = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    k, v = torch.zeros(2, 1, 1, length, 16, dtype=torch.bfloat16)
    v[0, 0, -1] = 1.0
    out, lse = cpu_attention(q, k, v, slopes=torch.tensor([slope]))
    top = 1 - torch.tensor(-slope).double().exp()  # the nearest key's weight, were there no end of keys
    assert lse.item() == pytest.approx(-top.log().item(), abs=1e-4)
    assert out[0, 0, 0, 0].item() == pytest.approx(top.item(), rel=2**-7)


def test_time_is_linear_beyond_the_reach():
    """Counted in pairs of a query and a key that tiles hold, not in seconds: doubling the length doubles them."""
    pairs = []
    for length in (8192, 16384):
        shape = (1, 2, length, 16)
        (q, k, _), _ = Case(heads=2, kv_heads=2, queries=length, keys=length).inputs(torch.float32)
        ranges = key_ranges(q, k, torch.tensor([0.5, 0.05]), scale=0.25, tolerance=2**-24, block_m=128, block_n=64)
        ranges = dict(enumerate(zip(*(x.transpose(0, 1).mul(BLOCK_N).tolist() for x in ranges), strict=True)))
        visibility = HostVisibility.read(Visibility(length, length))
        tiles = list(plan(shape, shape, range(2), visibility, ranges, product_cost, largest=None))
        assert sum(tile.pairs // tile.width for tile in tiles) == 2 * length
        pairs.append(sum(tile.pairs for tile in tiles))
    assert pairs[1] < 2.1 * pairs[0]
    assert pairs[0] < 0.15 * 8192**2  # of 2 * 8192^2 / 2 for dense causal attention


@pytest.mark.parametrize("differentiated", ["products"], indirect=True)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_factors_are_dense_however_the_inputs_lie(monkeypatch, kv_heads, differentiated):
    """As a model's projection gives them: heads beside each other in one row."""
    product, factors = module._product, []

    def watched(a, b, added=None):
        factors.append(b[0])
        return product(a, b, added)

    monkeypatch.setattr(module, "_product", watched)
    packed = torch.randn(1, 1024, 2 + 2 * kv_heads, 16, requires_grad=True)
    q, k, v = packed.transpose(1, 2).split([2, kv_heads, kv_heads], dim=1)
    out, _ = cpu_attention(q, k, v, slopes=torch.tensor([0.5, 0.01]))
    out.transpose(1, 2).square().sum().backward()
    assert len(factors) >= 7
    assert all(b.is_contiguous() or b.T.is_contiguous() for b in factors)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("strip_pairs", [2**21, 2**13, None], ids=["one strip", "strips", "native"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.queries >= FEW_QUERIES])
def test_backward_leaves_out_the_tolerated_mass_and_no_less(name, strip_pairs, monkeypatch):
    """Of what the forward pass kept; the bounds on reach leave out as much again at most."""
    tolerance, ranges = 0.4, []

    def planned(*arguments, **options):
        ranges.append(arguments[4])
        return plan(*arguments, **options)

    def planned_in_blocks(*arguments):
        ranges.append(arguments[3])
        return blocks_of_heads(*arguments)

    use_native(monkeypatch, strip_pairs is None)
    monkeypatch.setattr(passes, "plan", planned)
    monkeypatch.setattr(native, "blocks_of_heads", planned_in_blocks)
    monkeypatch.setattr("longreach.ops.cpu.plan.STRIP_PAIRS", strip_pairs)
    tensors, options = CASES[name].inputs(torch.float64 if strip_pairs else torch.float32)
    run(cpu_attention, tensors, options | {"tolerance": tolerance}, random_grads(tensors))
    bounds, found = ranges
    low, high = zip(*(found[head] for head in range(tensors[0].shape[1])), strict=True)
    rows, index = tensors[0].shape[2], torch.arange(tensors[1].shape[2])
    low, high = (torch.tensor(x).transpose(0, 1).repeat_interleave(BLOCK_M, -1)[..., :rows] for x in (low, high))
    weights = probabilities(*tensors[:2], **options)  # [B, H, Tq, Tk]
    outside = weights * ((index < low[..., None]) | (index >= high[..., None]))
    assert outside.sum(dim=-1).amax() <= tolerance * (2 if bounds else 1)

    sides = [index < low[..., None] + BLOCK_N]
    if not options.get("causal", True):
        sides.append(index >= high[..., None] - BLOCK_N)
    for side in sides:  # with one block less, some row of each block of queries would lack too much
        lacking = (weights * side).sum(dim=-1)
        most = torch.stack([part.amax(dim=-1) for part in lacking.split(BLOCK_M, dim=-1)], dim=-1)
        narrow = (high - low <= BLOCK_N)[..., ::BLOCK_M]
        assert ((most > tolerance * (1 - 2**-7) / len(sides)) | narrow).all()


def test_rows_whose_scores_are_all_infinitely_low_have_no_gradient(monkeypatch):
    """None of their keys is needed, so no tile writes them; memory that nobody wrote is NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    q, k, v = (torch.full((1, 1, 300, 16), x, requires_grad=True) for x in (1e30, -1e30, 1.0))
    torch.use_deterministic_algorithms(True)
    try:
        out, lse = cpu_attention(q, k, v, slopes=torch.tensor([0.1]))
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    assert lse.isneginf().all()
    assert not any(x.any() for x in (out, *gradients))


def test_backward_is_deterministic_and_repeats():
    tensors, options = CASES["longer than the reach"].inputs(torch.float32)
    grads = random_grads(tensors)
    first, second = (run(cpu_attention, tensors, options, grads) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first[2], second[2], strict=True))
    leaves = [x.requires_grad_() for x in tensors]
    out = torch.utils.checkpoint.checkpoint(lambda *x: cpu_attention(*x, **options)[0], *leaves, use_reentrant=False)
    again = torch.autograd.grad((out * grads[0].float()).sum(), leaves)
    plain = run_without_slopes(cpu_attention, tensors, options, grads)
    assert all(torch.equal(x, y) for x, y in zip(again, plain[1:], strict=True))


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 5, 1), (5, 0, 1), (0, 0, 1), (4, 4, 0)])
def test_empty(queries, keys, batch):
    tensors, options = Case(batch=batch, queries=queries, keys=keys).inputs(torch.float32)
    out, lse, grads = run(cpu_attention, tensors, options, random_grads(tensors))
    assert out.shape == tensors[0].shape
    assert not out.any()
    assert lse.isneginf().all()
    assert not any(g.any() for g in grads)


@given(data=st.data(), kv_heads=st.sampled_from([1, 2, 6]))
@settings(max_examples=60, deadline=None)
def test_heads_share_calls_where_that_is_cheapest(data, kv_heads):
    """Of all ways to cut the heads of a decoding step into calls."""
    heads, length = 6, 40_000
    blocks = data.draw(st.lists(st.integers(0, length // 64 - 1), min_size=heads, max_size=heads))
    ranges = {head: ([[64 * block]], [[length]]) for head, block in enumerate(blocks)}
    visibility = HostVisibility.read(Visibility(1, length))
    shapes = (1, heads, 1, 8), (1, kv_heads, length, 8)
    tiles = list(plan(*shapes, range(heads), visibility, ranges, reading_cost, largest=None))
    covered = [head for tile in tiles for head in range(tile.heads.start, tile.heads.stop)]
    assert covered == list(range(heads))

    def total(cuts):
        calls = list(pairwise((0, *cuts, heads)))
        if any(
            first * kv_heads // heads != (past - 1) * kv_heads // heads for first, past in calls if kv_heads < heads
        ):
            return float("inf")
        return sum(reading_cost(past - first, 1, length - 64 * min(blocks[first:past])) for first, past in calls)

    cheapest = min(total(cuts) for count in range(heads) for cuts in combinations(range(1, heads), count))
    assert sum(reading_cost(t.heads.stop - t.heads.start, 1, t.width) for t in tiles) == cheapest


def test_bounding_is_as_dear_as_the_price_says():
    """Where pairs are cheap, fewer heads are worth it, and longer inputs."""
    slopes = alibi_slopes(8)

    def worth(length, price):
        q, k = torch.zeros(2, 1, 8, length, 64)
        visibility = HostVisibility.read(Visibility(length, length))
        found = heads_worth_bounding(q, k, slopes, slopes, visibility, 2**-14, None, 2**18, price)
        return found.stop - found.start

    assert worth(1024, 1) > worth(1024, 4) == 0
    assert worth(2048, 1) >= worth(2048, 4) > 0


@pytest.mark.parametrize(("largest", "most_heads"), [(0, 1), (2**17, 2), (2**19, 8)])
def test_tiles_of_several_heads_have_at_most_so_many_pairs(largest, most_heads):
    shape = (2, 8, 512, 64)
    visibility = HostVisibility.read(Visibility(512, 512))
    tiles = list(plan(shape, shape, range(8), visibility, {}, kernel_cost, largest=largest))
    heads = [tile.heads.stop - tile.heads.start for tile in tiles]
    assert all(tile.batch.stop - tile.batch.start == 1 for tile in tiles)
    assert all(count == 1 or tile.pairs <= largest for tile, count in zip(tiles, heads, strict=True))
    assert max(heads) == most_heads
    assert sum(tile.rows * count for tile, count in zip(tiles, heads, strict=True)) == 2 * 8 * 512


@pytest.mark.parametrize("is_native", [True, False])
def test_work_stays_in_proportion_to_what_reach_keeps(is_native, monkeypatch):
    # Pairs of a query and a key in the tiles that run, against those in the blocks that matter: what a kernel costs
    # per kept block does not grow with length.
    class Planned(Exception):
        pass

    def planned(*arguments, **options):
        raise Planned(sum(tile.pairs for tile in plan(*arguments, **options)))

    def planned_in_blocks(*arguments):
        blocks = chain(*blocks_of_heads(*arguments).values())
        raise Planned(sum(block.rows * (block.high - block.low) for block in blocks))

    use_native(monkeypatch, is_native)
    monkeypatch.setattr(passes, "plan", planned)
    monkeypatch.setattr(native, "blocks_of_heads", planned_in_blocks)
    monkeypatch.setattr(passes, "BOUND_BY_PRODUCTS", 2**20)  # where oneDNN is done sooner with all that is visible, too
    work = []
    for length in (2048, 8192, 65536):
        torch.manual_seed(0)
        q, k = torch.randn(1, 8, length, 64), torch.randn(1, 8, length, 64)
        slopes = alibi_slopes(8)
        with pytest.raises(Planned) as result:
            cpu_attention(q, k, k, slopes=slopes)
        kept = reach(q, k, slopes)
        blocks = int((kept.ends - kept.starts).sum())
        work.append(result.value.args[0] / (blocks * kept.block_m * kept.block_n))
    # Short inputs get fewer and larger tiles, since their number costs more than the pairs that they hold in vain.
    assert max(work) <= 1.25
    assert work[2] <= 1.02 * work[1] <= 1.02 * work[0]
