"""What kind a CPU is of."""

import pytest
import torch

from longreach.ops import processor
from longreach.ops.crossovers import CROSSOVERS


@pytest.mark.parametrize(
    ("capability", "found", "kind"),
    [
        ("AVX512", {"cpu_name": "Intel Xeon", "amx_bf16": True}, "AMX"),
        ("AVX512", {"cpu_name": "Intel Xeon Gold 6230", "amx_bf16": False}, "AVX2"),
        ("AVX512", {"cpu_name": "AMD EPYC 9354", "amx_bf16": False}, "AVX-512"),
        ("AVX512_VNNI", {}, "AVX-512"),
        ("AVX2", {"cpu_name": "Intel Xeon", "amx_bf16": True}, "AVX2"),  # held to it
        ("AVX2", {"cpu_name": "AMD EPYC 7763"}, "AVX2"),
        ("DEFAULT", {"architecture": "aarch64"}, "AVX2"),
        ("SVE256", {"architecture": "aarch64"}, "AVX2"),
    ],
)
def test_class_of_processors(capability, found, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert processor._class() == kind
    assert kind in CROSSOVERS
