import cmath
import math
import re

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longreach.positions import ModelSize, build_method, rotate

SIZE = ModelSize(d_model=24, num_heads=3, head_dim=8, train_length=16, longest_length=64)
EPS = torch.finfo(torch.float32).eps


def frequencies(spec, length=16, size=SIZE):
    """The angle by which each pair turns from one position to the next."""
    cos, sin = build_method(spec, size).attend(torch.tensor([[1]]), length, length).rotation
    half = size.head_dim // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    assert torch.equal(sin[..., :half], sin[..., half:])
    return torch.atan2(sin, cos).flatten()[:half].double()


def rotated(spec, x, positions, length=16):
    rotation = build_method(spec, SIZE).attend(torch.as_tensor(positions), length, length).rotation
    return rotate(x, rotation)


@pytest.mark.parametrize("base", [10000.0, 500000.0, 2.0])
def test_turns_each_pair_as_a_complex_number(base):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 8, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 300], [5, 5, 60, 7]])
    out = rotated(f"rotary:base={base}", x, positions)
    expected = torch.empty_like(x)
    for b, h, t in np.ndindex(2, 3, 4):
        for i in range(4):
            pair = complex(x[b, h, t, i], x[b, h, t, i + 4])
            turned = pair * cmath.exp(1j * float(positions[b, t]) * base ** (-2 * i / 8))
            expected[b, h, t, i], expected[b, h, t, i + 4] = turned.real, turned.imag
    # float32 angles up to 300, from a power that is a few units off.
    torch.testing.assert_close(out, expected, rtol=0, atol=300 * 8 * EPS)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_scores_depend_on_the_distance_alone(query, key, shift):
    generator = torch.Generator().manual_seed(query)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)
    here = rotated("rotary", q, [[query]]) * rotated("rotary", k, [[key]])
    there = rotated("rotary", q, [[query + shift]]) * rotated("rotary", k, [[key + shift]])
    # Each angle, up to 4000, is rounded to half a unit of float32 in each of four rotations.
    tolerance = 4 * 4000 * EPS * float(q.norm() * k.norm())
    assert abs(here.sum() - there.sum()) < tolerance


def test_keeps_lengths_and_the_dtype():
    x = torch.randn(2, 3, 4, 8)
    out = rotated("rotary", x, torch.arange(4)[None])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=8 * EPS, atol=0)
    assert torch.equal(out[:, :, 0], x[:, :, 0])  # position 0 turns nothing
    low = rotated("rotary", x.bfloat16(), torch.tensor([[1000, 1001, 1002, 1003]]))
    assert low.dtype == torch.bfloat16
    assert len(torch.unique(low[0, 0] / x.bfloat16()[0, 0], dim=0)) == 4  # positions were not rounded


def test_rotation_shape_and_dtype():
    cos, sin = build_method("rotary", SIZE).attend(torch.arange(10).view(2, 5), 5, 5).rotation
    assert cos.shape == sin.shape == (2, 1, 5, 8)
    assert cos.dtype == sin.dtype == torch.float32


@pytest.mark.parametrize("factor", [1.5, 2.0, 8.0])
def test_linear_scaling_divides_positions(factor):
    scaled = frequencies(f"rotary:scaling=linear-fixed={factor}")
    torch.testing.assert_close(scaled, frequencies("rotary") / factor, rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("factor", [1.5, 2.0, 8.0])
def test_ntk_keeps_the_fastest_and_interpolates_the_slowest(factor):
    plain = frequencies("rotary")
    scaled = frequencies(f"rotary:scaling=ntk-fixed={factor}")
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / factor, rtol=16 * EPS, atol=0)
    ratio = scaled / plain
    assert (ratio.diff() <= 0).all()  # and goes over from one to the other


def yarn_by_the_paper(base, head_dim, train_length, factor):
    """NTK-by-parts with its ramp over pairs, as in the authors' code, and the factor of queries and keys alike."""
    borders = [head_dim * math.log(train_length / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1)]
    low, high = max(math.floor(borders[0]), 0), min(math.ceil(borders[1]), head_dim - 1)
    expected = []
    for i in range(head_dim // 2):
        frequency = base ** (-2 * i / head_dim)
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        expected.append(frequency * (1 - interpolated) + frequency / factor * interpolated)
    return expected, 0.1 * math.log(factor) + 1


YARNS = [(10000.0, 8, 16, 4.0), (10000.0, 64, 2048, 8.0), (500000.0, 128, 8192, 2.0), (10000.0, 64, 128, 16.0)]


@pytest.mark.parametrize(("base", "head_dim", "train_length", "factor"), YARNS)
def test_yarn(base, head_dim, train_length, factor):
    size = ModelSize(d_model=head_dim, num_heads=1, head_dim=head_dim, train_length=train_length, longest_length=9999)
    expected, attention_factor = yarn_by_the_paper(base, head_dim, train_length, factor)
    for scaling, length in ((f"yarn-fixed={factor}", 3), ("yarn", int(train_length * factor))):
        method = build_method(f"rotary:base={base}:scaling={scaling}", size)
        torch.testing.assert_close(
            method.frequencies(length).double(), torch.tensor(expected).double(), rtol=2e-6, atol=0
        )
        factor_of_logits = method.attend(torch.tensor([[1]]), 1, length).logit_factor
        assert factor_of_logits == pytest.approx(attention_factor**2, rel=1e-12)


@pytest.mark.parametrize(("base", "head_dim", "train_length", "factor"), YARNS)
def test_yarn_is_that_of_transformers(base, head_dim, train_length, factor):
    rope = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": train_length,
    }
    config = transformers.LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config)
    size = ModelSize(d_model=head_dim, num_heads=1, head_dim=head_dim, train_length=train_length, longest_length=9999)
    method = build_method(f"rotary:base={base}:scaling=yarn-fixed={factor}", size)
    torch.testing.assert_close(method.frequencies(1), theirs.inv_freq, rtol=1e-5, atol=0)
    attend = method.attend(torch.arange(50)[None], 50, 50)
    cos, sin = theirs(torch.zeros(1, 50, head_dim), torch.arange(50)[None])
    factor_of_both = attend.logit_factor**0.5
    assert theirs.attention_scaling == pytest.approx(factor_of_both, rel=1e-5)
    for x, y in zip(attend.rotation, (cos, sin), strict=True):
        torch.testing.assert_close(x[:, 0] * factor_of_both, y, rtol=0, atol=1e-5)


def test_yarn_is_no_change_up_to_the_training_length():
    plain = build_method("rotary", SIZE).attend(torch.arange(16)[None], 16, 16)
    scaled = build_method("rotary:scaling=yarn", SIZE).attend(torch.arange(16)[None], 16, 16)
    assert scaled.logit_factor == 1.0
    assert all(map(torch.equal, scaled.rotation, plain.rotation))


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_without_a_factor_the_length_gives_it(scaling):
    spec = f"rotary:scaling={scaling}"
    assert build_method(spec, SIZE).depends_on_length
    assert not build_method(f"{spec}-fixed=2", SIZE).depends_on_length
    assert not build_method("rotary", SIZE).depends_on_length
    plain = frequencies("rotary")
    assert torch.equal(frequencies(spec, length=3), plain)
    assert torch.equal(frequencies(spec, length=16), plain)
    assert torch.equal(frequencies(spec, length=64), frequencies(f"{spec}-fixed=4"))


def test_a_fixed_factor_holds_at_every_length():
    spec = "rotary:scaling=linear-fixed=2"
    assert torch.equal(frequencies(spec, length=3), frequencies(spec, length=64))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rotary:base=1", r"base=1\.0: "),
        ("rotary:base=nan", "base=nan: "),
        ("rotary:base=inf", "base=inf: "),
        ("rotary:scaling=cubic", "scaling='cubic': give one of none, linear, "),
        ("rotary:scaling=yarn-fixed=1", r"factor=1\.0: "),
        ("rotary:scaling=ntk=2", "scaling='ntk=2': give one of none, "),
        ("rotary:scaling=ntk-fixed=0", r"factor=0\.0: "),
        ("rotary:scaling=ntk-fixed=0.5", r"factor=0\.5: "),
        ("rotary:scaling=ntk-fixed=nan", "factor=nan: give a finite number"),
    ],
)
def test_options_out_of_range(spec, message):
    with pytest.raises(ValueError, match=f"^method='{re.escape(spec)}': .*{message}"):
        build_method(spec, SIZE)


@pytest.mark.parametrize(("spec", "head_dim"), [("rotary", 7), ("rotary:scaling=ntk", 2), ("rotary:scaling=yarn", 2)])
def test_head_dim_that_cannot_be_rotated(size, spec, head_dim):
    with pytest.raises(ValueError, match=f"^head_dim={head_dim} with "):
        build_method(spec, size(head_dim=head_dim))
