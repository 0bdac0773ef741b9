"""What docs/conformance.md says of transformers, asked again in short."""

import importlib.util
from pathlib import Path

import pytest
import torch

from longreach.conformance import DIALECTS, check_attention, check_slopes

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.transformers  # what docs/conformance.py imports is seen by no look at this file


@pytest.fixture(scope="module")
def conformance():
    """docs/conformance.py as a module."""
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "docs" / "conformance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(fn, dialect, dtype=torch.float32, length=40):
    return check_attention(fn, dialect=DIALECTS[dialect], dtype=dtype, head_counts=[12], length=length)


def test_bloom_and_mpt_and_falcon_with_sdpa_are_right_in_float32(conformance):
    asked(conformance.bloom("eager"), "bloom").raise_if_failed()
    asked(conformance.mpt("eager"), "mpt").raise_if_failed()
    asked(conformance.falcon("sdpa"), "falcon").raise_if_failed()


def test_falcon_adds_its_bias_twice_in_eager_attention(conformance):
    report = asked(conformance.falcon("eager"), "falcon")
    assert {case.diagnosis for case in report.failures} == {"the bias is added twice"}
    assert "passed" not in {case.outcome for case in report.cases}


def test_mpt_stops_beyond_its_configured_length(conformance):
    length = conformance.CONFIGURED_LENGTH + 1
    report = asked(conformance.mpt("eager"), "mpt", length=length)
    assert {case.name for case in report.failures} == {case.name for case in report.cases if str(length) in case.name}
    assert all(case.diagnosis.startswith("raises RuntimeError") for case in report.failures)


def test_bloom_rounds_scores_in_bfloat16(conformance):
    report = asked(conformance.bloom("eager"), "bloom-bf16", torch.bfloat16, length=300)
    words = "scores are rounded once a bias of absolute positions, from the first key, is in them"
    assert words in {case.diagnosis for case in report.failures}


def test_falcons_slopes_are_right_up_to_8_heads_only(conformance):
    bias = conformance.built_from_mask(conformance.modeling_falcon, torch.float32)
    report = check_slopes(conformance.slopes_of(bias), head_counts=range(1, 20))
    assert len(report.failures) == 11
    assert {case.diagnosis for case in report.failures} == {"slopes rounded to bfloat16"}


def test_the_page_is_about_these_versions_rows(conformance):
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    for words in (
        "## transformers 5.",
        "| BLOOM, eager |",
        "| MPT, eager |",
        "| Falcon, eager |",
        "| longreach, cpu |",
    ):
        assert words in page
    for name in DIALECTS:
        assert f"`{name}`" in page
