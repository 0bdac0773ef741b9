"""Floating point operations (FLOPs): what training on a token takes, and what devices can do in a second."""

import re
from collections.abc import Set

import torch
from torch import Tensor, nn

PEAKS: dict[str, float] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 HBM3": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
}
"""Words of a device's name -> FLOP/s of its matrix units in bf16, without sparsity, by NVIDIA's data sheets."""


def training_flops(weights: int, layers: int, width: int, length: int) -> float:
    """FLOPs of a model for each token of a sequence, forward and backward: 6 weights + 12 layers width length.

    The formula of Chowdhery et al. (2022, arXiv 2204.02311, appendix B). Attention counts as if each token saw all of
    the sequence, whatever is masked or skipped; what is computed again to save memory counts once.

    Args:
        weights: of the matrices that each token is multiplied by; embeddings that are only looked up are none.
        layers: number of blocks.
        width: heads x head_dim.
        length: tokens of a sequence.
    """
    return 6.0 * weights + 12.0 * layers * width * length


def count_matrices(model: nn.Module, looked_up: Set[Tensor]) -> int:
    """The weights of all matrices of a model but those that are only looked up."""
    matrices = (parameter for parameter in model.parameters() if parameter.dim() == 2)
    return sum(parameter.numel() for parameter in matrices if parameter not in looked_up)


def published_peak(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s that a device can reach by `PEAKS`; None where that does not tell, as in float32."""
    if device.type != "cuda" or not bf16:
        return None
    words = set(re.findall(r"\w+", torch.cuda.get_device_name(device)))
    return next((peak for name, peak in PEAKS.items() if words.issuperset(name.split())), None)
