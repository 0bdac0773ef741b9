"""Decoding steps that `attention` hands to native code before all else: the same results, errors and choice."""

import math
from fractions import Fraction

import pytest
import torch

import longreach.ops.cpu.native as native
from longreach import alibi_slopes, attention
from longreach.ops import attention as module
from longreach.ops.attention import choose_impl
from longreach.ops.crossovers import CROSSOVERS, ROW
from longreach.ops.reach import KEY_BLOCK, default_tolerance, key_block_norms


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """The steps that were plain, on any processor that has native code for them."""
    assert native.library(torch.float32) is not None, "decode.c is not compiled: python hatch_build.py"
    plain_step, found = module._plain_step, []

    def watched(*arguments):
        out = plain_step(*arguments)
        if out is not None:
            found.append(out)
        return out

    monkeypatch.setattr(module, "_plain_step", watched)
    return found


def step(dtype=torch.float32, *, batch=1, heads=4, kv_heads=2, queries=1, keys=300, head_dim=16):
    """A plain one, as arguments of `attention`."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, head_dim).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, keys, head_dim).to(dtype)
    return {"q": q, "k": k, "v": v, "slopes": alibi_slopes(heads), "key_norms": key_block_norms(k, KEY_BLOCK).float()}


@pytest.mark.parametrize("dtype", native.STEP_DTYPES)
@pytest.mark.parametrize("scale", [None, 0.3, 1])
@pytest.mark.parametrize("shape", [{}, {"batch": 3, "queries": 7, "kv_heads": 4}, {"queries": 5, "keys": 3}])
@pytest.mark.parametrize("with_norms", [True, False])
def test_a_plain_step_is_what_all_checks_lead_to(dtype, scale, shape, with_norms, steps):
    """Which an option that says what is so anyway asks for."""
    given = step(dtype, **shape) | {"scale": scale}
    if not with_norms:
        given["key_norms"] = None
    out = attention(**given, impl="cpu")
    assert len(steps) == 1
    checked = attention(**given, impl="cpu", tolerance=default_tolerance(dtype))
    assert len(steps) == 1
    assert torch.equal(out, checked)
    assert out.dtype == dtype
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", native.STEP_DTYPES)
def test_the_output_is_rounded_to_the_nearest(dtype, steps):
    """With one key it is that one's value, or what a query that sees none has; halves of units go to what is even."""
    given = step(dtype, keys=1, head_dim=64)
    given["v"] = torch.tensor([math.nan, math.inf, -0.0, 1e-30, 3.0]).repeat(26)[:128].view(1, 2, 1, 64).to(dtype)
    expected = given["v"].repeat_interleave(2, dim=1)
    torch.testing.assert_close(attention(**given, impl="cpu"), expected, rtol=0, atol=0, equal_nan=True)
    given = step(dtype, keys=2, heads=1, kv_heads=1, head_dim=100) | {"slopes": torch.zeros(1)}
    given["q"].zero_()  # so that the output is the mean of two values
    unit = torch.finfo(dtype).eps
    given["v"] = (1 + unit * torch.arange(200).view(2, 100).T.reshape(1, 1, 2, 100)).to(dtype)
    expected = given["v"].double().mean(dim=2, keepdim=True).to(dtype)
    assert torch.equal(attention(**given, impl="cpu"), expected)
    assert len(steps) == 2


@pytest.mark.parametrize("dtype", native.STEP_DTYPES)
@pytest.mark.parametrize("name", ["q", "k", "v", "slopes", "key_norms"])
def test_steps_are_read_in_any_order_in_memory(name, dtype, steps):
    """As caches with room for more keep them, and projections make them; what is not plain is put in order first."""
    given = step(dtype, batch=2, queries=3)
    expected = attention(**given, impl="cpu")
    x = given[name]
    beside = torch.full_like(x, math.nan)
    orders = [torch.stack((beside, x), dim=n).select(n, 1) for n in range(x.dim() + 1)]
    orders += [x.transpose(a, b).contiguous().transpose(a, b) for a in range(x.dim()) for b in range(a)]
    for ordered in orders:
        assert torch.equal(attention(**given | {name: ordered}, impl="cpu"), expected)
    in_rows = [x.stride(-1) == 1 if name in "qkv" else x.is_contiguous() or name == "key_norms" for x in orders]
    assert len(steps) == 1 + sum(in_rows)


@pytest.mark.parametrize("name", ["k", "v", "key_norms"])
def test_steps_of_what_is_one_in_memory(name, steps):
    """As rows that are expanded."""
    given = step(batch=2, kv_heads=2)
    given[name] = given[name][:, :1].expand_as(given[name])
    copied = given | {name: given[name].contiguous()}
    assert torch.equal(attention(**given, impl="cpu"), attention(**copied, impl="cpu"))
    assert len(steps) == 2


@pytest.mark.parametrize("dtype", native.STEP_DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("with_norms", [True, False])
def test_auto_takes_what_choose_impl_says(dtype, kv_heads, with_norms, steps):
    measured = CROSSOVERS[ROW]
    least = max(measured.decoding.values())
    for keys in (least // 2, least - 1, least, 2 * least):
        given = step(dtype, heads=8, kv_heads=kv_heads, keys=keys, head_dim=64)
        if not with_norms:
            given["key_norms"] = None
        steps.clear()
        attention(**given)
        options = {"dtype": dtype, "reaching": True, "has_key_norms": with_norms, "cache_width": kv_heads * 64}
        assert bool(steps) == (choose_impl("cpu", 1, keys, **options).impl == "cpu")


WRONG = {
    "q": [
        None,
        torch.randn(4, 1, 16),
        torch.randn(1, 4, 1, 8),
        torch.randn(2, 4, 1, 16),
        torch.ones(1, 4, 1, 16).int(),
    ],
    "k": [torch.randn(1, 2, 300, 16).double(), torch.randn(1, 3, 300, 16), torch.randn(1, 0, 300, 16), "k"],
    "v": [torch.randn(1, 2, 299, 16), torch.randn(1, 2, 300, 16).to_sparse(), torch.randn(1, 2, 300, 16).to("meta")],
    "slopes": [
        *(torch.tensor([0.5, wrong, 0.5, 0.5]) for wrong in (-1.0, math.nan, math.inf)),
        *(torch.ones(3), torch.ones(4).int(), torch.ones(4).to("meta"), [1.0] * 4),
    ],
    "key_norms": [torch.ones(1, 2, 4), torch.ones(1, 2, 5).int(), torch.ones(1, 2, 5, 1), 3],
    "scale": [0.0, -1.0, math.nan, math.inf, 1e30, True, "1"],
    "impl": ["native", 1, torch.ones(2)],
    "causal": [1, None, torch.tensor(True)],
    "return_lse": [0, None],
    "dropout_p": [1.0, False, math.nan],
    "tolerance": [1.0],
    "window_size": [0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_wrong_with_a_step_is_said_as_ever(name, value, steps):
    with pytest.raises(ValueError, match=r"^\w+"):
        attention(**step() | {name: value})
    with pytest.raises(ValueError, match=r"^\w+"):
        attention(**{"impl": "cpu"} | step() | {name: value})
    assert not steps


def test_who_watches_sees_operators(steps):
    """Or wants a gradient, or derivatives forward, or has a device of their own where none is said."""
    given = step()
    expected = attention(**given, impl="cpu")
    steps.clear()
    q = given.pop("q")
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, **given, impl="cpu").dtype == torch.bfloat16
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, **given, impl="cpu"), expected)
    mapped = torch.vmap(lambda x: attention(x, **given, impl="cpu"))(q[None])
    torch.testing.assert_close(mapped[0], expected)
    assert attention(q.clone().requires_grad_(), **given, impl="cpu").requires_grad
    assert not steps
    with torch.device("meta"):
        assert torch.equal(attention(q, **given, impl="cpu"), expected)
    assert len(steps) == 1


def test_inputs_whose_sign_is_kept_apart(steps):
    """As the imaginary part of what was conjugated: they are not read as they are."""
    given = step()
    expected = attention(**given, impl="cpu")
    for name in ("q", "k", "v", "slopes", "key_norms"):
        x = given[name]
        kept_apart = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert kept_apart.is_neg()
        assert torch.equal(attention(**given | {name: kept_apart}, impl="cpu"), expected)
    assert len(steps) == 1


def test_a_scale_of_any_kind_of_number():
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 600, 16), torch.randn(1, 2, 600, 16)
    slopes = torch.tensor([0.5, 0.25])
    expected = attention(q, k, v, slopes=slopes, scale=0.125, impl="cpu")
    assert torch.equal(attention(q, k, v, slopes=slopes, scale=Fraction(1, 8), impl="cpu"), expected)
