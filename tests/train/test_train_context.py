"""Sequences that several ranks share, as far as one process can tell."""

from types import SimpleNamespace

import pytest

from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.ops.attention import attention
from longreach.parallel.sharing import Sharing
from longreach.train.context import share_sequences, unshared


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


@pytest.mark.parametrize(("evenly", "largest"), [(True, 16384), (False, 20480)])
def test_pieces_are_alike_in_tokens_or_in_work_as_far_as_memory_goes(evenly, largest):
    model = Decoder(ModelConfig(num_layers=1, num_heads=2, d_model=8, vocab_size=300, train_length=8, method="rotary"))
    ranks = SimpleNamespace(context_group=lambda context, device: None)
    # Of equal work the first of four pieces would have half of the tokens.
    assert max(share_sequences(model, ranks, 4, evenly=evenly).cut(65536)) == largest
