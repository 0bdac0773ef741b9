"""What kind a CPU is of."""

import pytest
import torch

from longreach.ops import processor
from longreach.ops.cpu import onednn
from longreach.ops.crossovers import CROSSOVERS


@pytest.mark.parametrize(
    ("capability", "found", "kind"),
    [
        ("AVX512", {"amx_bf16": True}, "AMX"),
        ("AVX512", {"amx_bf16": False}, "AVX-512"),
        ("AVX512_VNNI", {}, "AVX-512"),
        ("AVX2", {"amx_bf16": True}, "AVX2"),  # held to it
        ("DEFAULT", {"architecture": "aarch64"}, "AVX2"),
        ("SVE256", {"architecture": "aarch64"}, "AVX2"),
    ],
)
def test_class_of_processors(capability, found, kind, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert processor._class() == kind
    assert kind in CROSSOVERS


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("AVX512_CORE", "AVX-512"),
        ("SSE41", "AVX-512"),
        ("no such name", "AMX"),
        ("avx512_core_bf16", "AVX-512"),
        ("AVX512_CORE_AMX", "AMX"),
        ("AVX10_1_512_AMX_FP16", "AMX"),
        ("DEFAULT", "AMX"),
        ("", "AMX"),
    ],
)
def test_matrix_units_are_left_to_whom_onednn_is_told_to_leave_them(told, kind, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", told)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert processor._class() == kind


@pytest.mark.parametrize(
    ("name", "kind", "is_fast"),
    [
        ("AMD EPYC 9354", "AVX-512", True),
        ("", "AVX-512", True),
        ("Intel Xeon Gold 6230", "AVX-512", False),
        ("AMD EPYC 7763", "AVX2", False),
        ("Intel Xeon", "AMX", False),
    ],
)
def test_onednn_is_fast_where_mkl_is_not(name, kind, is_fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    monkeypatch.setattr(onednn, "CPU", kind)
    assert onednn._is_fast() == (is_fast and torch.backends.mkldnn.is_available())
