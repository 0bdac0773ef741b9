"""What sdpa computes in tiles because one mask would be too large: here that is any mask."""

import math

import pytest
import torch
from adversarial import CASES as LARGE_CASES
from adversarial import random_grads, run
from flat import flat, reference_attention
from slow_attention import CASES, TOLERANCE, slow_attention, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend

import longreach.ops.sdpa as module
from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import attention

sdpa = flat(module.sdpa_attention)


@pytest.fixture
def tiny(monkeypatch):
    """Tiles of two queries, ranges in blocks of two keys."""
    for name, value in {"MASK_LIMIT": 12, "TILE_ROWS": 2, "KEY_BLOCK": 2}.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def small(monkeypatch):
    for name, value in {"MASK_LIMIT": 2**14, "TILE_ROWS": 48, "KEY_BLOCK": 16}.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def masks(monkeypatch):
    """Elements of each mask that PyTorch's function gets."""
    sizes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(*args, **kwargs):
        if kwargs.get("attn_mask") is not None:
            sizes.append(kwargs["attn_mask"].numel())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    return sizes


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", CASES)
def test_output_lse_and_gradients(name):
    tensors, options = CASES[name].inputs()
    expected = slow_attention(*tensors, **options)
    torch.testing.assert_close(sdpa(*tensors, **options)[0], expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(sdpa(*tensors, **options, return_lse=True), expected, rtol=TOLERANCE, atol=TOLERANCE)
    leaves, rebuilt = with_gradients(tensors, options)

    def outputs(q, k, v, *extra):
        out, lse = sdpa(q, k, v, **rebuilt(*extra), return_lse=True)
        alone, _ = sdpa(q, k, v, **rebuilt(*extra))
        return out, alone, lse.masked_fill(lse == -math.inf, 0.0)  # finite differences cannot take -inf

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", LARGE_CASES)
def test_adversarial_inputs_in_float64(name):
    """The default tolerance there is the rounding of float64; scores stay below 1000 and sums below 2000 terms."""
    tensors, options = LARGE_CASES[name].inputs(torch.float64)
    grads = random_grads(tensors)
    expected = run(reference_attention, tensors, options, grads)
    actual = run(sdpa, tensors, options, grads, return_lse=True)
    for x, y in zip((*expected[:2], *expected[2]), (*actual[:2], *actual[2]), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"slopes": alibi_slopes(4)}, 0.35),
        ({"slopes": alibi_slopes(4), "causal": False}, 0.6),
        ({"window_size": 200}, 0.12),
        ({"cu_seqlens": torch.tensor([0, 700, 701, 2999])}, 0.45),
        ({"key_padding_mask": torch.arange(2999)[None] < 1000}, 0.65),
    ],
    ids=["alibi", "alibi, bidirectional", "window", "documents", "padding"],
)
def test_masks_are_bounded_and_hold_what_can_matter(monkeypatch, masks, options, share):
    """Counted in elements of masks, of one forward and one backward pass, against one of all queries and keys."""
    monkeypatch.setattr(module, "MASK_LIMIT", 2**18)
    q, k, v = (torch.randn(1, 4, 2999, 16, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, **options, impl="sdpa")
    forward = sum(masks)
    out.sum().backward()
    assert len(masks) > 20
    assert max(masks) <= 2**18
    assert sum(masks) == 2 * forward
    assert forward <= share * 2999**2 * (4 if "slopes" in options else 1)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("return_lse", [False, True])
def test_dropout_is_the_same_in_the_backward_pass(return_lse):
    """The output is linear in v, with the weights that are left; the caller's generator moves on by one draw."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 4, requires_grad=True) for _ in range(3))
    options = {"slopes": alibi_slopes(2), "dropout_p": 0.5, "return_lse": return_lse}
    first, second = (sdpa(q, k, v, **options)[0] for _ in range(2))
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(second.square().sum(), v)
    torch.testing.assert_close((grad * v).sum(), 2 * second.square().sum())


@pytest.mark.usefixtures("small")
def test_one_graph_serves_all_lengths():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (260, 300, 411):
        q = torch.randn(1, 4, length, 8, requires_grad=True)
        slopes = alibi_slopes(4).requires_grad_()
        results = []
        for function in (attention, compiled):
            out = function(q, q, q, slopes=slopes, impl="sdpa")
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, slopes))))
        assert all(map(torch.equal, *results))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3  # nothing is compiled again


@pytest.mark.usefixtures("tiny")
def test_operators_keep_the_rules_of_torch_library():
    q, k, v = (torch.randn(1, heads, 9, 4, requires_grad=True) for heads in (4, 2, 2))
    slopes = alibi_slopes(4).requires_grad_()
    options = (torch.zeros(1, 9, dtype=torch.bool), None, None, True, 5, None, 0.0, None, True)
    results = torch.library.opcheck(torch.ops.longreach.sdpa_tiled.default, (q, k, v, slopes, slopes, None, *options))
    assert set(results.values()) == {"SUCCESS"}
