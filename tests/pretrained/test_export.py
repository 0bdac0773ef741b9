import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MptForCausalLM

from longreach.data.tokenizer import train_tokenizer
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.pretrained.export import export_mpt

TRAIN_LENGTH, MAX_LENGTH = 24, 100


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The folder of a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 20], vocab_size=280).save(
        folder / "tokenizer.json"
    )
    return folder


def build(**fields):
    """A small decoder whose weights make every part of it matter."""
    shape = {"num_layers": 2, "num_heads": 4, "d_model": 48, "vocab_size": 300, "train_length": TRAIN_LENGTH, **fields}
    model = Decoder(ModelConfig(**shape)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def tokens_of(*shape):
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(1))


def load(folder, **options):
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("num_heads", [4, 6, 12])
def test_stock_transformers_gives_our_logits_up_to_max_length(tmp_path, tokenizer, num_heads):
    model = build(num_heads=num_heads)
    export_mpt(model, tmp_path / "mpt", max_length=MAX_LENGTH, tokenizer=tokenizer)
    stock = load(tmp_path / "mpt")
    assert type(stock) is MptForCausalLM
    assert stock.dtype == torch.float32
    with torch.inference_mode():
        for length in (1, TRAIN_LENGTH, MAX_LENGTH):
            tokens = tokens_of(2, length)
            logits = model(tokens)
            assert (stock(tokens).logits - logits).abs().max() < 1e-5 * max(1.0, float(logits.abs().max()))


def test_others_may_read_the_weights_if_they_may_read_the_rest(tmp_path):
    export_mpt(build(), tmp_path / "mpt", max_length=MAX_LENGTH)
    assert len({path.stat().st_mode for path in (tmp_path / "mpt").iterdir()}) == 1


def test_generation_by_stock_transformers_is_ours(tmp_path, tokenizer):
    model, prompt = build(), tokens_of(1, 20)
    export_mpt(model, tmp_path / "mpt", max_length=MAX_LENGTH, tokenizer=tokenizer)
    stock = load(tmp_path / "mpt")
    eos_id = AutoTokenizer.from_pretrained(tmp_path / "mpt").eos_token_id
    assert stock.generation_config.eos_token_id == eos_id is not None
    ours, ids = [], prompt
    while len(ours) < 40 and (token := int(model(ids)[0, -1].argmax())) != eos_id:
        ours.append(token)
        ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
    theirs = stock.generate(prompt, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(prompt))
    theirs = theirs[0, 20:].tolist()
    assert [token for token in theirs if token != eos_id] == ours
    assert len(ours) > 20 or theirs[-1] == eos_id


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_bit_identical(tmp_path, dtype):
    model = build().to(dtype)
    export_mpt(model, tmp_path / "mpt", max_length=MAX_LENGTH)
    stock = load(tmp_path / "mpt", dtype="auto")
    assert stock.dtype == dtype
    weights = safetensors.torch.load_file(tmp_path / "mpt" / "model.safetensors")
    state = stock.state_dict()
    assert set(state) - set(weights) == {"lm_head.weight"}  # tied
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    stock.save_pretrained(tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert torch.equal(weights["transformer.wte.weight"], model.vocabulary.embedding.weight)
    assert torch.equal(weights["transformer.blocks.1.attn.Wqkv.weight"], model.blocks[1].attention.qkv.weight)


def test_config_is_what_other_readers_look_for(tmp_path, tokenizer):
    export_mpt(build(), tmp_path / "mpt", max_length=MAX_LENGTH, tokenizer=tokenizer)
    config = json.loads((tmp_path / "mpt" / "config.json").read_text())
    assert config["architectures"] == ["MPTForCausalLM"]
    assert config["max_seq_len"] == MAX_LENGTH
    assert config["train_length"] == TRAIN_LENGTH
    assert config["tie_word_embeddings"] is config["no_bias"] is config["use_cache"] is True
    assert config["norm_type"] == "low_precision_layernorm"
    attention = config["attn_config"]
    assert attention["alibi"] is True
    assert attention["alibi_bias_max"] == 8
    assert [attention[key] for key in ("clip_qkv", "softmax_scale", "qk_ln", "prefix_lm")] == [None, None, False, False]


def test_tokenizer_comes_along(tmp_path, tokenizer):
    export_mpt(build(), tmp_path / "mpt", max_length=MAX_LENGTH, tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "mpt")
    text = "the quick brown fox"
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token == "<|endoftext|>"
    assert (tmp_path / "mpt" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_files_without_a_tokenizer(tmp_path):
    export_mpt(build(), tmp_path / "a" / "b", max_length=MAX_LENGTH)
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert "AutoTokenizer" not in (tmp_path / "a" / "b" / "README.md").read_text()


def test_model_card(tmp_path, tokenizer):
    table = "| length | perplexity |\n|---|---|\n| 24 | 17.2 |"
    export_mpt(build(), tmp_path / "my-model", max_length=4096, tokenizer=tokenizer, card_table=table)
    card = (tmp_path / "my-model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"\n{table}\n" in card
    assert "# my-model" in card
    assert "| 2 | 4 | 48 | 300 | 24 |" in card
    assert "up to 4,096 tokens" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert 'AutoTokenizer.from_pretrained("my-model")' in code
    compile(code, "card", "exec")


def test_writing_imports_no_transformers():
    code = (
        "import sys, tempfile, pathlib, longreach.models.decoder as d, longreach.models.config as c\n"
        "from longreach.pretrained.export import export_mpt\n"
        "model = d.Decoder(c.ModelConfig(num_layers=1, num_heads=2, d_model=8, vocab_size=9, train_length=4))\n"
        "export_mpt(model, pathlib.Path(tempfile.mkdtemp()) / 'out', max_length=8)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": "rotary"}, "its position method is rotary, MPT has ALiBi"),
        ({"method": "none"}, "its position method is none"),
        ({"method": "alibi:scaling=linear-fixed=2"}, "its slopes are scaled"),
        ({"method": "alibi:scaling=linear"}, "its slopes are scaled"),
        ({"method": "alibi:learned=true"}, "its slopes are learned"),
        ({"method": "alibi:slopes=closed"}, "its slopes are of another sequence"),
        ({"method": "alibi:exponent=4"}, "its slopes are of another sequence"),
        ({"norm": "rmsnorm"}, "its norm is rmsnorm, MPT's is layernorm"),
        ({"activation": "swiglu"}, "its activation is swiglu, MPT's is gelu"),
        ({"bias": True}, "it has biases"),
        ({"tied_embeddings": False}, "embeddings are not tied"),
        ({"num_kv_heads": 2}, "4 query heads share 2 key heads"),
        ({"d_ff": 100}, "its d_ff is 100, MPT's is 4 d_model = 192"),
    ],
)
def test_what_mpt_cannot_hold_is_refused(tmp_path, fields, why):
    with pytest.raises(ValueError, match=f"^MPT cannot hold this model without loss: .*{why}.*"):
        export_mpt(build(**fields), tmp_path / "mpt", max_length=MAX_LENGTH)
    assert not list(tmp_path.iterdir())


def test_every_obstacle_is_named_at_once(tmp_path):
    model = build(norm="rmsnorm", activation="swiglu", num_kv_heads=2)
    with pytest.raises(ValueError, match=r"norm is rmsnorm.*; its activation is swiglu.*; 4 query heads share 2"):
        export_mpt(model, tmp_path / "mpt", max_length=MAX_LENGTH)


def test_what_says_the_default_outright_is_held(tmp_path):
    model = build(method="alibi:scaling=none:learned=false", num_kv_heads=4, d_ff=192)
    export_mpt(model, tmp_path / "mpt", max_length=TRAIN_LENGTH)
    assert load(tmp_path / "mpt").config.max_seq_len == TRAIN_LENGTH


@pytest.mark.parametrize("max_length", [TRAIN_LENGTH - 1, 0, -5, True, 64.0, None])
def test_max_length_that_does_not_do(tmp_path, max_length):
    with pytest.raises(ValueError, match=r"max_length=.*: give an integer of at least 24, in tokens"):
        export_mpt(build(), tmp_path / "mpt", max_length=max_length)


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer=.*nowhere'.*holds a tokenizer.json"):
        export_mpt(build(), tmp_path / "mpt", max_length=MAX_LENGTH, tokenizer=tmp_path / "nowhere")


def test_a_tokenizer_of_another_model(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"has token id \d+, the model has 100: give its own"):
        export_mpt(build(vocab_size=100), tmp_path / "mpt", max_length=MAX_LENGTH, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"half')
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
        export_mpt(build(), tmp_path / "mpt", max_length=MAX_LENGTH, tokenizer=tmp_path)


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "mpt").mkdir()
    (tmp_path / "mpt" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mpt' exists: give a new one"):
        export_mpt(build(), tmp_path / "mpt", max_length=MAX_LENGTH)
    assert [path.name for path in tmp_path.rglob("*")] == ["mpt", "thesis.txt"]


def test_an_empty_folder_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_mpt(build(), ".", max_length=MAX_LENGTH)
    assert load(tmp_path).config.n_layers == 2


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), safetensors.SafetensorError("disk"), KeyboardInterrupt()]
)
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        export_mpt(build(), tmp_path / "mpt", max_length=MAX_LENGTH)
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_folder_and_the_next_one_works(tmp_path):
    code = (
        "import os, sys, safetensors.torch, longreach.models.decoder as d, longreach.models.config as c\n"
        "from longreach.pretrained.export import export_mpt\n"
        "def killed(weights, path, metadata):\n"
        "    path.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "safetensors.torch.save_file = killed\n"
        "model = d.Decoder(c.ModelConfig(num_layers=1, num_heads=2, d_model=8, vocab_size=9, train_length=4))\n"
        "export_mpt(model, sys.argv[1], max_length=8)\n"
    )
    target = tmp_path / "mpt"
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    assert not target.exists()
    export_mpt(build(), target, max_length=MAX_LENGTH)
    assert [path.name for path in tmp_path.iterdir()] == ["mpt"]
    assert load(target).config.n_layers == 2
