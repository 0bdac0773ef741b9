import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.models.config import ARCHITECTURES, Architecture, ModelConfig
from longreach.models.decoder import Decoder
from longreach.reading import read_values
from longreach.train.config import PRESETS

DROPOUTS = [field.name for field in dataclasses.fields(Architecture) if field.name.endswith("_dropout")]


@st.composite
def configs(draw):
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    train_length = draw(st.integers(1, 4096))
    return ModelConfig(
        num_layers=draw(st.integers(1, 100)),
        num_heads=heads,
        num_kv_heads=draw(st.none() | st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        d_model=heads * 16 * draw(st.integers(1, 9)),
        d_ff=draw(st.none() | st.integers(1, 9999)),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        vocab_size=draw(st.integers(8, 10**6)),
        method=draw(st.sampled_from(["alibi", "rotary:base=500000", "learned", "t5", "alibi:scaling=linear"])),
        train_length=train_length,
        longest_length=draw(st.none() | st.integers(train_length, 10**6)),
        **{name: draw(st.floats(0, 1, exclude_max=True)) for name in DROPOUTS},
    )


@given(configs())
def test_survives_json(config):
    assert read_values(ModelConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name}=0: give a positive integer") for name in ("num_layers", "num_heads", "d_model", "d_ff")),
        *(
            ({name: -4}, f"{name}=-4: give")
            for name in ("num_kv_heads", "vocab_size", "train_length", "longest_length")
        ),
        *(({name: 2.5}, rf"{name}=2\.5: give an integer") for name in ("num_layers", "d_ff", "train_length")),
        *(({name: None}, f"{name}=None: give") for name in ("num_layers", "num_heads", "d_model", "vocab_size")),
        ({"num_layers": True}, "num_layers=True: give an integer"),
        ({"vocab_size": "10"}, "vocab_size='10': give an integer"),
        ({"num_heads": 7}, "num_heads=7 does not divide d_model=64"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"num_kv_heads": 16}, "num_kv_heads=16 does not divide num_heads=4"),
        *(({name: 1.0}, rf"{name}=1\.0: give") for name in DROPOUTS),
        ({"residual_dropout": -0.1}, r"residual_dropout=-0\.1: give"),
        ({"residual_dropout": float("nan")}, "residual_dropout=nan: give"),
        ({"residual_dropout": "0.1"}, r"residual_dropout='0\.1': give a number"),
        ({"bias": "no"}, "bias='no': give true or false"),
        ({"tied_embeddings": 1}, "tied_embeddings=1: give true or false"),
        ({"norm": "batchnorm"}, "norm='batchnorm': give 'layernorm' or 'rmsnorm'"),
        ({"activation": "relu"}, "activation='relu': give 'gelu' or 'swiglu'"),
        ({"longest_length": 7}, "longest_length=7 is below train_length=8"),
        ({"method": "rope"}, "method='rope': give one of"),
        ({"method": None}, "method=None: give text"),
        (
            {"method": "learned:table_length=4"},
            "method='learned:table_length=4': table_length=4 is below train_length=8",
        ),
        (
            {"method": "rotary", "d_model": 24, "num_heads": 8},
            "method='rotary': head_dim=3 with .*: give an even",
        ),
        (
            {"method": "sinusoidal", "d_model": 9, "num_heads": 3},
            "method='sinusoidal': d_model=9 with .*: give an even",
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        read_values(ModelConfig, {"vocab_size": 10, "train_length": 8, **changes})
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=f"^{message}"):
        ModelConfig(**{"vocab_size": 10, "train_length": 8, **changes})


def test_asking_a_method_for_its_refusals_takes_no_memory_and_no_random_numbers():
    before = torch.get_rng_state()
    ModelConfig(vocab_size=10, train_length=2**40, method="learned")  # a table of a petabyte
    with pytest.raises(ValueError, match=r"^method='learned' with .*train_length=4611686018427387904.*: its table is"):
        ModelConfig(vocab_size=10, train_length=2**62, method="learned")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_position_method_may_know():
    size = ModelConfig(vocab_size=10, train_length=8, num_heads=4, d_model=64).size
    assert (size.d_model, size.num_heads, size.head_dim, size.train_length, size.longest_length) == (64, 4, 16, 8, 8)
    assert ModelConfig(vocab_size=10, train_length=8, longest_length=32).size.longest_length == 32


def parameters(preset, vocab_size):
    config = ModelConfig(**vars(ARCHITECTURES[preset]), vocab_size=vocab_size, train_length=512)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


def test_wikitext103_has_247m_parameters():
    count = parameters("wikitext103-247m", PRESETS["wikitext103-247m"]["data"].vocab_size)
    assert abs(count / 247e6 - 1) < 0.01


def test_cc100_has_about_1_3b_parameters():
    architecture = ARCHITECTURES["cc100-1.3b"]
    blocks = 12 * architecture.num_layers * architecture.d_model**2
    count = parameters("cc100-1.3b", 50265)  # RoBERTa's byte pairs
    assert abs(count / 1.3e9 - 1) < 0.05
    norms = (2 * architecture.num_layers + 1) * architecture.d_model
    assert count == blocks + 50265 * architecture.d_model + norms


def test_demo_is_the_default():
    assert ARCHITECTURES["demo"] == Architecture()
