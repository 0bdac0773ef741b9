import math
from functools import partial

import pytest
import torch
from adversarial import CASES, Case, probabilities
from flat import key_ranges, native_near_ranges, near_ranges
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.ops.alibi import alibi_slopes
from longreach.ops.reach import default_tolerance, key_block_norms, reach


def dropped_mass(tensors, options, starts, ends, block_m, block_n):
    """Weight of the keys outside of the ranges, (B, H, Tq), by the definition in float64."""
    q, k, _ = tensors
    weights = probabilities(q, k, **options)
    query_block = torch.arange(q.shape[2]) // block_m
    key_block = torch.arange(k.shape[2]) // block_n
    first, past = starts[..., query_block, None], ends[..., query_block, None]
    return weights.masked_fill((key_block >= first) & (key_block < past), 0.0).sum(dim=-1)


NEAR_RANGES = [near_ranges, native_near_ranges]
"""By tensor operations, and by native code."""

NEAR = [name for name, case in CASES.items() if "padding" not in name and case.queries <= case.keys]


@pytest.mark.parametrize("tolerance", [0.0, 2**-24, 1e-2])
@pytest.mark.parametrize("name", CASES)
def test_dropped_mass_is_within_the_tolerance(name, tolerance):
    tensors, options = CASES[name].inputs(torch.float32)
    q, k, _ = tensors
    norms = key_block_norms(k, 16, options.get("key_padding_mask"))
    functions = [key_ranges, partial(key_ranges, key_norms=norms), *(NEAR_RANGES if name in NEAR else [])]
    for function in functions:
        starts, ends = function(q, k, scale=0.25, tolerance=tolerance, block_m=32, block_n=16, **options)
        assert starts.dtype == ends.dtype == torch.int32
        assert bool((starts >= 0).all() and (starts <= ends).all() and (ends <= -(-k.shape[2] // 16)).all())
        # With tolerance 0 what is dropped must vanish even after exp(s - max) <= Tk * weight in float32.
        limit = tolerance or 2.0**-150
        assert dropped_mass(tensors, options, starts, ends, 32, 16).max().item() <= limit


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dropped_mass_for_any_shape(data):
    keys = data.draw(st.integers(1, 400), "keys")
    case = Case(
        batch=data.draw(st.integers(1, 2), "batch"),
        heads=2,
        kv_heads=data.draw(st.sampled_from([1, 2]), "kv heads"),
        keys=keys,
        queries=data.draw(st.sampled_from([1, 15, keys, max(1, keys - 13), keys + 9]), "queries"),
        slopes=torch.tensor(data.draw(st.lists(st.floats(0, 4), min_size=2, max_size=2), "slopes")),
        options={
            "causal": data.draw(st.booleans(), "causal"),
            "window_size": data.draw(st.sampled_from([None, 1, 50]), "window"),
        },
    )
    tolerance = data.draw(st.floats(1e-12, 0.5), "tolerance")
    block_m, block_n = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)), "blocks")
    tensors, options = case.inputs(torch.float32, seed=data.draw(st.integers(0, 99), "seed"))
    tensors[0].mul_(data.draw(st.sampled_from([0.1, 1.0, 10.0]), "size"))
    norms = key_block_norms(tensors[1], block_n) if data.draw(st.booleans(), "norms known") else None
    near = NEAR_RANGES if case.queries <= keys else []
    for function in (partial(key_ranges, key_norms=norms), *near):
        blocks = {"block_m": block_m, "block_n": block_n}
        starts, ends = function(*tensors[:2], scale=0.25, tolerance=tolerance, **blocks, **options)
        assert dropped_mass(tensors, options, starts, ends, block_m, block_n).max().item() <= tolerance


@pytest.mark.parametrize("near_ranges", NEAR_RANGES)
@pytest.mark.parametrize("causal", [True, False])
def test_near_ranges_are_little_wider(causal, near_ranges):
    q, k = torch.randn(2, 1, 8, 2048, 64, generator=torch.Generator().manual_seed(2))
    options = {"scale": 0.125, "tolerance": 2**-24, "block_m": 128, "block_n": 64, "causal": causal}
    past = torch.arange(2, 33, 2) if causal else torch.tensor(32)  # of each block, by causality
    near, precise = (
        (torch.minimum(ends, past) - starts).sum(dim=(0, 2))
        for starts, ends in (function(q, k, alibi_slopes(8), **options) for function in (near_ranges, key_ranges))
    )
    assert (near >= precise - 8).all()
    assert near.sum() <= 1.15 * precise.sum()
    assert near[0] <= 1.25 * precise[0]


@pytest.mark.parametrize("near_ranges", NEAR_RANGES)
def test_near_ranges_keep_what_is_no_number(near_ranges):
    q, k = torch.randn(2, 1, 2, 512, 16)
    k[:, 0, 100] = float("nan")
    q[:, 1, 300] = float("inf")
    starts, _ = near_ranges(q, k, torch.tensor([1.0, 1.0]), scale=0.25, tolerance=0.1, block_m=128, block_n=64)
    assert not starts[0, 0].any()
    assert starts[0, 1, 2] == 0 < starts[0, 1, 3]


@pytest.mark.parametrize("queries", [1, 15])
def test_few_queries_with_known_norms_read_no_more_than_many(queries):
    q, k = torch.randn(2, 1, 4, 2048, 64, generator=torch.Generator().manual_seed(2))
    last = q[:, :, -queries:]
    options = {"scale": 0.125, "tolerance": 2**-24, "block_m": 64, "block_n": 64, "key_norms": key_block_norms(k, 64)}
    of_few, _ = key_ranges(last, k, alibi_slopes(4), **options)
    of_many, _ = key_ranges(q, k, alibi_slopes(4), **options)
    assert (of_few[..., 0] >= of_many[..., -1] - 1).all()  # a block more, for their positions round otherwise
    assert of_few[0, 0, 0] > 28


@pytest.mark.parametrize("window_size", [None, 100])
@pytest.mark.parametrize("queries", [1, 2])
def test_bound_of_few_queries_is_sharp_where_keys_are_alike(queries, window_size):
    """There |q||k| is the score and the geometric sum is that of each block: a block more would be too much."""
    q, k = torch.ones(1, 4, queries, 1), torch.full((1, 4, 500, 1), 2.0)
    options = {"slopes": torch.tensor([0.7, 0.1, 0.03, 0.0]), "causal": True, "window_size": window_size}
    blocks = {"block_m": 16, "block_n": 16}
    starts, ends = key_ranges(q, k, scale=0.25, tolerance=1e-3, key_norms=key_block_norms(k, 16), **blocks, **options)
    dropped, more = (dropped_mass((q, k, None), options, start, ends, 16, 16) for start in (starts, starts + 1))
    assert dropped.max() <= 1e-3
    assert (more.amax(dim=-1) > 1e-3).all()
    assert starts.flatten().diff().le(0).all()
    assert starts[0, 0, 0] > 28


def test_skips_what_steep_heads_cannot_see():
    """The bound is of use: with std 1 and D=64 a slope of 1/2 reaches less than 100 keys, as the theorem says."""
    q, k = torch.randn(2, 1, 8, 2048, 64, generator=torch.Generator().manual_seed(0))
    found = reach(q, k, alibi_slopes(8), block_m=64, block_n=64)
    width = (found.ends - found.starts).amax(dim=-1)[0] * 64
    assert width[0].item() <= 192
    assert (width.diff() >= 0).all()
    # |q||k| scale <= 14, lse >= -4, tail <= 1 / (1 - e^-m), and up to two blocks of rounding to whole blocks.
    limit = [(14 + 4 + 24 * math.log(2) - math.log1p(-math.exp(-m))) / m + 192 for m in alibi_slopes(8).tolist()]
    assert all(w <= most for w, most in zip(width.tolist(), limit, strict=True))
    assert 0.02 < found.kept[0, 0].item() < 0.2


def test_one_huge_key_costs_only_its_own_blocks():
    """A bound by a prefix maximum would keep all blocks after it; here a steep head gets rid of it."""
    tensors, options = CASES["one huge early key"].inputs(torch.float32)
    tensors = [x.repeat(1, 1, 6, 1) for x in tensors]
    tensors[1][:, :, 300:] = tensors[1][:, :, 300:].clamp(-3, 3)
    found = reach(*tensors[:2], options["slopes"], block_m=32, block_n=32)
    assert (found.ends - found.starts)[0, 0, -1].item() <= 6


def test_common_mean_of_keys_does_not_matter():
    """Softmax is invariant to it, so the ranges may change by the rounding of scores alone."""
    q, k = torch.randn(2, 1, 4, 1024, 32, generator=torch.Generator().manual_seed(1))
    centred = reach(q, k, alibi_slopes(4))
    shifted = reach(q, k + 2.0, alibi_slopes(4))
    assert (centred.kept - shifted.kept).abs().max().item() < 0.05


@pytest.mark.parametrize("size", [500, 2**40])
def test_a_block_longer_than_all_is_one(size):
    q, k = torch.randn(2, 1, 2, 500, 16)
    found = reach(q, k, alibi_slopes(2), block_m=size, block_n=size)
    assert (found.starts.tolist(), found.ends.tolist()) == ([[[0], [0]]], [[[1], [1]]])
    assert (found.block_m, found.block_n) == (size, size)


def test_plain_heads_keep_everything():
    q, k = torch.randn(2, 1, 2, 500, 16)
    found = reach(q, k, torch.zeros(2), block_m=64, block_n=32)
    assert found.kept.tolist() == [[1.0, 1.0]]
    assert found.starts.sum() == 0


def test_nan_keeps_everything_it_could_touch():
    """What cannot be bounded is not dropped."""
    q, k = torch.randn(2, 1, 1, 640, 16)
    k[0, 0, 5] = float("nan")
    found = reach(q, k, torch.tensor([2.0]), block_m=64, block_n=64)
    assert found.starts.sum() == 0


@pytest.mark.parametrize(
    ("dtype", "power"), [(torch.float64, 53), (torch.float32, 24), (torch.bfloat16, 14), (torch.float16, 17)]
)
def test_default_tolerance(dtype, power):
    assert default_tolerance(dtype) == 2.0**-power


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty(queries, keys):
    found = reach(torch.empty(2, 2, queries, 8), torch.empty(2, 2, keys, 8), torch.ones(2))
    assert found.starts.shape == (2, 2, -(-queries // 128))
    assert (found.ends - found.starts).sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"block_m": 0}, "block_m=0"),
        ({"block_n": -1}, "block_n=-1"),
        ({"slopes": torch.ones(3)}, r"slopes of shape \(3,\)"),
        ({"slopes": torch.ones(2, dtype=torch.int64)}, "slopes of torch.int64"),
        ({"q": torch.ones(2, 5, 8)}, "q of shape"),
        ({"k": torch.ones(1, 3, 5, 8)}, "k has 3 heads"),
        ({"k": torch.ones(1, 2, 5, 9)}, "k of shape"),
        ({"k": torch.ones(1, 2, 5, 8).double()}, "k is torch.float64"),
        ({"scale": -1.0}, r"scale=-1\.0"),
        ({"window_size": 0}, "window_size=0"),
        ({"key_padding_mask": torch.ones(1, 4, dtype=torch.bool)}, "key_padding_mask of shape"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens ends with 4"),
    ],
)
def test_refuses(change, message):
    q, k = torch.randn(2, 1, 2, 5, 8)
    with pytest.raises(ValueError, match=f"^{message}"):
        reach(**({"q": q, "k": k, "slopes": torch.ones(2)} | change))


@pytest.mark.parametrize("borders", [[5, 300], [100, 50, 300], [0, 100], [0, 400], [0, 200, 100, 300]], ids=str)
def test_wrong_borders_read_nothing_out_of_range(borders):
    """Where nobody checks them, as on a GPU, ranges of blocks come out wrong, but are ranges of blocks."""
    q, k = torch.randn(2, 1, 2, 300, 8)
    starts, ends = key_ranges(
        q, k, torch.ones(2), scale=0.3, tolerance=1e-6, block_m=32, block_n=16, cu_seqlens=torch.tensor(borders)
    )
    assert bool((starts >= 0).all() and (starts <= ends).all() and (ends <= 19).all())
