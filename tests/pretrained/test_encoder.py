import pytest
import torch

from longreach import alibi_slopes
from longreach.positions.scaling import Scaling
from longreach.pretrained.encoder import symmetric_attention


def inputs(length=40, heads=6):
    return torch.randn(3, 2, heads, length, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dense(q, k, v, slopes, scale):
    distance = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs().double()
    return (scale * q @ k.mT - slopes.double()[:, None, None] * distance).softmax(-1) @ v


def test_bias_is_symmetric():
    q, k, v = inputs()
    torch.testing.assert_close(symmetric_attention(q, k, v), dense(q, k, v, alibi_slopes(6), 8**-0.5))
    own = torch.rand(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(symmetric_attention(q, k, v, slopes=own, scale=0.3), dense(q, k, v, own, 0.3))


def test_each_row_is_scaled_by_its_own_length():
    q, k, v = inputs()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 25:] = 0
    out = symmetric_attention(q, k, v, attention_mask=mask, scaling=Scaling("linear", 10))
    for row, length in ((0, 25), (1, 40)):
        alone = (x[row : row + 1, :, :length] for x in (q, k, v))
        expected = dense(*alone, alibi_slopes(6) * 10 / length, 8**-0.5)
        torch.testing.assert_close(out[row : row + 1, :, :length], expected)


def test_gradients_flow():
    q, k, v = (x.requires_grad_() for x in inputs(12).unbind())
    symmetric_attention(q, k, v, scaling=Scaling("ntk", 4)).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, k, v))


def test_a_mask_with_holes_is_refused():
    mask = torch.ones(2, 40)
    mask[1, 7] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        symmetric_attention(*inputs(), attention_mask=mask)
