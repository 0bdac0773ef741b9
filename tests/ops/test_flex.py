import pytest
import torch
from adversarial import CASES, Case
from torch.nn.attention.flex_attention import flex_attention

from longreach.ops.flex import _score_mod, flex_alibi_attention, reach_block_mask
from longreach.ops.reach import reach
from longreach.ops.reference import reference_attention


@pytest.mark.parametrize("name", ["longer than the reach", "padding, window, both ways", "documents", "single query"])
def test_block_mask_holds_the_blocks_in_reach(name):
    tensors, options = CASES[name].inputs(torch.float32)
    q, k, _ = tensors
    found = reach(q, k, tolerance=1e-3, block_m=32, block_n=16, **options)
    masks = {key: value for key, value in options.items() if key != "slopes"}
    mask = reach_block_mask(found, q.shape[2], k.shape[2], **masks)
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
    masks = {key: value for key, value in options.items() if key != "slopes"}
    found = reach(q, k, options["slopes"], **masks)
    out = flex_attention(
        q,
        k,
        v,
        score_mod=_score_mod(options["slopes"], q.shape[:2], k.shape[2] - q.shape[2]),
        block_mask=reach_block_mask(found, q.shape[2], k.shape[2], **masks),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    expected, _ = reference_attention(q, k, v, **options)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # the bias is made in float32


def test_refuses_gradients_on_the_cpu():
    (q, k, v), options = Case().inputs(torch.float32)
    with pytest.raises(ValueError, match=r"^q, k or v needs a gradient"):
        flex_alibi_attention(q.requires_grad_(), k, v, **options)


def test_refuses_empty_tensors():
    (q, k, v), options = Case(queries=0).inputs(torch.float32)
    with pytest.raises(ValueError, match=r"^q .* is empty"):
        flex_alibi_attention(q, k, v, **options)
