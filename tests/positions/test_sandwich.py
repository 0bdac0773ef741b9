import numpy as np
import pytest
import torch

from longreach.positions import AttentionPositions, build_method


def embedding(position, dimension):
    """The sinusoidal embedding whose products Sandwich adds."""
    angles = position / 10000.0 ** (2 * np.arange(1, dimension // 2 + 1) / dimension)
    return np.concatenate((np.sin(angles), np.cos(angles)))


@pytest.mark.parametrize("dimension", [2, 16, 128])
def test_bias_is_the_product_of_two_embeddings_over_the_ratio_of_the_head(size, dimension):
    given = build_method(f"sandwich:dimension={dimension}", size()).attend(torch.arange(300, 304)[None], 304, 304)
    assert given == AttentionPositions(bias=given.bias)
    assert given.bias.dtype == torch.float32
    for h in range(3):
        ratio = 8 * (h + 1) / 3
        for i in range(4):
            for j in range(300 + i + 1):
                product = embedding(300 + i, dimension) @ embedding(j, dimension)
                expected = (product - dimension / 2) / ratio
                # Products of up to 64 are summed in float64; a difference near 0 is left of them.
                assert given.bias[h, i, j].item() == pytest.approx(expected, rel=2.0**-23, abs=1e-12)


def test_learns_nothing(size):
    assert build_method("sandwich", size()).state_dict() == {}


@pytest.mark.parametrize("dimension", [0, 1, 7])
def test_dimensions_that_make_no_pairs(size, dimension):
    with pytest.raises(ValueError, match=f": dimension={dimension}: give an even number of at least 2$"):
        build_method(f"sandwich:dimension={dimension}", size())
