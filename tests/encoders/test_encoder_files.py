"""Published files: every form that is read, every weight accounted for, and what is refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from published import Published, expected, write

import longreach
from longreach.encoders.model import EncoderModel
from longreach.encoders.source import Source

pytestmark = pytest.mark.transformers  # whose classes the models are of

JINA = Published("jina", layers=1)
IDS = torch.tensor([[2, 7, 8, 9, 3]])


def hidden(folder, **options):
    with torch.no_grad():
        return longreach.load_encoder(folder, dtype=torch.float64, **options)(IDS).last_hidden_state[0]


@pytest.mark.parametrize("prefix", ["", "bert.", "model.", "module.bert."])
@pytest.mark.parametrize(("bin_file", "shards"), [(False, 1), (False, 3), (True, 1), (True, 2)])
def test_every_form_of_files_is_the_same_model(prefix, bin_file, shards, tmp_path):
    published = replace(JINA, prefix=prefix)
    folder = write(published, tmp_path, bin_file=bin_file, shards=shards)
    torch.testing.assert_close(hidden(folder), expected(published, published.weights(), IDS[0]), rtol=1e-6, atol=1e-6)


def test_tensors_of_old_files_and_counters_are_read(tmp_path):
    weights = JINA.weights()
    counters = {"embeddings.position_ids": torch.arange(9)[None], "encoder.alibi": torch.zeros(1, 12, 9, 9)}
    write(JINA, tmp_path, bin_file=True, weights=weights | counters)
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(hidden(tmp_path), expected(JINA, weights, IDS[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_become_float32_on_the_cpu_unless_they_are_asked_for(dtype, tmp_path):
    write(JINA, tmp_path, weights={name: x.to(dtype) for name, x in JINA.weights().items()})
    assert longreach.load_encoder(tmp_path).dtype == torch.float32
    assert longreach.load_encoder(tmp_path, dtype=dtype).dtype == dtype
    assert EncoderModel.from_pretrained(tmp_path).dtype == dtype
    write(replace(JINA, extra={"torch_dtype": "float32"}), tmp_path)
    assert EncoderModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32


def test_a_model_without_a_pooler_has_none(tmp_path):
    weights = {name: x for name, x in JINA.weights().items() if not name.startswith("pooler.")}
    model = longreach.load_encoder(write(JINA, tmp_path, weights=weights))
    assert model(IDS).pooler_output is None


def spoil(change):
    """JINA's weights, with a change."""
    weights = JINA.weights()
    change(weights)
    return weights


UP = "encoder.layer.0.mlp.gated_layers.weight"
WO = "encoder.layer.0.mlp.wo.weight"


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (spoil(lambda w: w.pop(WO)), f"has no weight {WO}:"),
        (spoil(lambda w: w.pop("pooler.dense.bias")), "has no weight pooler.dense.bias:"),
        (spoil(lambda w: (w.pop(WO), w.pop("embeddings.LayerNorm.bias"))), "no weight embeddings.LayerNorm.bias and 1"),
        (
            spoil(lambda w: w.update({"encoder.layer.1.a": w[WO].clone()})),
            "an unexpected weight encoder.layer.1.a:",
        ),
        (
            spoil(lambda w: w.update({WO: w[WO][:, 1:].clone()})),
            rf"weight {WO} has shape \(48, 63\), .*\(48, 64\)",
        ),
        (spoil(lambda w: w.update({WO: w[WO].to(torch.int8)})), f"weight {WO} is torch.int8"),
        (spoil(lambda w: w.pop(UP)), "weights of no known layout"),
        (spoil(lambda w: w.pop("embeddings.word_embeddings.weight")), "has 0 weights named embeddings.word_embeddings"),
        (spoil(lambda w: w.update({f"b.{k}": x.clone() for k, x in w.items()})), "has 2 weights named embeddings.word"),
        (Published("mosaic", layers=1).weights(), "config.json says layout jina, its weights are laid out as mosaic"),
        (Published("original", layers=1).weights(), "says layout jina, its weights are laid out as original"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_are_not_just_those_of_the_model_are_named(weights, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        longreach.load_encoder(write(JINA, tmp_path, weights=weights))
    assert "\n" not in str(error.value)


def test_stock_transformers_loads_such_a_folder_with_random_parts(tmp_path):
    """Where this fails, transformers has learned of ALiBi encoders, or of refusing them: docs/encoders.md says it."""
    folder = write(JINA, tmp_path)
    config = {key: value for key, value in JINA.config().items() if key not in ("auto_map", "attn_implementation")}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    with torch.no_grad():
        first, second = (transformers.AutoModel.from_pretrained(folder).eval()(IDS).last_hidden_state for _ in range(2))
    assert not torch.allclose(first, second)
    assert torch.equal(hidden(folder), hidden(folder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert", "position_embedding_type": "absolute"}, "position_embedding_type='absolute'"),
        ({"model_type": "nomic_bert", "rotary_emb_base": 1000}, "model_type='nomic_bert'"),
        ({"model_type": "modernbert"}, "model_type='modernbert'"),
        ({"model_type": "bloom", "hidden_size": 64, "n_head": 8}, "for decoders longreach.extend"),
        ({"model_type": "bert", "position_embedding_type": "alibi", "is_decoder": True}, "is no ALiBi encoder"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "model_type=None"),
        ({"alibi_starting_size": 512, "monarch_mixer_sequence_mixing": True}, "is no ALiBi encoder"),
        (JINA.config() | {"hidden_size": 50}, "hidden_size=50: give a multiple of num_attention_heads=12"),
        (JINA.config() | {"num_hidden_layers": "two"}, "num_hidden_layers='two': give an integer"),
        (JINA.config() | {"feed_forward_type": "swiglu"}, "feed_forward_type='swiglu'"),
        (JINA.config() | {"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({k: v for k, v in JINA.config().items() if k != "vocab_size"}, "vocab_size is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_alibi_encoder_is_refused(config, said, tmp_path):
    folder = Path(write(JINA, tmp_path))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as error:
        longreach.load_encoder(folder)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no weights: give a folder with one of model.safetensors, pytorch_model.bin"),
        ({"config.json": b"{"}, r"config.json: not a JSON file"),
        ({"config.json": b"[]"}, "has no config.json with a table"),
        ({"model.safetensors": b"\x08"}, "model.safetensors holds no tensors"),
        ({"pytorch_model.bin": pickle.dumps(Evil(), protocol=2)}, "pytorch_model.bin holds no tensors"),
        ({"pytorch_model.bin": b"PK"}, "pytorch_model.bin holds no tensors"),
        ({"pytorch_model.bin.index.json": b'{"weight_map": {"a": "b.bin"}}'}, "has no b.bin, which its index names"),
        ({"model.safetensors.index.json": b'["a"]'}, "model.safetensors.index.json is no index of weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_and_hostile_files_are_refused(files, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(JINA, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        longreach.load_encoder(tmp_path)
    assert "\n" not in str(error.value)
    assert not Path("unpickled").exists()


def test_more_than_tensors_is_refused(tmp_path):
    write(JINA, tmp_path, bin_file=True, weights={"state_dict": JINA.weights(), "step": 3})
    with pytest.raises(ValueError, match="holds more than named tensors"):
        longreach.load_encoder(tmp_path)


def test_names_that_are_no_text_are_refused(tmp_path):
    write(JINA, tmp_path, bin_file=True, weights={0: torch.zeros(1)})
    with pytest.raises(ValueError, match="holds more than named tensors"):
        longreach.load_encoder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to("meta"),
        lambda x: torch.zeros(1).expand(x.shape),
        lambda x: torch.zeros(x.numel() // 2).as_strided(x.shape, (1, 1)),
        lambda x: torch.nested.as_nested_tensor([*x]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:Sparse CSR:UserWarning")
def test_what_does_not_hold_its_numbers_is_refused(change, tmp_path):
    """A few bytes may stand for any shape, of which the model would take the memory."""
    write(JINA, tmp_path, bin_file=True, weights=spoil(lambda w: w.update({WO: change(w[WO])})))
    with pytest.raises(
        ValueError, match=rf"^model '.*': weight {WO} in pytorch_model.bin is sparse, empty or"
    ) as error:
        longreach.load_encoder(tmp_path)
    assert "\n" not in str(error.value)


def test_views_of_larger_tensors_are_read(tmp_path):
    weights = spoil(lambda w: w.update({WO: w[WO].T.contiguous().T, UP: torch.cat([w[UP], w[UP]])[: len(w[UP])]}))
    write(JINA, tmp_path, bin_file=True, weights=weights)
    torch.testing.assert_close(hidden(tmp_path), expected(JINA, JINA.weights(), IDS[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_dtypes_that_nothing_is_computed_in_are_refused(dtype, tmp_path):
    names = "give one of torch.float32, torch.float64, torch.bfloat16, torch.float16"
    with pytest.raises(ValueError, match=f"^dtype={dtype}: {names}, or None$"):
        longreach.load_encoder(write(JINA, tmp_path), dtype=dtype)
    for given in (dtype, str(dtype).removeprefix("torch.")):
        with pytest.raises(ValueError, match=f"^model '.*' in dtype={dtype}: {names}$"):
            EncoderModel.from_pretrained(tmp_path, dtype=given)


def test_files_of_a_dtype_that_nothing_is_computed_in_are_converted_where_that_is_asked_for(tmp_path):
    write(JINA, tmp_path, weights={name: x.to(torch.float8_e4m3fn) for name, x in JINA.weights().items()})
    with pytest.raises(ValueError, match=r"in dtype=torch.float8_e4m3fn: give one of torch.float32"):
        longreach.load_encoder(tmp_path)
    assert longreach.load_encoder(tmp_path, dtype=torch.float32)(IDS).last_hidden_state.isfinite().all()


def test_no_such_model_says_so_in_one_line():
    with pytest.raises(ValueError, match="'no/such-model' is no folder here, nor to be had from the Hugging Face hub"):
        longreach.load_encoder("no/such-model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "pooler"}, "head='pooler': give one of none, masked-lm, classification"),
        ({"scaling": "cubic"}, "scaling='cubic'"),
        ({"scaling": "yarn"}, 'scaling="yarn" scales the frequencies of rotary positions, and ALiBi has slopes'),
        ({"scaling": longreach.Scaling("yarn", 8)}, 'scaling="yarn" scales the frequencies of rotary positions'),
        ({"scaling": "linear", "train_length": 0}, "train_length=0"),
        ({"scaling": longreach.Scaling("linear", 8), "train_length": 9}, "train_length=9 beside Scaling"),
        ({"trust_remote_code": True}, "trust_remote_code=True: beside its own options, give"),
    ],
)
def test_options_out_of_range_are_named(options, said, jina):
    with pytest.raises(ValueError, match=said):
        longreach.load_encoder(jina, **options)


@pytest.mark.parametrize("layout", ["jina", "jina-code", "original", "mosaic"])
def test_what_is_saved_loads_again_in_the_published_layout(layout, tmp_path):
    published = Published(layout, layers=1)
    write(published, tmp_path / "published", pooling=("cls", True))
    model = longreach.load_encoder(tmp_path / "published", scaling="linear", train_length=100)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert not (tmp_path / "saved" / "model.safetensors").exists()  # it is in shards
    again = longreach.load_encoder(tmp_path / "saved")
    assert again.state_dict().keys() == published.shapes().keys()
    assert str(again.sizes.scaling) == "linear"
    assert again.sizes.scaling.train_length == 100
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, model(IDS).last_hidden_state)
    assert torch.equal(again.encode(["a cat", ""]), model.encode(["a cat", ""]))


def test_the_weights_of_a_folder_are_those_saved_last(tmp_path):
    """In shards and whole in turn: transformers deletes earlier shards, and nothing else of an earlier model."""
    model, folder = longreach.load_encoder(write(JINA, tmp_path / "published")), tmp_path / "saved"
    names = {"model.safetensors", "model.safetensors.index.json"}
    for number, size in enumerate(("20KB", "1GB", "20KB", "40KB", "1GB")):
        with torch.no_grad():
            model.encoder.layer[0].mlp.wo.bias.fill_(number)
        model.save_pretrained(folder, max_shard_size=size)
        assert len(names & {path.name for path in folder.iterdir()}) == 1
        assert torch.equal(hidden(folder), model.double()(IDS).last_hidden_state[0])
        model.float()


@pytest.mark.parametrize("index", [None, {"weight_map": {}}])
def test_weights_that_were_saved_are_not_taken_for_those_of_before(index, tmp_path):
    """Shards of other names than transformers gives stay beside what it saves, with their index."""
    model = longreach.load_encoder(write(JINA, tmp_path, shards=3))
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with torch.no_grad():
        model.encoder.layer[0].mlp.wo.bias.fill_(9)
    model.save_pretrained(tmp_path)
    assert (longreach.load_encoder(tmp_path).encoder.layer[0].mlp.wo.bias == 9).all()
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_whole_file_is_read_before_an_index(tmp_path):
    """As by transformers, whose `save_pretrained` leaves an index whose shards it has deleted."""
    folder = write(JINA, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    torch.testing.assert_close(hidden(folder), expected(JINA, JINA.weights(), IDS[0]), rtol=1e-6, atol=1e-6)


def test_what_says_how_texts_become_vectors_is_saved_over_that_of_another_model(tmp_path):
    model = longreach.load_encoder(write(JINA, tmp_path / "model", pooling=("mean", True)))
    vectors, other = model.encode(["a cat", "runs"]), tmp_path / "other"
    write(JINA, other, pooling=("cls", False))
    (other / "tokenizer.json").write_text("{}")
    (other / "special_tokens_map.json").write_text("{}")
    (other / "sentence_bert_config.json").write_text('{"max_seq_length": 2}')
    for _ in range(2):
        model.save_pretrained(other)
        model = longreach.load_encoder(other)  # whose own folder it is saved to at last
        assert torch.equal(model.encode(["a cat", "runs"]), vectors)
    assert not (other / "special_tokens_map.json").exists()


def test_pooling_of_another_model_is_not_kept_where_a_model_has_none(tmp_path):
    model = longreach.load_encoder(write(JINA, tmp_path / "model", tokenizer=False))
    write(JINA, tmp_path / "other", pooling=("cls", True))
    model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other/modules.json").exists()
    assert not (tmp_path / "other/sentence_bert_config.json").exists()
    assert (tmp_path / "other/tokenizer.json").exists()  # somebody may have put it there for a model that has none


def test_a_tokenizers_pooling_is_none_of_the_models(tmp_path):
    tokenizer = write(JINA, tmp_path / "tokenizer", pooling=("cls", True))
    folder = write(JINA, tmp_path / "model", tokenizer=False, pooling=("mean", False))
    model = longreach.load_encoder(folder, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(longreach.load_encoder(tmp_path / "saved").encode(["a cat"]), model.encode(["a cat"]))


def test_paths_out_of_the_folder_are_not_followed(tmp_path, jina):
    folder = tmp_path / "model"
    write(JINA, folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": "../outside"}]))
    with pytest.raises(ValueError, match=r"modules.json has path='../outside'"):
        longreach.load_encoder(folder).encode(["a"])
    assert Source(jina).find("nothing.json") is None


def test_memory_of_a_loaded_model_is_its_weights(tmp_path):
    """No parameter or buffer beside the file's: no table of biases."""
    model = longreach.load_encoder(write(JINA, tmp_path))
    held = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    assert held == sum(x.numel() for x in JINA.weights().values())
