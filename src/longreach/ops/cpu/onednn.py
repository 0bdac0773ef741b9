"""oneDNN's products of float32 matrices, where they are faster than those of MKL that PyTorch takes."""

import torch
from torch import Tensor

from longreach.ops.processor import CPU


def _is_fast() -> bool:
    is_of_intel = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")
    return torch.backends.mkldnn.is_available() and CPU == "AVX-512" and not is_of_intel


IS_FAST = _is_fast()
"""Whether they can be had where they are fast: twice as fast as MKL's on AVX-512 that MKL does not favour, that of AMD
or whoever is not Intel. On AVX2, and on Intel's, the two are alike."""


def product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a b^T + added, of float32 a (M, K), b (N, K) and `added` (N,).

    b, or its transpose, is dense in memory: others oneDNN multiplies by its reference code, a hundred times slower.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, added, "none", [], "")
    return out
