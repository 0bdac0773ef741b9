import pytest
import torch
import torch.nn.functional as F

from longreach.models.config import ModelConfig
from longreach.models.vocabulary import AdaptiveVocabulary, Vocabulary


@pytest.fixture
def adaptive():
    torch.manual_seed(0)
    return AdaptiveVocabulary(config(adaptive_cutoffs=(4, 9), adaptive_dropout=0.5)).eval()


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


def test_adaptive_bands_and_their_widths(adaptive):
    shapes = {name: tuple(parameter.shape) for name, parameter in adaptive.named_parameters()}
    assert shapes == {
        "head.embedding.weight": (4, 32),
        "head.projection.weight": (32, 32),
        "tails.0.embedding.weight": (5, 8),
        "tails.0.projection.weight": (32, 8),
        "tails.1.embedding.weight": (11, 2),
        "tails.1.projection.weight": (32, 2),
        "classes.weight": (2, 32),
    }


def test_adaptive_embedding_of_every_id(adaptive):
    embedded = adaptive.embed(torch.arange(20)[None])[0]
    bands = [adaptive.head, *adaptive.tails]
    expected = [band.projection.weight @ row for band in bands for row in band.embedding.weight]
    torch.testing.assert_close(embedded, torch.stack(expected))


def test_adaptive_logits_are_the_normalised_log_probabilities_of_two_choices(adaptive, hidden):
    logits = adaptive.logits(hidden)
    assert logits.shape == (3, 5, 20)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 5))
    classes = torch.cat((adaptive.head.embedding.weight, adaptive.classes.weight))
    head = (hidden @ classes.T).softmax(-1)  # 4 words, then a class for each tail
    expected = [head[..., :4]]
    for number, tail in enumerate(adaptive.tails):
        within = (hidden @ tail.projection.weight @ tail.embedding.weight.T).softmax(-1)
        expected.append(head[..., 4 + number, None] * within)
    torch.testing.assert_close(logits.exp(), torch.cat(expected, dim=-1))


@pytest.mark.parametrize(
    "targets",
    [torch.arange(15), torch.zeros(15, dtype=torch.int64), torch.full((15,), 19), torch.tensor([3, 4, 8, 9, 19] * 3)],
    ids=["all bands", "head alone", "last tail alone", "borders"],
)
def test_adaptive_loss_is_the_nll_of_the_logits(adaptive, hidden, targets):
    rows = hidden.flatten(0, 1)
    expected = F.nll_loss(adaptive.logits(rows), targets)
    torch.testing.assert_close(adaptive.loss(rows, targets), expected)


def test_adaptive_gradients_of_loss_and_nll_agree_and_reach_every_weight(adaptive, hidden):
    rows, targets = hidden.flatten(0, 1).requires_grad_(), torch.arange(15)
    leaves = [rows, *(p for name, p in adaptive.named_parameters() if name != "head.projection.weight")]
    ours = torch.autograd.grad(adaptive.loss(rows, targets), leaves)
    expected = torch.autograd.grad(F.nll_loss(adaptive.logits(rows), targets), leaves)
    for one, other in zip(ours, expected, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_adaptive_embeddings_are_tied(adaptive, hidden):
    before = adaptive.logits(hidden)
    with torch.no_grad():
        adaptive.tails[1].embedding.weight[3] += 1.0
    changed = (adaptive.logits(hidden) - before).abs().amax(dim=(0, 1)) > 1e-6
    assert changed[9 + 3]
    assert not changed[:9].any()  # what the other bands hold is left alone


def test_adaptive_dropout_is_of_the_tails_in_training_alone(adaptive, hidden):
    assert torch.equal(adaptive.logits(hidden), adaptive.logits(hidden))
    adaptive.train()
    torch.manual_seed(1)
    difference = (adaptive.logits(hidden) - adaptive.logits(hidden)).abs().amax(dim=(0, 1))
    assert torch.all(difference[:4] == 0)
    assert (difference[4:] > 0).all()


def test_adaptive_last_band_of_one_token(hidden):
    vocabulary = AdaptiveVocabulary(config(adaptive_cutoffs=(19,)))
    logits = vocabulary.logits(hidden)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 5))
    rows, targets = hidden.flatten(0, 1), torch.full((15,), 19)
    torch.testing.assert_close(vocabulary.loss(rows, targets), -logits[..., 19].mean())
