"""Files that strangers made, through the command line: one line on standard error, status 2, and nothing hangs."""

import json
import os
import shutil
import socket

import pytest
import safetensors.torch
import torch
import transformers
from refusals import DEEP, refused, setting, text
from safetensors.torch import load_file

import longreach
from longreach.cli import main
from longreach.data.tokenizer import load_tokenizer
from longreach.train.checkpoint import save_checkpoint
from longreach.train.shards import read_manifest

SMALL = "--num-layers 1 --num-heads 2 --d-model 16 --vocab-size 300 --train-length 16 --batch-size 4 --warmup-steps 2"

pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [*SMALL.split(), "--data", str(corpus), "--valid-fraction", "0.2", "--cache", str(cache), "--steps", "4"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "--output", str(folder), *small, "--final-learning-rate", "1"])  # which keeps its checkpoint
    return folder


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    """A tiny MPT as somebody may have published it."""
    folder = tmp_path_factory.mktemp("published") / "mpt"
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    config = transformers.MptConfig(vocab_size=tokenizer.vocab_size, d_model=24, n_heads=6, n_layers=2, max_seq_len=32)
    torch.manual_seed(0)
    transformers.MptForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def model(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


def measured(folder, corpus):
    return ["evaluate", folder, "--data", corpus, "--lengths", "16", "--valid-tokens", "32", "--task", "perplexity"]


def in_place_of_it(make):
    def change(path):
        path.unlink(missing_ok=True)
        make(path)

    return change


def bind(path):
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # the name of a socket must be short
        try:
            listener.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)


NO_FILES = {
    "a pipe": in_place_of_it(os.mkfifo),
    "a folder": in_place_of_it(lambda path: path.mkdir()),
    "a socket": in_place_of_it(bind),
    "a device": in_place_of_it(lambda path: path.symlink_to("/dev/zero")),
    "cannot be read": in_place_of_it(lambda path: path.symlink_to(path.name)),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(capfd, run, kind, name):
    NO_FILES[kind](run / name)
    line = refused(capfd, "evaluate", run, "--lengths", "16", "--valid-tokens", "32")
    assert name in line
    assert kind in line


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"]
)
def test_nor_in_a_model_of_hugging_face(capfd, model, corpus, kind, name):
    NO_FILES[kind](model / name)
    line = refused(capfd, *measured(model, corpus))
    assert name in line or "config.json" in line


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (text("null"), "config.json: it holds no object"),
        (text("[]"), "no object"),
        (text("3"), "no object"),
        (text(""), "config.json: not a JSON file"),
        (text(DEEP), "config.json: nested too deeply"),
        (text('{"n_heads": 4, "n_heads": 4}'), "config.json: not a JSON file (the key 'n_heads' comes twice"),
        (setting("n_heads", '"x"'), "'n_heads'"),
        (setting("n_heads", "0"), "n_heads=0"),
        (setting("n_heads", "5"), "does not run"),
        (setting("n_layers", "-1"), "n_layers=-1"),
        (setting("n_layers", "1"), "nothing is made of transformer.blocks.1."),
        (setting("n_layers", "3"), "there is no transformer.blocks.2."),
        (setting("n_layers", "1000000000"), "n_layers=1000000000"),
        (setting("n_layers", "true"), "'n_layers'"),
        (setting("d_model", "48"), "should be (144, 48)"),
        (setting("d_model", "1e400"), "d_model"),
        (setting("vocab_size", "null"), "vocab_size"),
        (setting("max_seq_len", "-5"), "max_seq_len=-5"),
        (setting("max_seq_len", "[1, 2]"), "max_seq_len"),
        (setting("attn_config", '{"alibi_bias_max": NaN}'), "config"),
        (setting("model_type", '"nothing"'), "nothing"),
        (setting("dtype", '"float9"'), "float9"),
        (setting("layer_norm_epsilon", "1e400"), "config.json: layer_norm_epsilon=inf: give a finite number"),
        (setting("layer_norm_epsilon", "2.5"), "config.json: layer_norm_epsilon=2.5: give a number"),
        (setting("attn_config", '{"attn_pdrop": -Infinity}'), "attn_pdrop=-inf: give a finite number"),
        (setting("num_labels", "1000000000"), "num_labels=1000000000: give at most 65536"),
        (setting("text_config", '{"num_labels": 1000000000}'), "num_labels=1000000000: give at most 65536"),
    ],
)
def test_a_configuration_that_no_model_can_have(capfd, model, corpus, change, part):
    change(model / "config.json")
    assert part in refused(capfd, "extend", *measured(model, corpus)[1:], "--scaling", "linear")


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name: weight[:1] for name, weight in weights.items()},
        lambda weights: {name: weight * float("nan") for name, weight in weights.items()},
        lambda weights: dict(list(weights.items())[1:]),
        lambda weights: {**weights, "transformer.wpe.weight": torch.zeros(32, 24)},
        lambda weights: {},
        lambda weights: {name: weight.to(torch.int8) for name, weight in weights.items()},
        lambda weights: {**weights, "transformer.norm_f.weight": torch.ones(24, dtype=torch.int64)},
        lambda weights: {name: weight.bool() for name, weight in weights.items()},
        lambda weights: {name: weight.to(torch.complex64) for name, weight in weights.items()},
    ],
)
def test_weights_of_another_model(capfd, model, corpus, change):
    path = model / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})
    assert str(model) in refused(capfd, *measured(model, corpus))


@pytest.mark.parametrize("verb", ["evaluate", "extend", "doctor", "generate", "train --from"])
def test_a_model_without_a_tokenizer(capfd, model, corpus, verb, tmp_path):
    (model / "tokenizer.json").unlink()
    options = ["--data", corpus, "--output", tmp_path / "new", "--steps", "1", "--warmup-steps", "0"]
    line = refused(capfd, *verb.split(), model, *(options if "train" in verb else []))
    assert f"model '{model}': its tokenizer '{model}': no such file; give a tokenizer.json" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["evaluate", "extend", "doctor", "train"])
def test_pickled_weights_that_would_run_code(capfd, model, corpus, verb, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    words = {
        "doctor": ["doctor", model],
        "train": ["train", "--from", model, "--output", tmp_path / "new", "--data", corpus, "--steps", "1"],
    }.get(verb, [verb, *measured(model, corpus)[1:]])
    words += ["--warmup-steps", "0", "--train-length", "16"] if verb == "train" else []
    assert "safetensors" in refused(capfd, *words)
    assert not os.path.exists("pwned")


@pytest.mark.parametrize(
    "option",
    [
        *("--num-layers=2", "--num-heads=6", "--num-kv-heads=6", "--d-model=24", "--d-ff=96", "--norm=rmsnorm"),
        *("--activation=gelu", "--bias", "--no-tied-embeddings", "--attention-dropout=0.1", "--residual-dropout=0"),
        *("--longest-length=64", "--vocab-size=300", "--method=rotary", "--preset=cc100-1.3b"),
    ],
)
def test_what_a_model_of_hugging_face_has_by_itself(capfd, model, corpus, tmp_path, option):
    words = ["train", "--from", model, "--output", tmp_path / "new", "--data", corpus, "--steps", "1"]
    line = refused(capfd, *words, "--train-length", "16", "--warmup-steps", "0", option)
    assert option.partition("=")[0] in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        setting("n_heads", "5"),
        setting("layer_norm_epsilon", "null"),
        setting("layer_norm_epsilon", "NaN"),
        setting("attn_config", '{"softmax_scale": "x"}'),
        setting("expansion_ratio", '"x"'),
    ],
)
def test_a_model_that_does_not_run_is_not_trained(capfd, model, corpus, tmp_path, change):
    change(model / "config.json")
    words = ["train", "--from", model, "--output", tmp_path / "new", "--data", corpus, "--steps", "1"]
    line = refused(capfd, *words, "--train-length", "16", "--warmup-steps", "0", "--device", "cpu")
    assert str(model) in line
    assert "config" in line or "files" in line


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"transformer.wte.weight": "../other.safetensors"}},
        {"weight_map": {"transformer.wte.weight": "/etc/passwd"}},
        {"weight_map": {"transformer.wte.weight": 3}},
        {"weight_map": {"transformer.wte.weight": "a\0b"}},
        {"weight_map": {"transformer.wte.weight": "gone.safetensors"}},
        {"weight_map": []},
        {"metadata": 3, "weight_map": {}},
        "{",
        '{"weight_map": {}, "weight_map": {}}',
        [],
        None,
    ],
)
def test_an_index_that_names_other_files(capfd, model, corpus, index):
    (model / "model.safetensors").rename(model.parent / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    assert "safetensors" in refused(capfd, *measured(model, corpus))


def tokenizer_with(**parts):
    def change(path):
        values = json.loads(path.read_text())
        for name, part in parts.items():
            values[name] = {**values[name], **part} if name == "model" else part
        path.write_text(json.dumps(values))

    return change


def with_id(number):
    def change(path):
        values = json.loads(path.read_text())
        values["model"]["vocab"]["zz"] = number
        path.write_text(json.dumps(values))

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_id(2**31),
        with_id(2**32 - 1),
        with_id(-1),
        tokenizer_with(model={"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<|endoftext|>": 0}, "merges": []}),
        text(DEEP),
        text("null"),
    ],
)
def test_a_tokenizer_that_no_text_can_be_read_with(capfd, run, corpus, change):
    change(run / "tokenizer.json")
    assert "tokenizer" in refused(capfd, *measured(run, corpus))


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


TWICE = {"type": "Sequence", "normalizers": [replacing({"String": "e"}, "ee")] * 5}


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [TWICE] * 5}},
        {"normalizer": replacing({"String": "e"}, "e" * 10_000)},
        {"normalizer": replacing({"Regex": ""}, "e" * 10_000)},
        {"decoder": {"type": "Sequence", "decoders": [replacing({"String": "e"}, "ee")] * 25}},
        {"decoder": replacing({"String": "e"}, "e" * 10_000)},
    ],
)
def test_a_tokenizer_that_blows_texts_up(capfd, run, part):
    tokenizer_with(**part)(run / "tokenizer.json")
    line = refused(capfd, "generate", run, "--prompt", "e")
    assert f"its {next(iter(part))} may make texts over 4096 times as long" in line


def test_a_pattern_at_which_a_tokenizer_panics(capfd, run):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$|(a|aa)+b"}, "behavior": "Isolated", "invert": False}
    tokenizer_with(pre_tokenizer=pattern)(run / "tokenizer.json")
    record = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps(record | {"tokenizer_sha256": None}))  # as older runs have it
    assert "cannot encode the text" in refused(capfd, "generate", run, "--prompt", ("a" * 40 + " ") * 30 + "b")


@pytest.mark.parametrize("name", ["special_tokens_map.json"])
@pytest.mark.parametrize(
    "content", ["null", "[]", '{"eos_token": 3}', '{"eos_token": {"content": []}}', '{"eos_token": "no such"}', DEEP]
)
def test_an_end_of_text_that_is_none(capfd, run, corpus, name, content):
    (run / "tokenizer_config.json").unlink()
    (run / name).write_text(content)
    assert "token" in refused(capfd, *measured(run, corpus))


@pytest.mark.parametrize(
    "line", ["{}", "null", '{"step": 99999999999999999999}', DEEP, "\xff", '{"step": 1}', '{"step": 1, "loss": NaN}']
)
def test_a_damaged_log_is_found_before_training_goes_on(capfd, run, small, line):
    (run / "metrics.jsonl").write_text(f"{line}\n" * 4)
    (run / "training.json").unlink()
    words = ["train", "--output", run, *small, "--final-learning-rate", "1"]
    for _ in range(2):
        assert "metrics.jsonl is damaged" in refused(capfd, *words)


def with_values(**values):
    return lambda before, tensors: (before | values, tensors)


def with_tensors(change):
    """A change of tensors, by their names."""
    return lambda values, tensors: (values, change(tensors))


def of_weights(change):
    """A change of each weight and of no average."""
    return with_tensors(lambda tensors: {n: change(x) if n.startswith("model.") else x for n, x in tensors.items()})


def without(kind):
    return with_tensors(lambda tensors: {name: x for name, x in tensors.items() if not name.startswith(kind)})


CHECKPOINTS = {
    "nothing": lambda values, tensors: ({}, {}),
    "a step that is none": with_values(step="x"),
    "a step of before": with_values(step=1),
    "a step of a longer run": with_values(step=100),
    "no time": with_values(seconds=-1.0),
    "no batches": lambda values, tensors: ({name: values[name] for name in values if name != "batches"}, tensors),
    "no model": without("model."),
    "numbers of another type": of_weights(lambda weight: weight.to(torch.float16)),
    "numbers that are none": of_weights(lambda weight: weight * float("nan")),
    "averages of another shape": with_tensors(
        lambda tensors: {name: x[:1] if name.startswith("exp_avg.") else x for name, x in tensors.items()}
    ),
    "no averages": without("exp_avg."),
    "averages of which one is missing": without("exp_avg_sq."),
    "averages of other steps": with_tensors(
        lambda tensors: {name: x + 1 if name.startswith("step.") else x for name, x in tensors.items()}
    ),
    "no random state": without("random_state"),
    "another random state": with_tensors(lambda tensors: tensors | {"random_state": tensors["random_state"] * 0}),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_whose_digests_are_right_and_whose_content_is_not(capfd, run, small, kind):
    path = run / "checkpoint-4"
    values, tensors = CHECKPOINTS[kind](read_manifest(path).values, load_file(path / "0.safetensors"))
    shutil.rmtree(path)
    save_checkpoint(path, tensors, values)
    (run / "training.json").unlink()
    line = refused(capfd, "train", "--output", run, *small, "--final-learning-rate", "1")
    assert "checkpoint-4 is damaged" in line


@pytest.mark.parametrize(
    ("before", "after", "part"),
    [
        ('method = "alibi"', 'method = "none"', "method='none' and config.json method='alibi'"),
        ("train_length = 16", "train_length = 8", "train_length=8 and config.json train_length=16"),
        ("num_heads = 2", "num_heads = 4", "num_heads=4 and config.json num_heads=2"),
        ('activation = "gelu"', 'activation = "swiglu"', "activation='swiglu'"),
        ("seed = 0", "seed = 1", "seed=1 and training.json seed=0"),
    ],
)
def test_a_configuration_that_was_edited_after_training_labels_nothing(capfd, run, before, after, part):
    path = run / "config.toml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert part in refused(capfd, "generate", run)


@pytest.mark.parametrize(
    "content", ["a=" + DEEP, "x = [", "seed = nan", "\x00", "[train]\nsteps = 99999999999999999999"]
)
def test_a_configuration_file_that_is_none(capfd, tmp_path, content):
    (tmp_path / "c.toml").write_text(content)
    assert "c.toml" in refused(capfd, "train", "--config-file", tmp_path / "c.toml", "--output", tmp_path / "new")


@pytest.mark.parametrize(
    "words",
    [
        ["--num-layers", "1000000000"],
        ["--d-model", "1000000000000"],
        ["--d-ff", "1000000000000"],
        ["--vocab-size", "1000000000000"],
        ["--batch-size", "1000000000000"],
        ["--train-length", "1000000000000"],
        ["--num-heads", "1000000000", "--d-model", "1000000000"],
        ["--device", "meta"],
        ["--device", "cpu:-3"],
    ],
)
def test_what_no_machine_holds_is_refused_before_a_folder_is_made(capfd, small, tmp_path, words):
    assert refused(capfd, "train", "--output", tmp_path / "new", *small, *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num-depths", "100000000"),
        ("--cases-per-depth", "1000000000"),
        ("--lengths", "1000000000000"),
        ("--lengths", "64,9223372036854775807"),
        ("--summary-tokens", "1000000000000"),
        ("--offsets", "9223372036854775807"),
    ],
)
def test_what_would_have_no_end_is_refused(capfd, run, option, value):
    assert "give at most" in refused(capfd, "evaluate", run, "--task", "passkey", option, value)


def test_tokens_of_a_damaged_cache(capfd, run, small, tmp_path):
    cache = small[small.index("--cache") + 1]
    copied = shutil.copytree(cache, tmp_path / "cache")
    (run / "config.toml").write_text((run / "config.toml").read_text().replace(cache, str(copied)))
    for path in copied.glob("tokens-*/tokens.bin"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert "the cache of its tokens is damaged" in refused(capfd, "evaluate", run, "--lengths", "16")


@pytest.mark.parametrize("name", ["run", "."])
def test_doctor_says_what_it_takes(capfd, run, name):
    assert "it is no model of Hugging Face, which doctor examines" in refused(capfd, "doctor", run.parent / name)


def test_load_pretrained_says_what_loads_a_run(run):
    with pytest.raises(ValueError, match=r"is a run of longreach: longreach\.models\.files\.load_model") as raised:
        longreach.load_pretrained(run)
    assert "\n" not in str(raised.value)


def test_a_tiny_temperature_takes_the_likeliest(capfd, run):
    texts = []
    for temperature in ("0", "1e-300", "5e-324"):
        main(["generate", str(run), "--prompt", "a", "--max-new-tokens", "5", "--temperature", temperature])
        texts.append(capfd.readouterr().out)
    assert len(set(texts)) == 1


def test_weights_that_are_no_numbers_write_nothing(capfd, run):
    path = run / "model.safetensors"
    weights = {name: weight * float("inf") for name, weight in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(weights, path)
    assert "finite" in refused(capfd, "generate", run)
