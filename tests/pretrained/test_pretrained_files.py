import json

import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from family_models import FAMILIES, VOCABULARY

from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.models.files import save_model
from longreach.positions.scaling import Scaling
from longreach.pretrained.attend import extension_of
from longreach.pretrained.convert import convert
from longreach.pretrained.extend import extend
from longreach.pretrained.load import adapt, holds_pretrained, load_causal_model, load_configuration, load_pretrained
from longreach.pretrained.save import save_pretrained

TOKENS = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
LONGER_THAN_TRAINED = torch.randint(1, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(4))


def learned_positions():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=6, n_positions=32)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def rotary():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


CONVERTED = {"gpt2": learned_positions, "llama": rotary}
MODELS = {**FAMILIES, **CONVERTED}
SCALINGS = {
    "none": (Scaling("none"), None),
    "linear": (Scaling("linear", train_length=32), {"type": "linear", "train_seq_len": 32}),
    "linear-fixed": (Scaling("linear-fixed", factor=2.5), {"type": "linear", "factor": 2.5}),
}


def logits(model, tokens=LONGER_THAN_TRAINED):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def extended(name, **options):
    model = MODELS[name]()
    return convert(model, **options) if name in CONVERTED else extend(model, **options)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_computes_what_was_saved(name, scaling, tmp_path):
    scaling, written = SCALINGS[scaling]
    model = extended(name, scaling=scaling)
    save_pretrained(model, tmp_path)
    assert not hasattr(model.config, "alibi_scaling")  # which is in the file alone
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["alibi_scaling"] == written
    loaded = load_pretrained(tmp_path)
    assert extension_of(loaded).scaling == scaling
    for tokens in (TOKENS, LONGER_THAN_TRAINED):
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", MODELS)
def test_plain_transformers_loads_the_folder_as_the_stock_model(name, tmp_path):
    model = extended(name, scaling="none")
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(MODELS[name]()).__name__]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(MODELS[name]())
    stock = logits(MODELS[name](), TOKENS)
    assert torch.equal(logits(plain, TOKENS), stock)
    if name in CONVERTED:  # it computes with the positions that were taken out
        assert not torch.allclose(logits(plain, TOKENS), logits(model, TOKENS), atol=1e-3)


def test_saving_again_what_was_loaded_changes_nothing(tmp_path):
    save_pretrained(extended("gpt2", scaling="linear-fixed=2"), tmp_path / "first")
    save_pretrained(load_pretrained(tmp_path / "first"), tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_options_reach_transformers(tmp_path):
    save_pretrained(extended("bloom", scaling="none"), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB"), ("20KB", "10KB"), ("5GB", "5GB")])
def test_a_folder_holds_what_was_saved_last(sizes, tmp_path):
    """In shards or whole: transformers, which deletes earlier shards alone, would read an earlier whole file."""
    model = extended("bloom", scaling="none")
    for size in sizes:
        model.transformer.ln_f.weight.data += 1
        save_pretrained(model, tmp_path, max_shard_size=size)
    assert torch.equal(load_pretrained(tmp_path).transformer.ln_f.weight, model.transformer.ln_f.weight)
    assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_transformers_does_not_read_is_not_read(index, tmp_path):
    extended("bloom", scaling="none").save_pretrained(tmp_path)
    (tmp_path / index).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    load_causal_model(str(tmp_path), load_configuration(str(tmp_path)), dtype="auto")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors: no such file"):
        load_configuration(str(tmp_path))


@pytest.mark.parametrize(
    "option",
    [{"dtype": dtype} for dtype in ("x", "int8", torch.int8, 5, {"": "fp16"}, ["float32"])] + [{"torch_dtype": "load"}],
    ids=str,
)
def test_weights_in_what_is_no_dtype_for_them(option, tmp_path):
    ((name, dtype),) = option.items()
    shown = next(iter(dtype.values())) if isinstance(dtype, dict) else dtype
    message = f'{name}={shown!r}: give one of torch for floating point, such as "float32", or "auto"'
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared)
        load_pretrained(tmp_path, **option)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["v_head.summary.weight"], "v_head.summary.weight"),
        (["v_head.summary.weight", "visual.proj", "audio.proj.weight"], "audio.proj.weight and 2 more"),
        (["transformer.h.0.self_attention.rotary_emb.inv_freq"], None),
        (["transformer.h.0.self_attention.masked_bias"], None),
        (["transformer.position_ids", "position_ids"], None),
    ],
)
def test_what_lies_beside_the_weights_is_said_once(extra, said, tmp_path, recwarn):
    MODELS["bloom"]().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path) | {name: torch.ones(3) for name in extra}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    for _ in range(2):
        load_causal_model(str(tmp_path), load_configuration(str(tmp_path)), dtype="auto")
    lines = [f"model '{tmp_path}' has weights that a language model does not use: {said}"] if said else []
    assert [str(warning.message) for warning in recwarn] == lines


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_is_left_as_it_is(name, tmp_path):
    stock = MODELS[name]()
    stock.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded) is type(stock)
    assert adapt(loaded) is None
    assert torch.equal(logits(loaded, TOKENS), logits(stock, TOKENS))


def test_adapting_gives_what_states_a_length(tmp_path):
    save_pretrained(extended("bloom", scaling="linear", train_length=32), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    state_length = adapt(model)
    short = logits(model, TOKENS)
    with state_length(64):
        longer = logits(model, TOKENS)
    by_hand = extend(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), scaling="linear-fixed=2")
    torch.testing.assert_close(longer, logits(by_hand, TOKENS), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(longer, short, atol=1e-4)
    assert torch.equal(logits(model, TOKENS), short)


def test_adapting_what_is_no_pretrained_model_does_nothing():
    assert adapt(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alibi_scaling", {"type": "ntk", "factor": 2.0}, "alibi_scaling has type='ntk'"),
        ("alibi_scaling", {"type": "linear", "factor": 2}, "alibi_scaling has factor=2: give a finite float"),
        ("longreach_positions", "t5", "longreach_positions='t5': only \"alibi\" is known"),
    ],
)
def test_a_configuration_that_says_what_is_not_known(field, value, message, tmp_path):
    model = learned_positions()
    setattr(model.config, field, value)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "ntk", "train_length": 32}, r'^scaling="ntk": alibi_scaling can hold'),
        ({"scaling": "none+logn", "train_length": 32}, r'^scaling="none\+logn": alibi_scaling can hold'),
        ({"scaling": "linear", "train_length": 32, "length": 64}, r"^length=64: config\.json"),
        ({"scaling": "linear", "train_length": 32, "per_step": True}, r"^per_step=True: config\.json"),
        ({"scaling": "none", "sinks": 4, "window": 8}, r"^sinks=4: config\.json"),
    ],
)
def test_what_cannot_be_written_down_is_refused_by_name(options, message, tmp_path):
    model = extended("bloom", **options)
    before = dict(vars(model.config))
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert vars(model.config) == before


def test_a_model_that_is_not_extended_is_refused(tmp_path):
    with pytest.raises(ValueError, match="BloomForCausalLM is not extended"):
        save_pretrained(FAMILIES["bloom"](), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_adapters_must_be_merged(tmp_path):
    wrapped = peft.get_peft_model(
        extended("llama", scaling="none"),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM is no model of transformers: merge adapters first"):
        save_pretrained(wrapped, tmp_path)
    merged = wrapped.merge_and_unload()
    save_pretrained(merged, tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(merged))


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    model = extended("bloom", scaling="none")

    def full(*arguments, **options):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match=r"the weights cannot be written .*No space left"):
        save_pretrained(model, tmp_path)
    assert not hasattr(model.config, "alibi_scaling")


def test_folders_of_pretrained_models_are_told_from_others(tmp_path):
    rotary().save_pretrained(tmp_path / "pretrained")
    save_model(Decoder(ModelConfig(vocab_size=20, train_length=8, d_model=16, num_heads=2)), tmp_path / "ours")
    for name, text in (("damaged", "{"), ("deep", "[" * 5000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    told = [name for name in ("pretrained", "ours", "damaged", "deep", "nowhere") if holds_pretrained(tmp_path / name)]
    assert told == ["pretrained"]
