import torch

from longreach.positions import AttentionPositions, PositionMethod


def test_the_base_class_does_nothing():
    method = PositionMethod()
    embeddings = torch.randn(2, 3, 4)
    assert method.embed(embeddings, torch.arange(3)[None]) is embeddings
    assert method.attend(torch.arange(3)[None], 3, 3) == AttentionPositions(None, None, None)
    assert (method.max_length, method.draw(2, 3), method.depends_on_length) == (None, None, False)
