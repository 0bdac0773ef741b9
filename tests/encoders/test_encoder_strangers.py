"""Encoders that strangers published, through the command line: one line on standard error, and nothing is written."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from published import Published, write
from refusals import DEEP, refused, setting, text


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(Published("jina", layers=1), tmp_path_factory.mktemp("published") / "jina", pooling=("mean", True))


@pytest.fixture
def model(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


@pytest.fixture
def embedded(model, tmp_path):
    (tmp_path / "a.txt").write_text("the cat runs and runs, 1 2 3")
    return ["embed", model, "--data", tmp_path / "a.txt", "--output", tmp_path / "v.npy"]


@pytest.fixture
def examined(model, tmp_path, embedded):
    return ["doctor", model, "--text", tmp_path / "a.txt", "--lengths", "8"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (setting("num_hidden_layers", "16000000"), "weights of 1 layers"),
        (setting("num_hidden_layers", "1000000000"), "num_hidden_layers=1000000000: give 1 to"),
        (setting("vocab_size", "9000000000000000000"), "vocab_size=9000000000000000000"),
        (setting("max_position_embeddings", "-5"), "max_position_embeddings=-5"),
        (setting("layer_norm_eps", "0"), "layer_norm_eps=0"),
        (setting("layer_norm_eps", "-1e-5"), "layer_norm_eps=-1e-05"),
        (setting("hidden_dropout_prob", "3"), "hidden_dropout_prob=3"),
        (setting("attention_probs_dropout_prob", "-1"), "attention_probs_dropout_prob=-1"),
        (setting("dtype", '"float9"'), "float9"),
        (setting("dtype", '"int8"'), "int8"),
        (setting("dtype", "[1]"), "dtype=[1]"),
        (setting("hidden_act", "3"), "config.json"),
        (setting("initializer_range", '"x"'), "config.json"),
        (setting("id2label", "5"), "config.json"),
        (setting("num_labels", "1000000000"), "num_labels=1000000000: give at most 65536"),
        (text(DEEP), "nested too deeply"),
    ],
)
def test_a_configuration_that_no_encoder_can_have(capfd, model, embedded, examined, change, part):
    change(model / "config.json")
    for command in (embedded, examined):
        assert part in refused(capfd, *command)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sentence_bert_config.json", []),
        ("sentence_bert_config.json", {"max_seq_length": "x"}),
        ("sentence_bert_config.json", {"max_seq_length": -5}),
        ("sentence_bert_config.json", {"max_seq_length": 2.5}),
        ("sentence_bert_config.json", {"max_seq_length": True}),
        ("modules.json", {"a": 1}),
        ("modules.json", ["a"]),
        ("modules.json", 3),
        ("modules.json", [{"type": "x.Pooling", "path": "../other"}]),
        ("1_Pooling/config.json", []),
        ("1_Pooling/config.json", {"pooling_mode": "all"}),
    ],
)
def test_files_that_say_nothing_of_texts(capfd, model, embedded, file, content):
    (model / file).write_text(json.dumps(content))
    assert file.split("/")[0].removesuffix(".json").split("_")[-1].lower() in refused(capfd, *embedded).lower()


def replacing(pattern):
    return {"type": "Replace", "pattern": pattern, "content": "e" * 10_000}


def tokenizer_with(path, **parts):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | parts))


@pytest.mark.parametrize(
    ("parts", "part"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"the": 5000}, "unk_token": "the"}}, "makes the token 5000"),
        ({"model": {"type": "WordLevel", "vocab": {"the": 2**32 - 1}, "unk_token": "the"}}, "4294967295"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}, "cannot encode the text"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10_000}},
            "4096 times as long",
        ),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "e" * 10_000}}, "4096 times as long"),
        ({"model": None}, "tokenizer.json is damaged"),
    ],
)
@pytest.mark.parametrize("of_another", [False, True])
def test_a_tokenizer_that_no_text_can_be_read_with(capfd, model, embedded, parts, part, of_another):
    tokenizer_with(model / "tokenizer.json", added_tokens=[], post_processor=None, **parts)
    if of_another:
        other = shutil.copytree(model, model.with_name("other"))
        (model / "tokenizer.json").unlink()
        embedded += ["--tokenizer", other]
    assert part in refused(capfd, *embedded)


def test_a_pattern_at_which_a_tokenizer_panics(capfd, model, embedded):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$|(a|aa)+b"}, "behavior": "Isolated", "invert": False}
    tokenizer_with(model / "tokenizer.json", pre_tokenizer=pattern)
    model.with_name("a.txt").write_text(("a" * 40 + " ") * 30 + "b")
    assert "cannot encode the text" in refused(capfd, *embedded)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "a\0b"}},
        {"weight_map": {"a": "gone.safetensors"}},
        {"weight_map": {}},
        [],
    ],
)
def test_an_index_that_names_other_files(capfd, model, embedded, index):
    (model / "model.safetensors").rename(model.with_name("model.safetensors"))
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model" in refused(capfd, *embedded)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight * float("nan"),
        lambda weight: weight / 0,
        lambda weight: weight * 1e38,
        lambda weight: weight.to(torch.int64),
        lambda weight: weight[:1],
    ],
)
def test_weights_that_are_no_numbers_write_nothing(capfd, model, embedded, change, tmp_path):
    path = model / "model.safetensors"
    weights = {name: change(weight).clone() for name, weight in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path)
    assert refused(capfd, *embedded)
    assert not (tmp_path / "v.npy").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02h\x05.", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f"])
def test_pickles_that_are_none(capfd, model, embedded, content):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin holds no tensors" in refused(capfd, *embedded)
