import math

import pytest
import torch

from longreach.positions import build_method

R1, R2 = [0.3, 1.0, 1.7], [0.2, 0.9, 1.5]


def method_of(kernel, size):
    """With R1 and R2 for its three heads."""
    method = build_method(f"kerple:kernel={kernel}", size()).double()
    with torch.no_grad():
        method.log_r1.copy_(torch.tensor(R1).double().log())
        r2 = torch.tensor(R2).double()
        method.raw_r2.copy_(r2.log() if kernel == "log" else (r2 / 2).logit())
    return method


@pytest.mark.parametrize("kernel", ["log", "power"])
def test_bias_is_the_equation(size, kernel):
    bias = method_of(kernel, size).attend(torch.arange(200, 205)[None], 205, 205).bias
    assert bias.shape == (3, 5, 205)
    for h, (r1, r2) in enumerate(zip(R1, R2, strict=True)):
        for i in range(5):
            for j in range(200 + i + 1):  # attention hides the others
                distance = 200 + i - j
                expected = -r1 * (math.log(1 + r2 * distance) if kernel == "log" else distance**r2)
                # R1 and R2 are as float32 has them; 205^1.5 is 2935.
                assert bias[h, i, j].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("kernel", "ends"), [("log", (2.0, 1.0)), ("power", (1.0, 2.0))])
def test_starts_as_the_authors_do_and_learns_what_stays_in_bounds(size, kernel, ends):
    torch.manual_seed(0)
    method = build_method(f"kerple:kernel={kernel}", size(num_heads=500))
    r1 = method.log_r1.exp()
    r2 = method.raw_r2.exp() if kernel == "log" else 2 * method.raw_r2.sigmoid()
    for values, end in zip((r1, r2), ends, strict=True):
        assert 0 < values.min() <= values.max() <= end * (1 + 1e-6)
        # The mean of 500 draws from 0 to `end`, within five standard deviations of it.
        assert abs(values.mean() - end / 2) < 5 * end / math.sqrt(12 * 500)
    method.attend(torch.arange(20)[None], 20, 20).bias.sum().backward()
    for parameter in method.parameters():
        assert (parameter.grad != 0).all()
        assert parameter.grad.isfinite().all()  # of 0^r2 too


def test_power_of_one_is_alibi(size):
    method = method_of("power", size)
    with torch.no_grad():
        method.raw_r2.zero_()
    bias = method.attend(torch.arange(9)[None], 9, 9).bias[:, -1]
    slopes = torch.tensor(R1).double()[:, None]
    torch.testing.assert_close(bias, -slopes * torch.arange(8, -1, -1))
