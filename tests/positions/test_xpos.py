import cmath

import numpy as np
import pytest
import torch

from longreach.positions import ModelSize, build_method, rotate

SIZE = ModelSize(d_model=24, num_heads=3, head_dim=8, train_length=16, longest_length=64)
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("spec", "base", "gamma", "unit"), [("xpos", 1e4, 0.4, 512), ("xpos:base=50:gamma=1:unit=30", 50, 1.0, 30)]
)
@pytest.mark.parametrize("first", [0, 500])
def test_scores_are_those_of_decaying_pairs(spec, base, gamma, unit, first):
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 6, 8, generator=generator, dtype=torch.float64)
    attend = build_method(spec, SIZE).attend(torch.arange(first, first + 6)[None], 6, 6)
    scores = (rotate(q, attend.rotation) @ rotate(k, attend.key_rotation).mT)[0, 0]
    for i, j in np.ndindex(6, 6):
        expected = 0.0
        for pair in range(4):
            zeta = (2 * pair / 8 + gamma) / (1 + gamma)
            one, two = complex(q[0, 0, i, pair], q[0, 0, i, pair + 4]), complex(k[0, 0, j, pair], k[0, 0, j, pair + 4])
            turned = one * two.conjugate() * cmath.exp(1j * (i - j) * base ** (-2 * pair / 8))
            expected += turned.real * zeta ** ((i - j) / unit)
        # float32 angles and exponents of up to 506, each a few units off, of products of up to about 10.
        assert scores[i, j].item() == pytest.approx(expected, abs=10 * 506 * 4 * EPS)


def test_what_float32_cannot_hold_is_past_its_end():
    method = build_method("xpos", SIZE)
    last = method.attend(torch.tensor([[method.max_length - 1]]), 1, 1)
    assert last.key_rotation[0].abs().max() < 1e31
    assert last.rotation[0].isfinite().all()
    with pytest.raises(
        ValueError, match=r"^unit=1 with gamma=0\.001 holds 9 positions in float32, below train_length=16"
    ):
        build_method("xpos:unit=1:gamma=0.001", SIZE)


@pytest.mark.parametrize("option", ["gamma=0", "gamma=-1", "unit=0", "base=1"])
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=f": {option}.*: give"):
        build_method(f"xpos:{option}", SIZE)
