"""Sequences that several ranks share, as far as one process can tell."""

import pytest

from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.ops.attention import attention
from longreach.parallel.sharing import Sharing
from longreach.train.context import unshared


def attends(model):
    return [module.attend for module in model.modules() if hasattr(module, "layer")]


def fail_unshared(model, sharing):
    with unshared(model, sharing):
        assert attends(model) == [attention, attention]
        raise FloatingPointError


def test_attention_is_shared_again_after_a_mistake_in_between():
    model = Decoder(ModelConfig(num_layers=2, num_heads=2, d_model=8, vocab_size=300, train_length=8))
    sharing = Sharing(group=None, cut=lambda length: (length,))
    model.attend_by(sharing.attention)
    with pytest.raises(FloatingPointError):
        fail_unshared(model, sharing)
    assert [shared.args for shared in attends(model)] == [(0,), (1,)]
