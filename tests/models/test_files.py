import json

import pytest
import safetensors.torch
import torch
from variants import ARCHITECTURES, DYNAMIC, METHODS

from longreach.models.files import load_model, save_model


@pytest.fixture
def saved(build, tmp_path):
    """A folder that holds a small model."""
    save_model(build(dtype=torch.float32), tmp_path)
    return tmp_path


def assert_same(one, other):
    assert one.config == other.config
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_comes_back_bit_for_bit(build, tokens_of, tmp_path, architecture):
    model = build(dtype=torch.float32, **ARCHITECTURES[architecture])
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert_same(model, loaded)
    assert not loaded.training
    assert torch.equal(model(tokens_of(2, 20)), loaded(tokens_of(2, 20)))


@pytest.mark.parametrize("method", [*METHODS, *DYNAMIC])
def test_every_method_comes_back_bit_for_bit(build, tokens_of, tmp_path, method):
    model = build(method, torch.float32)
    save_model(model, str(tmp_path))
    loaded = load_model(str(tmp_path))
    assert_same(model, loaded)
    assert torch.equal(model(tokens_of(2, 20)), loaded(tokens_of(2, 20)))


def test_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "longreach"
    assert config["method"] == "alibi"
    assert set(safetensors.torch.load_file(saved / "model.safetensors")) == set(load_model(saved).state_dict())


def test_others_may_read_the_weights_if_they_may_read_the_rest(saved):
    modes = [(saved / name).stat().st_mode for name in ("config.json", "model.safetensors")]
    assert modes[0] == modes[1]


def test_saving_again_replaces(build, saved):
    other = build("rotary", torch.float32, seed=1, num_layers=1)
    save_model(other, saved)
    assert_same(load_model(saved), other)


def test_a_failed_save_leaves_the_old_model(build, saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_model(build("rotary", torch.float32, num_layers=1), saved)
    assert_same(load_model(saved), build(dtype=torch.float32))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file; give the folder of a trained run$"):
        load_model(saved)


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1], ids=lambda keep: f"{keep} bytes")
def test_cut_off_weights(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r": damaged or not a longreach model \(.*\); train it again$"):
        load_model(saved)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"model_type": "mpt"}', '{"model_type": "longreach"}', "\x00" * 20],
)
def test_a_configuration_that_is_none(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match="damaged or not a longreach model") as raised:
        load_model(saved)
    assert "\n" not in str(raised.value)


def test_a_configuration_that_is_no_text(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="damaged or not a longreach model"):
        load_model(saved)


def test_an_unknown_key_is_named(saved):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_embd": 3}))
    with pytest.raises(ValueError, match="unknown key 'n_embd': known are"):
        load_model(saved)


@pytest.mark.parametrize("value", ["x", -1, 2.5, [], [[]], {}, None, True, float("nan")], ids=repr)
def test_any_wrong_value_in_the_configuration_is_a_value_error(saved, value):
    path = saved / "config.json"
    values = json.loads(path.read_text())
    harmless = {("num_kv_heads", "None"), ("d_ff", "None"), ("longest_length", "None")}
    harmless |= {("tied_embeddings", "True")}
    for name in values:
        path.write_text(json.dumps({**values, name: value}))
        if (name, repr(value)) in harmless:
            load_model(saved)
            continue
        with pytest.raises(ValueError, match=r"damaged or not a longreach model|not the weights of"):
            load_model(saved)


@pytest.mark.parametrize(
    "changes", [{"num_layers": 3}, {"num_layers": 1}, {"d_ff": 16}, {"method": "t5"}, {"bias": True}], ids=str
)
def test_weights_of_another_configuration(saved, changes):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: not the weights of .*config\.json \(.*\); train"
    ) as raised:
        load_model(saved)
    assert "\n" not in str(raised.value)
