import math

import pytest
import torch
from flat import reference_attention
from slow_attention import CASES, TOLERANCE, slow_attention, with_gradients


@pytest.mark.parametrize("name", CASES)
def test_output_and_lse_follow_the_definition(name):
    tensors, options = CASES[name].inputs()
    out, lse = reference_attention(*tensors, **options)
    expected_out, expected_lse = slow_attention(*tensors, **options)
    torch.testing.assert_close(out, expected_out, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_output_and_lse(name):
    leaves, rebuilt = with_gradients(*CASES[name].inputs())

    def outputs(q, k, v, *extra):
        out, lse = reference_attention(q, k, v, **rebuilt(*extra))
        return out, lse.masked_fill(lse == -math.inf, 0.0)  # finite differences cannot take -inf

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["more queries, slopes", "padding everywhere", "bias that hides"])
def test_rows_without_keys_are_zero_and_have_zero_gradients(name):
    tensors, options = CASES[name].inputs()
    q, k, v = (x.requires_grad_() for x in tensors)
    out, lse = reference_attention(q, k, v, **options)
    empty = lse == -math.inf
    assert 0 < empty.sum() < empty.numel()
    assert torch.all(out[empty] == 0)
    (out.sum() + lse.sum()).backward()
    assert torch.all(q.grad[empty] == 0)
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_no_key_at_all():
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 0, 4)
    out, lse = reference_attention(q, k, k, slopes=torch.ones(2))
    assert torch.equal(out, torch.zeros(1, 2, 3, 4))
    assert torch.equal(lse, torch.full((1, 2, 3), -math.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_the_dtype_of_q(dtype):
    tensors, options = CASES["all at once"].inputs(dtype)
    out, lse = reference_attention(*tensors, **options)
    assert out.dtype == lse.dtype == dtype


def test_float16_distances_past_its_range_leave_slope_zero_alone():
    key_length = 65504 + 100  # the largest float16 and more
    k = torch.zeros(1, 2, key_length, 1, dtype=torch.float16)
    hidden = torch.ones(1, key_length, dtype=torch.bool)
    hidden[:, [0, -1]] = False
    _, lse = reference_attention(k[:, :, :1], k, k, slopes=torch.tensor([0.0, 1.0]), key_padding_mask=hidden)
    expected = torch.tensor([math.log(2), 0.0])
    torch.testing.assert_close(lse.flatten().float(), expected, rtol=torch.finfo(torch.float16).eps, atol=0)
