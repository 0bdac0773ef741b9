import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longreach.ops.alibi import alibi_distance
from longreach.positions import ModelSize, build_method
from longreach.positions.t5 import T5, T5Options

SIZE = ModelSize(d_model=24, num_heads=3, head_dim=8, train_length=16, longest_length=64)


def bucket(distance, num_buckets=32, max_distance=128):
    """floor(log(d / exact) / log(max / exact) * rest) + exact, found by comparing powers of whole numbers."""
    exact = num_buckets // 2
    rest = num_buckets - exact
    if distance < exact:
        return distance
    step = 0
    while step + 1 < rest and distance**rest * exact ** (step + 1) >= max_distance ** (step + 1) * exact**rest:
        step += 1
    return exact + step


def test_buckets_at_distances_0_to_1000():
    method = build_method("t5", SIZE)
    assert method.bucket(torch.arange(1001)).tolist() == [bucket(distance) for distance in range(1001)]


def test_golden_buckets():
    # From the published implementation: 16 exact buckets, then 16 up to distance 128.
    borders = {0: 0, 15: 15, 16: 16, 18: 16, 19: 17, 20: 17, 21: 18, 23: 18, 24: 19, 64: 26, 112: 30, 113: 31, 128: 31}
    method = build_method("t5", SIZE)
    assert method.bucket(torch.tensor(list(borders))).tolist() == list(borders.values())


@settings(deadline=None)
@given(st.integers(2, 64), st.integers(1, 300))
@example(9, 124)  # distances 8, 16 and 64 stand on borders: 128 = 4 * 2^5
@example(20, 310)
def test_buckets_of_any_options(num_buckets, beyond):
    max_distance = num_buckets // 2 + beyond
    method = T5(T5Options(num_buckets=num_buckets, max_distance=max_distance), SIZE)
    distances = list(range(max_distance + 3))
    expected = [bucket(distance, num_buckets, max_distance) for distance in distances]
    assert method.bucket(torch.tensor(distances)).tolist() == expected


def test_bias_is_the_scalar_of_head_and_bucket():
    method = build_method("t5", SIZE)
    with torch.no_grad():
        method.bias.weight.normal_(generator=torch.Generator().manual_seed(2))
    bias = method.attend(torch.arange(200, 205)[None], 205, 205).bias
    assert bias.shape == (3, 5, 205)
    distance = alibi_distance(5, 205)
    for row in range(5):
        for key in range(205):
            if distance[row, key] >= 0:  # attention hides the others
                assert torch.equal(bias[:, row, key], method.bias.weight[bucket(int(distance[row, key]))])


def test_starts_as_no_bias_and_learns():
    method = build_method("t5", SIZE)
    bias = method.attend(torch.arange(20)[None], 20, 20).bias
    assert torch.all(bias == 0)
    bias.sum().backward()
    assert (method.bias.weight.grad[:17] > 0).all()  # distances 0 to 19 fill 18 buckets
    assert [name for name, _ in method.named_parameters()] == ["bias.weight"]
    assert method.bias.weight.shape == (32, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("t5:num_buckets=1", "num_buckets=1: give at least 2"),
        ("t5:max_distance=16", "max_distance=16: give more than"),
        ("t5:num_buckets=300", "max_distance=128: give more than"),
    ],
)
def test_options_out_of_range(spec, message):
    with pytest.raises(ValueError, match=f"^method=.*: {message}"):
        build_method(spec, SIZE)
