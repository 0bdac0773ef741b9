import math
from functools import partial

import pytest
import torch
import transformers

from longreach.measure.transformers import HuggingFaceModel
from longreach.positions.scaling import parse_scaling
from longreach.pretrained.convert import convert
from longreach.pretrained.frequencies import check_frequencies, is_rotary, stretch_frequencies
from longreach.pretrained.load import stretch

TRAINED, LONG, VOCABULARY = 16, 64, 50
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": TRAINED,
}
CONFIGS = {
    "llama": partial(transformers.LlamaConfig, **SHAPE),
    "qwen3": partial(transformers.Qwen3Config, **SHAPE, num_key_value_heads=1, head_dim=16),
    "gpt_neox": partial(transformers.GPTNeoXConfig, **SHAPE),  # rotates a quarter of each head
}
TOKENS = torch.randint(1, VOCABULARY, (2, LONG), generator=torch.Generator().manual_seed(3))


def model_of(family, **rope):
    """With weights so large that attention has preferences, and with a scaling by transformers where one is given."""
    config = CONFIGS[family]()
    config.rope_parameters = {**config.rope_parameters, **rope}
    if family == "gpt_neox":
        config.rope_parameters["partial_rotary_factor"] = 0.5
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    return model.eval()


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def assert_alike(ours, theirs):
    """Up to 1e-5 of the largest logit, some 80 roundings in float32."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        ("linear-fixed=4", {"rope_type": "linear", "factor": 4.0}),
        ("linear", {"rope_type": "linear", "factor": LONG / TRAINED}),
        ("ntk", {"rope_type": "dynamic", "factor": 1.0}),
        ("yarn-fixed=4", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}),
        ("yarn", {"rope_type": "yarn", "factor": LONG / TRAINED, "original_max_position_embeddings": TRAINED}),
    ],
)
def test_scalings_are_those_of_transformers(family, scaling, theirs):
    model = model_of(family)
    before = logits(model)
    assert stretch(model, scaling) is not None
    expected = logits(model_of(family, **theirs))
    assert_alike(logits(model), expected)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "none+logn"])
def test_nothing_changes_up_to_the_training_length(scaling):
    stock, model = model_of("llama"), model_of("llama")
    stretch(model, scaling)
    logits(model)  # a long input leaves nothing behind
    assert_alike(logits(model, TOKENS[:, :TRAINED]), logits(stock, TOKENS[:, :TRAINED]))


def test_none_is_the_stock_code():
    model = model_of("llama")
    assert stretch(model, "none") is None
    assert torch.equal(logits(model), logits(model_of("llama")))


def test_logn_multiplies_the_logits():
    model, sharpened = model_of("llama"), model_of("llama")
    stretch(model, "none+logn")
    for layer in sharpened.model.layers:
        layer.self_attn.scaling *= math.log(LONG) / math.log(TRAINED)
    assert_alike(logits(model), logits(sharpened))


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "linear+logn", "yarn-fixed=2"])
def test_cached_decoding_is_the_full_forward_pass(scaling):
    model = model_of("llama")
    subject = HuggingFaceModel(model, state_length=stretch(model, scaling))
    cache = subject.new_cache(LONG)
    with torch.inference_mode():
        parts = [*TOKENS.split([40, 1, 1, 22], dim=1)]
        decoded = torch.cat([piece for part in parts for piece in subject.logits(part, 16, cache=cache)], dim=1)
    assert_alike(decoded, logits(model))


def test_positions_are_heeded_and_only_their_differences_count():
    model = model_of("llama")
    subject = HuggingFaceModel(model, state_length=stretch(model, "yarn"))
    with torch.inference_mode():
        there = torch.cat(list(subject.logits(TOKENS, LONG, positions=torch.arange(100, 100 + LONG)[None])), dim=1)
        apart = torch.cat(list(subject.logits(TOKENS, LONG, positions=2 * torch.arange(LONG)[None])), dim=1)
    assert (there - logits(model)).abs().max() < 1e-3  # the angles of far positions are rounded
    assert (apart - there).abs().max() > 1e-2


REFUSED = {
    "another scaling": (
        transformers.LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "yarn",
        "this llama has a scaling of its own already, rope_type=linear: give none",
    ),
    "layers that differ": (
        transformers.Gemma3TextConfig(),
        "linear",
        "the rotary positions of gemma3_text differ from layer to layer: give none",
    ),
    "a part of each head": (
        transformers.GPTNeoXConfig(),
        "linear+logn",
        "gpt_neox rotates a part of each head, and logn is for whole ones: leave .logn out",
    ),
}


@pytest.mark.parametrize(("config", "scaling", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_stretched_is_told_by_its_configuration(config, scaling, message):
    with pytest.raises(ValueError, match=f'^scaling="{scaling}": {message}$'.replace("+", ".")):
        check_frequencies(config, parse_scaling(scaling, 16))


@pytest.mark.parametrize("change", ["other frequencies", "no module"])
def test_a_model_that_turns_otherwise_is_refused(change):
    model = model_of("llama")
    if change == "no module":
        del model.model.rotary_emb.inv_freq
    else:
        model.model.rotary_emb.inv_freq *= 1.01
    with pytest.raises(ValueError, match=r'^scaling="linear": LlamaForCausalLM does not turn the pairs .*: give none$'):
        stretch_frequencies(model, parse_scaling("linear", 16))


def test_which_models_are_rotary():
    of_configs = {
        "llama": (transformers.LlamaConfig(), True),
        "falcon": (transformers.FalconConfig(), True),
        "falcon with alibi": (transformers.FalconConfig(alibi=True), False),
        "bloom": (transformers.BloomConfig(), False),
        "mpt": (transformers.MptConfig(), False),
        "gpt2": (transformers.GPT2Config(), False),
        "converted": (convert(model_of("llama")).config, False),
    }
    assert {name: is_rotary(config) for name, (config, _) in of_configs.items()} == {
        name: rotary for name, (_, rotary) in of_configs.items()
    }
