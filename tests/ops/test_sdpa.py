import pytest
import torch
from flat import reference_attention, sdpa_attention
from slow_attention import CASES, TOLERANCE, Case, slow_attention, with_gradients

import longreach.ops.sdpa as module
from longreach.ops.alibi import alibi_slopes


@pytest.mark.parametrize("name", CASES)
def test_output_follows_the_definition(name):
    tensors, options = CASES[name].inputs()
    expected, _ = slow_attention(*tensors, **options)
    torch.testing.assert_close(sdpa_attention(*tensors, **options), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    leaves, rebuilt = with_gradients(*CASES[name].inputs())
    assert torch.autograd.gradcheck(
        lambda q, k, v, *extra: sdpa_attention(q, k, v, **rebuilt(*extra)), leaves, fast_mode=True
    )


def _alibi(heads):
    return {"slopes": lambda _: alibi_slopes(heads)}


LONGER = {
    "plain": Case(heads=3, kv_heads=3, queries=67, keys=67, head_dim=16),
    "alibi": Case(heads=3, kv_heads=3, queries=67, keys=67, head_dim=16, options=_alibi(3)),
    "chunk": Case(heads=6, kv_heads=2, queries=19, keys=301, head_dim=16, options=_alibi(6)),
    "documents": Case(
        heads=2,
        kv_heads=1,
        queries=65,
        keys=65,
        head_dim=32,
        options={**_alibi(2), "causal": False, "window_size": 20, "cu_seqlens": torch.tensor([0, 1, 30, 65])},
    ),
    "padding and bias": Case(
        heads=2,
        kv_heads=2,
        queries=33,
        keys=63,
        head_dim=8,
        options={
            "key_padding_mask": torch.arange(63).expand(2, 63) < torch.tensor([[40], [0]]),
            "bias": lambda generator: torch.randn(2, 33, 63, generator=generator),
        },
    ),
}


def _output_and_gradients(function, tensors, options, dtype):
    """Output, then the gradient of each tensor, all as float64, computed in dtype."""
    leaves, rebuilt = with_gradients([x.to(dtype) for x in tensors], options)
    out = function(*leaves[:3], **rebuilt(*leaves[3:]))
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)  # a loss without symmetries
    (out.double() * weights).sum().backward()
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LONGER)
def test_error_against_the_plain_reference_in_the_same_dtype(name, dtype):
    tensors, options = LONGER[name].inputs(dtype)
    exact = _output_and_gradients(reference_attention, tensors, options, torch.float64)
    plain = _output_and_gradients(reference_attention, tensors, options, dtype)
    ours = _output_and_gradients(sdpa_attention, tensors, options, dtype)
    _assert_within_the_rule(exact, plain, ours, dtype)


def _assert_within_the_rule(exact, plain, ours, dtype):
    for number, (golden, reference, mine) in enumerate(zip(exact, plain, ours, strict=True)):
        factor = 2 if number == 0 else 3
        # Storing the exact result in dtype already costs half a unit in the last place of its largest value.
        floor = golden.abs().max() * torch.finfo(dtype).eps / 2
        for measure in (torch.max, torch.mean):
            allowed = factor * measure((reference - golden).abs()) + floor
            assert measure((mine - golden).abs()) <= allowed, (number, measure.__name__)


def test_biases_of_distant_keys_are_not_rounded_to_the_dtype_of_q():
    key_length, slope = 1024, 2.0**-6
    zeros = torch.zeros(1, 1, key_length, key_length, dtype=torch.bfloat16)
    eye = torch.eye(key_length, dtype=torch.bfloat16)[None, None]  # the output is the row of weights
    weights = sdpa_attention(zeros[:, :, :1], zeros, eye, slopes=torch.tensor([slope]))[0, 0, 0].double()
    bias = -slope * torch.arange(key_length - 1, -1, -1, dtype=torch.float64)
    tolerance = torch.finfo(torch.bfloat16).eps  # the weight and the output are each rounded by half of it
    assert ((weights / bias.softmax(0) - 1).abs() <= tolerance).all()
    rounded = bias.bfloat16().double().softmax(0)
    assert (rounded / bias.softmax(0) - 1).abs().max() > 2 * tolerance  # what this test would catch


def test_plain_attention_takes_no_mask(monkeypatch):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(*args, **kwargs):
        calls.append((kwargs.get("attn_mask"), kwargs.get("is_causal", False)))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    for name in ("causal", "bidirectional", "plain decoding step", "grouped, plain"):
        tensors, options = CASES[name].inputs()
        sdpa_attention(*tensors, **options)
    assert calls == [(None, True), (None, False), (None, False), (None, True)]


@pytest.fixture
def calls(monkeypatch):
    """Arguments of all calls of PyTorch's function: the dtypes of q, k, v, and that of the mask."""
    recorded = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(*args, **kwargs):
        mask = kwargs.get("attn_mask")
        recorded.append(({x.dtype for x in args}, None if mask is None else mask.dtype))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    return recorded


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_kernels_of_devices_meet_no_mask_of_another_dtype(calls, device):
    """What GPUs do with a float32 mask beside half types is not to be trusted; "meta" stands for them."""
    q = torch.ones(1, 2, 16, 8, dtype=torch.float16, device=device)
    slopes = torch.ones(2, device=device)
    for options in ({"slopes": slopes}, {"slopes": slopes, "causal": False}, {"window_size": 2}, {}):
        assert sdpa_attention(q, q, q, **options).dtype == torch.float16
    double = q.double()
    assert sdpa_attention(double, double, double, slopes=slopes).dtype == torch.float64
    half, wide = {torch.float16}, {torch.float32}
    with_slopes = (half if device == "cpu" else wide, torch.float32)
    assert calls == [with_slopes, with_slopes, (half, torch.bool), (half, None), ({torch.float64}, torch.float64)]


@pytest.mark.parametrize("name", LONGER)
def test_error_where_masks_are_met_in_float32(monkeypatch, name):
    """The way of other devices than the CPU, on the CPU: nothing but the result is rounded to the half type."""
    monkeypatch.setattr(module, "TAKES_WIDE_MASKS", ())
    tensors, options = LONGER[name].inputs(torch.bfloat16)
    exact = _output_and_gradients(reference_attention, tensors, options, torch.float64)
    plain = _output_and_gradients(reference_attention, tensors, options, torch.bfloat16)
    ours = _output_and_gradients(sdpa_attention, tensors, options, torch.bfloat16)
    _assert_within_the_rule(exact, plain, ours, torch.bfloat16)
