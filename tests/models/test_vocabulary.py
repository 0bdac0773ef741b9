import pytest
import torch

from longreach.models.config import ModelConfig
from longreach.models.vocabulary import Vocabulary


@pytest.fixture
def hidden():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


def config(**fields):
    return ModelConfig(vocab_size=20, train_length=8, num_heads=2, d_model=32, **fields)


def test_tied_vocabulary_is_one_matrix(hidden):
    vocabulary = Vocabulary(config())
    assert [tuple(p.shape) for p in vocabulary.parameters()] == [(20, 32)]
    weight = vocabulary.embedding.weight
    assert torch.equal(vocabulary.embed(torch.tensor([[3, 19]])), weight[None, [3, 19]])
    torch.testing.assert_close(vocabulary.logits(hidden), hidden @ weight.T)


def test_untied_vocabulary_is_two(hidden):
    vocabulary = Vocabulary(config(tied_embeddings=False))
    assert [tuple(p.shape) for p in vocabulary.parameters()] == [(20, 32), (20, 32)]
    assert torch.equal(vocabulary.embed(torch.tensor([[3]])), vocabulary.embedding.weight[None, [3]])
    torch.testing.assert_close(vocabulary.logits(hidden), hidden @ vocabulary.output.weight.T)


def test_plain_loss_is_the_mean_nll_in_float32(hidden):
    vocabulary = Vocabulary(config()).bfloat16()
    rows, targets = hidden.flatten(0, 1).bfloat16(), torch.arange(15)
    loss = vocabulary.loss(rows, targets)
    assert loss.dtype == torch.float32
    expected = -vocabulary.logits(rows).double().log_softmax(-1)[torch.arange(15), targets].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
