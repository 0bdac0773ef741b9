"""What a user writes with the public names, for mypy alone, which `make types` runs: what is right passes its strictest
checks, and it sees each mistake, for an ignore that is not needed is an error.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import longreach

q, k, v = torch.randn(3, 1, 4, 32, 16)
slopes: Tensor = longreach.alibi_slopes(4)
bias: Tensor = longreach.alibi_bias(slopes, 32)
out: Tensor = longreach.attention(q, k, v, slopes=slopes)
pair: tuple[Tensor, Tensor] = longreach.attention(q, k, v, slopes=slopes, return_lse=True)
kept: Tensor = longreach.reach(q, k, slopes).kept
version: str = longreach.__version__
export = longreach.export_mpt


def longer(model: nn.Module, folder: Path) -> None:
    scaling = longreach.Scaling("linear", train_length=2048)
    extended: nn.Module = longreach.extend(model, scaling=scaling)
    with longreach.fixed_length(extended, 8192):
        extended(torch.zeros(1, 1, dtype=torch.int64))
    longreach.save_pretrained(extended, folder)
    longreach.restore(extended)
    longreach.load_pretrained(folder).eval()
    converted: nn.Module = longreach.convert(model, train_length=2048)
    longreach.unconvert(converted)


def vectors(folder: Path) -> None:
    longreach.register_encoders()
    longreach.load_encoder(folder, scaling="linear").encode(["a text"], max_length=8192)
    longreach.unregister_encoders()


def mistakes() -> tuple[Any, ...]:
    without_v = longreach.attention(q, q)  # type: ignore[call-overload]
    of_a_pair = longreach.attention(q, q, q, return_lse=True).shape  # type: ignore[attr-defined]
    no_such_name = longreach.atention  # type: ignore[attr-defined]
    return without_v, of_a_pair, no_such_name
