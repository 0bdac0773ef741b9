import numpy as np
import pytest
import torch

from longreach.positions import AttentionPositions, build_method


def waves(positions, d_model):
    """PE(t, 2i) = sin(t / 10000^(2i / C)), PE(t, 2i + 1) = cos of the same (Vaswani et al., Section 3.5)."""
    out = np.zeros((*positions.shape, d_model))
    for index in np.ndindex(positions.shape):
        for i in range(d_model // 2):
            angle = positions[index] / 10000 ** (2 * i / d_model)
            out[index][2 * i], out[index][2 * i + 1] = np.sin(angle), np.cos(angle)
    return torch.from_numpy(out)


@pytest.mark.parametrize("name", ["sinusoidal", "sinusoidal-shifted"])
def test_adds_the_papers_waves_over_the_root_of_the_width(name, size):
    method = build_method(name, size())
    positions = torch.tensor([[0, 1, 2, 30], [7, 500, 4000, 60000]])
    embeddings = torch.randn(2, 4, 24, dtype=torch.float64)
    added = (method.embed(embeddings, positions) - embeddings) * 24**0.5
    # Angles up to 60000 in float32: a frequency in error by a few units in the last place turns by that times 60000.
    tolerance = 60000 * 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(added, waves(positions.numpy(), 24), rtol=0, atol=tolerance)
    near = added[0, :3], waves(positions[0, :3].numpy(), 24)
    torch.testing.assert_close(*near, rtol=0, atol=2 * 4 * torch.finfo(torch.float32).eps)


def test_keeps_the_dtype_of_the_embeddings_and_computes_in_float32(size):
    method = build_method("sinusoidal", size())
    positions = torch.tensor([[1001, 1002]])
    low = method.embed(torch.zeros(1, 2, 24, dtype=torch.bfloat16), positions)
    high = method.embed(torch.zeros(1, 2, 24), positions)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, high.bfloat16())  # positions in bfloat16 would be one and the same


def test_gives_attention_nothing_and_learns_nothing(size):
    method = build_method("sinusoidal", size())
    assert method.attend(torch.arange(3)[None], 3, 3) == AttentionPositions()
    assert list(method.parameters()) == []
    assert method.max_length is None


def test_only_the_shifted_form_shifts_training(size):
    assert build_method("sinusoidal", size()).draw(500, 3) is None
    torch.manual_seed(0)
    draws = build_method("sinusoidal-shifted", size()).draw(500, 3)
    assert torch.equal(draws - draws[:, :1], torch.arange(3).expand(500, -1))
    assert (draws[:, 0].min(), draws[:, 0].max()) == (0, 64)


def test_odd_width(size):
    with pytest.raises(ValueError, match=r"^d_model=25 with sinusoidal positions: give an even number$"):
        build_method("sinusoidal", size(d_model=25))
