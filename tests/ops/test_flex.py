import pytest
import torch
from adversarial import CASES, Case
from flat import flex_alibi_attention, reference_attention, visibility_of
from torch.nn.attention.flex_attention import flex_attention

from longreach.ops.attention import attention
from longreach.ops.flex import _score_mod, reach_block_mask
from longreach.ops.reach import reach


@pytest.mark.parametrize("name", ["longer than the reach", "padding, window, both ways", "documents", "single query"])
def test_block_mask_holds_the_blocks_in_reach(name):
    tensors, options = CASES[name].inputs(torch.float32)
    q, k, _ = tensors
    found = reach(q, k, tolerance=1e-3, block_m=32, block_n=16, **options)
    mask = reach_block_mask(found, visibility_of(q, k, options))
    number = torch.arange(-(-k.shape[2] // 16))
    expected = (number >= found.starts[..., None]) & (number < found.ends[..., None])
    assert torch.equal(mask.to_dense().bool(), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["two slopes", "padding at both ends", "documents", "grouped heads", "window"])
def test_modifications_are_those_of_the_definition(name):
    """Eager FlexAttention computes every block, by the same functions of positions that the compiled one inlines."""
    tensors, options = CASES[name].inputs(torch.float64)
    q, k, v = tensors
    if "key_padding_mask" in options:
        k, v = (x.nan_to_num(nan=0.0) for x in (k, v))
    found = reach(q, k, **options)
    out = flex_attention(
        q,
        k,
        v,
        score_mod=_score_mod(options["slopes"], q.shape[:2], k.shape[2] - q.shape[2]),
        block_mask=reach_block_mask(found, visibility_of(q, k, options)),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    expected, _ = reference_attention(q, k, v, **options)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # the bias is made in float32


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("grouped heads", torch.float32),
        ("documents", torch.bfloat16),
        ("padding, window, both ways", torch.float32),
        ("single query", torch.float32),
    ],
)
def test_compiled_output(name, dtype):
    """The error against float64 is at most twice that of the plain way in the same dtype, as of any implementation."""
    torch._dynamo.reset()
    tensors, options = CASES[name].inputs(dtype)
    golden, _ = reference_attention(*(x.double() for x in tensors), **options)
    plain, _ = reference_attention(*tensors, **options)
    ours = attention(*tensors, **options, impl="flex")
    assert ours.dtype == dtype
    rounding = golden.abs().max() * torch.finfo(dtype).eps / 2  # of the result
    for measure in (torch.max, torch.mean):
        allowed = 2 * measure((plain - golden).abs()) + rounding
        assert measure((ours - golden).abs()) <= allowed, measure.__name__


@pytest.mark.parametrize("name", ["q", "k", "v", "slopes", "left", "right"])
def test_refuses_gradients_on_the_cpu(name):
    (q, k, v), options = Case().inputs(torch.float32)
    left, right = options["slopes"].clone(), options["slopes"].clone()
    {"q": q, "k": k, "v": v, "slopes": options["slopes"], "left": left, "right": right}[name].requires_grad_()
    if name in ("left", "right"):
        options["slopes"] = (left, right)
    with pytest.raises(ValueError, match=r"^q, k, v or slopes needs a gradient"):
        flex_alibi_attention(q, k, v, **options)


def test_refuses_the_lse_on_the_cpu():
    (q, k, v), options = Case().inputs(torch.float32)
    with pytest.raises(ValueError, match=r'^return_lse=True with impl="flex" on the CPU'):
        attention(q, k, v, **options, return_lse=True, impl="flex")


def test_refuses_float64():
    (q, k, v), options = Case().inputs(torch.float64)
    with pytest.raises(ValueError, match=r"^q of float64"):
        flex_alibi_attention(q, k, v, **options)


def test_refuses_empty_tensors():
    (q, k, v), options = Case(queries=0).inputs(torch.float32)
    with pytest.raises(ValueError, match=r"^q .* is empty"):
        flex_alibi_attention(q, k, v, **options)
