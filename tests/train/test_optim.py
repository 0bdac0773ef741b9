import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.train.config import TrainConfig
from longreach.train.optim import build_optimizer, learning_rate


def test_learning_rate_golden():
    config = TrainConfig(steps=10, warmup_steps=2, learning_rate=1.0, final_learning_rate=0.1)
    assert learning_rate(0, config) == 0.5
    assert learning_rate(1, config) == 1.0
    assert learning_rate(2, config) == 1.0
    assert learning_rate(6, config) == pytest.approx(0.55)  # half-way down
    assert learning_rate(10, config) == pytest.approx(0.1)


@given(st.integers(1, 500), st.data(), st.floats(0, 1))
def test_learning_rate_rises_then_falls_between_its_bounds(steps, data, floor):
    warmup = data.draw(st.integers(0, steps))
    config = TrainConfig(steps=steps, warmup_steps=warmup, learning_rate=0.5, final_learning_rate=floor)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert all(0 < rate <= 0.5 * (1 + 1e-12) for rate in rates[:warmup])
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(rate >= 0.5 * floor * (1 - 1e-12) for rate in rates[warmup:])


def test_only_matrices_of_linear_layers_decay():
    config = ModelConfig(vocab_size=50, train_length=8, num_layers=1, num_heads=2, d_model=8, bias=True, method="t5")
    model = Decoder(config)
    decayed, others = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed["params"]) == [
        "blocks.0.attention.out.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.feed_forward.down.weight",
        "blocks.0.feed_forward.up.weight",
    ]
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_of_gpt2_decay_and_its_embeddings_do_not(tied):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=8,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    decayed, _ = build_optimizer(model, TrainConfig()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed["params"]) == [
        *([] if tied else ["lm_head.weight"]),
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]


def test_first_step_is_adamw_by_hand():
    # Loshchilov & Hutter: w (1 - lr decay) - lr g / (|g| + eps) at the first step, whatever the betas.
    linear = torch.nn.Linear(3, 1, bias=False)
    before = linear.weight.detach().double().clone()
    optimizer = build_optimizer(linear, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    linear.weight.grad = torch.tensor([[1.0, -2.0, 3.0]])
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0, 1.0]])
    torch.testing.assert_close(linear.weight.detach().double(), expected, rtol=0, atol=1e-6)
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.1)
