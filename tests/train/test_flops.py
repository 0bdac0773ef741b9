import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.train.flops import published_peak
from longreach.train.loop import decoder_trainee

MODEL = ModelConfig(
    vocab_size=40, method="none", train_length=8, longest_length=64, num_layers=2, num_heads=2, d_model=16
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": False}, {"method": "learned"}, {"num_kv_heads": 1, "activation": "swiglu"}],
    ids=str,
)
def test_the_formula_counts_what_is_computed(changes):
    model = Decoder(dataclasses.replace(MODEL, **changes))
    tokens = torch.randint(40, (3, 8))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # products that are counted
        model.loss(tokens, tokens).backward()
    assert decoder_trainee(model).flops(8) * tokens.numel() == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "bf16", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989.4e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA A100-SXM4-80GB", True, 312e12),
        ("NVIDIA L4", True, 121e12),
        ("NVIDIA L40S", True, 362e12),
        ("NVIDIA L40", True, None),
        ("NVIDIA H200", False, None),
    ],
)
def test_a_peak_is_that_of_the_data_sheet_in_bf16_alone(monkeypatch, name, bf16, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert published_peak(torch.device("cuda"), bf16) == peak
    assert published_peak(torch.device("cpu"), bf16) is None
