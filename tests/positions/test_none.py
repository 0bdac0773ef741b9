import pytest
import torch

from longreach.positions import AttentionPositions, build_method


def test_adds_nothing(size):
    method = build_method("none", size())
    embeddings = torch.randn(2, 3, 24)
    assert method.embed(embeddings, torch.arange(3)[None]) is embeddings
    assert method.attend(torch.arange(3)[None], 3, 3) == AttentionPositions()
    assert list(method.parameters()) == []


def test_has_no_options(size):
    with pytest.raises(ValueError, match=r"^method='none:base=1': 'base=1' is no option of none, .* one of none$"):
        build_method("none:base=1", size())
