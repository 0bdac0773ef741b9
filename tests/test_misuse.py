"""Every public function given what it does not take: one line that names the argument, from the function itself."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import longreach
from longreach.conformance import (
    Dialect,
    check_alibi,
    check_attention,
    check_bias,
    check_shards,
    check_slopes,
    golden_attention,
    golden_bias,
    golden_slopes,
)
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder

Q = torch.ones(1, 2, 4, 8)
SLOPES = torch.tensor([0.5, 0.25])
NOT_NUMBERS = (np.ones(2), [1.0], "0.5", {}, torch.ones(2), torch.ones(2, dtype=torch.complex64), math.nan, object())
NOT_COUNTS = (*NOT_NUMBERS, True, 2.5, -1, math.inf, 10**30, "2", None)
NOT_FLAGS = ("yes", "no", 1, 0, None, [], np.ones(2), torch.ones(2), math.nan)
NOT_DENSE = torch.ones(1, 2, 4, 8).to_sparse()
NOT_TENSORS = (np.ones(2), [0.5, 0.25], "slopes", 1.0, True, {})
NOT_FINITE = (
    torch.tensor([math.nan, 0.5]),
    torch.tensor([0.5, math.inf]),
    torch.tensor([-math.inf, 1]),
    torch.tensor([1, 2]),
    torch.ones(2, dtype=torch.complex64),
)
NOT_SLOPES = (*NOT_TENSORS, *NOT_FINITE, torch.tensor([0.5, -0.25]))
NOT_MODELS = (None, "model", [], np.ones(2), torch.ones(2), nn.Linear, {})
NOT_PATHS = (None, "", 3, True, [], np.ones(2), b"x")
NOT_WORDS = (None, "fast", "", 3, True, [], np.ones(2), b"x")
NOT_FUNCTIONS = (None, "f", 3, [], np.ones(2))
CHECKS = (check_attention, check_bias, check_slopes, check_shards)
NOT_LENGTHS = ("9", None, math.nan, [], -1, math.inf, True)
NOT_HEAD_COUNTS = ((), [10**9], 3, "8", None, [0], [2.0], [True], {2: 1}, torch.tensor(0), np.array([1.5]))

attend = (longreach.attention, {"q": Q, "k": Q, "v": Q, "slopes": SLOPES})
find_reach = (longreach.reach, {"q": Q, "k": Q, "slopes": SLOPES})
bias = (longreach.alibi_bias, {"slopes": SLOPES, "query_length": 3})
extend = (longreach.extend, {"model": nn.Linear(2, 2)})
export = (longreach.export_mpt, {"model": None, "folder": "never", "max_length": 8})
encoder = (longreach.load_encoder, {"name": "nowhere"})
kit = (check_attention, {"fn": longreach.attention})
golden = (golden_bias, {"num_heads": 2, "query_length": 3, "key_length": 4})

CASES = [
    *((attend, name, bad) for name in ("q", "k", "v", "bias", "key_padding_mask", "cu_seqlens") for bad in NOT_TENSORS),
    *((attend, name, NOT_DENSE) for name in ("q", "k", "v", "bias", "key_padding_mask", "cu_seqlens")),
    *((find_reach, name, NOT_DENSE) for name in ("q", "k")),
    *((attend, "slopes", bad) for bad in NOT_SLOPES),
    *((attend, name, bad) for name in ("causal", "return_lse") for bad in NOT_FLAGS),
    *((attend, name, bad) for name in ("scale", "tolerance", "dropout_p") for bad in (*NOT_NUMBERS, True, -1)),
    *((attend, "window_size", bad) for bad in NOT_COUNTS if bad is not None),
    *((attend, "impl", bad) for bad in NOT_WORDS),
    *((find_reach, name, bad) for name in ("block_m", "block_n") for bad in (*NOT_COUNTS, 0)),
    *((find_reach, "slopes", bad) for bad in NOT_SLOPES),
    *((find_reach, "causal", bad) for bad in NOT_FLAGS),
    *(((longreach.alibi_slopes, {}), "num_heads", bad) for bad in (*NOT_COUNTS, 0, 10**12)),
    *(((longreach.alibi_slopes, {"num_heads": 2}), "device", bad) for bad in ("tpu", "", "cuda:99", 10**30, [2])),
    *((bias, "slopes", bad) for bad in (*NOT_TENSORS, *NOT_FINITE, None)),
    *((bias, name, bad) for name in ("query_length",) for bad in NOT_COUNTS),
    *((bias, "key_length", bad) for bad in NOT_COUNTS if bad is not None),
    *(((function, {}), "model", bad) for function in (longreach.extend, longreach.convert) for bad in NOT_MODELS),
    *(((function, {}), "model", bad) for function in (longreach.restore, longreach.unconvert) for bad in NOT_MODELS),
    *((export, "model", bad) for bad in NOT_MODELS),
    *(((longreach.load_pretrained, {}), "name", bad) for bad in NOT_PATHS),
    *(((longreach.load_encoder, {}), "name", bad) for bad in NOT_PATHS),
    *((encoder, "head", bad) for bad in NOT_WORDS),
    *((encoder, "scaling", bad) for bad in (3, [], True, b"linear", np.ones(2))),
    *((encoder, "train_length", bad) for bad in (*NOT_COUNTS, 0) if bad is not None),
    *((encoder, "dtype", bad) for bad in ("float32", torch.int8, np.float32, 3, True)),
    *((encoder, "device", bad) for bad in ("tpu", "", "cuda:99", 10**30)),
    *((encoder, "tokenizer", bad) for bad in NOT_PATHS if bad is not None),
    *(((longreach.Scaling, {}), "name", bad) for bad in NOT_WORDS),
    *(((longreach.Scaling, {"name": "linear"}), "train_length", bad) for bad in (*NOT_COUNTS, 0)),
    *(((longreach.Scaling, {"name": "ntk-fixed"}), "factor", bad) for bad in (*NOT_NUMBERS, True, 1.0, -2)),
    *(((longreach.Scaling, {"name": "none"}), "logn", bad) for bad in NOT_FLAGS),
    *(((longreach.Scaling("ntk", 8), {"length": 9}), "slopes", bad) for bad in (*NOT_TENSORS, SLOPES[:0], SLOPES[0])),
    *(((longreach.Scaling("linear", 8), {"slopes": SLOPES}), "length", bad) for bad in NOT_LENGTHS),
    *(((check, {}), "fn", bad) for check in CHECKS for bad in NOT_FUNCTIONS),
    *(((check_alibi, {}), "attention", bad) for bad in NOT_FUNCTIONS),
    *(((check_alibi, {"attention": print}), name, bad) for name in ("slopes", "bias") for bad in ("f", 3, [], {})),
    *((kit, "dialect", bad) for bad in ("mpt", 3, {}, True, np.ones(2), torch.ones(2))),
    *((kit, "dtype", bad) for bad in ("float32", None, torch.int8, 3, np.float32, torch.ones(2))),
    *((kit, "head_counts", bad) for bad in NOT_HEAD_COUNTS),
    *((kit, "length", bad) for bad in (*NOT_COUNTS, 0, 10**9)),
    *(((golden_slopes, {}), "num_heads", bad) for bad in (*NOT_COUNTS, 0, 10**9)),
    *((golden, name, bad) for name in ("query_length", "key_length") for bad in NOT_COUNTS),
    (golden, "query_length", 2**40),
    *((golden, "key_padding_mask", bad) for bad in (*NOT_TENSORS, torch.ones(1, 4), torch.ones(1, 3) > 0)),
    *((golden, "dialect", bad) for bad in ("mpt", 3, True)),
    *(((longreach.Scaling("linear", 8).stretch, {}), "length", bad) for bad in NOT_LENGTHS),
    *(((longreach.Scaling("none", 8, logn=True).logit_factor, {}), "length", bad) for bad in NOT_LENGTHS),
    *(((golden_attention, {"q": Q, "k": Q, "v": Q}), name, bad) for name in "qkv" for bad in (*NOT_TENSORS, None)),
    *(((Dialect, {}), "causal", bad) for bad in NOT_FLAGS),
    *(((Dialect, {}), "positions", bad) for bad in NOT_WORDS),
    *(((Dialect, {}), "bias_dtype", bad) for bad in ("float16", torch.int8, np.ones(2), 3)),
]  # fmt: skip


def refusal(function, **arguments):
    with pytest.raises((ValueError, TypeError)) as raised:
        function(**arguments)
    return str(raised.value)


def test_the_argument_is_named():
    for (function, arguments), name, bad in CASES:
        message = refusal(function, **{**arguments, name: bad})
        assert message.startswith(name), (function, name, bad, message)
        assert "\n" not in message
        assert len(message) < 500


def test_every_public_function_is_tried():
    tried = {function for (function, _), _, _ in CASES}
    untried = {
        "__version__",
        "register_encoders",
        "unregister_encoders",
        "fixed_length",
        "save_pretrained",
    }  # of extended models, see below
    assert {name for name in longreach.__all__ if getattr(longreach, name) not in tried} == untried


@pytest.fixture
def extended():
    import transformers

    config = transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2, seq_length=8)
    return longreach.extend(transformers.BloomForCausalLM(config))


def test_of_extended_models(extended):
    for name, bads in {
        "scaling": (3, [], True, "fast", "", b"linear", np.ones(2)),
        "per_step": NOT_FLAGS,
        "train_length": [bad for bad in NOT_COUNTS if bad is not None],
        "length": [bad for bad in NOT_COUNTS if bad is not None],
        "sinks": [bad for bad in NOT_COUNTS if bad is not None],
        "tolerance": (*NOT_NUMBERS, True, 1.0, -1),
        "impl": NOT_WORDS,
    }.items():
        for bad in bads:
            assert refusal(longreach.extend, **{"model": extended, "scaling": "linear", name: bad}).startswith(name), (
                bad
            )
    for bad in NOT_PATHS:
        assert refusal(longreach.save_pretrained, model=extended, folder=bad).startswith("folder=")
    for bad in NOT_MODELS:
        assert refusal(longreach.save_pretrained, model=bad, folder="never").startswith("model=")
        assert refusal(longreach.fixed_length(bad, 8).__enter__).startswith("model=")
    for bad in (*NOT_COUNTS, 0):
        assert refusal(longreach.fixed_length(extended, bad).__enter__).startswith("length=")


TWO = torch.tensor([[1, 2]])
FORWARD = {
    "positions": (*NOT_TENSORS, TWO.float(), TWO[:, :1], TWO[0], TWO - 5, torch.zeros(2, 2).long()),
    "cu_seqlens": (*NOT_TENSORS, [0, 2], torch.tensor([], dtype=torch.int32), TWO, TWO[0], torch.tensor([0, 2, 1, 2])),
    "length": [bad for bad in (*NOT_COUNTS, 0) if bad is not None],
    "cache": ("x", 3, [], {}, TWO),
}


def test_of_decoders():
    decoder = Decoder(ModelConfig(vocab_size=40, num_layers=1, num_heads=2, d_model=16, train_length=8))
    for name, bads in FORWARD.items():
        for bad in bads:
            message = refusal(decoder, **{"tokens": TWO, name: bad})
            assert message.startswith(name), (name, bad, message)
    assert refusal(decoder.loss, tokens=TWO, targets=TWO + 40).startswith("targets has ids outside of 40")
    for name in ("chunk_size", "last"):
        for bad in (*NOT_COUNTS, 0):
            if name == "chunk_size" or bad is not None:
                call = {"tokens": TWO, name: bad}
                assert refusal(lambda call=call: next(decoder.logits(**call))).startswith(name), (name, bad)
    arguments = {"model": decoder, "folder": "never", "max_length": 8}
    for name, bads in {
        "folder": NOT_PATHS,
        "max_length": NOT_COUNTS,
        "tokenizer": [bad for bad in NOT_PATHS if bad is not None],
        "card_table": (3, [], b"x", np.ones(2)),
    }.items():
        for bad in bads:
            assert refusal(longreach.export_mpt, **{**arguments, name: bad}).startswith(name), bad
