import math
from dataclasses import replace

import pytest
import torch
import transformers
from published import Published, write

from longreach.data.prepare import DataConfig
from longreach.data.tokenizer import load_tokenizer
from longreach.models.config import Architecture
from longreach.pretrained.extend import extend
from longreach.pretrained.load import stretch
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs.generate import GenerateConfig, generate
from longreach.verbs.start import starting_config
from longreach.verbs.train import train_run

LENGTH = 16


def silent(stage, done, total, note=""):
    pass


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folders of trained runs, by method."""
    folder = tmp_path_factory.mktemp("runs")
    data = DataConfig(data=str(corpus), vocab_size=300, valid_fraction=0.2, cache=str(folder / "cache"))
    train = TrainConfig(train_length=LENGTH, steps=4, batch_size=4, warmup_steps=2, device="cpu")
    for method in ("alibi", "learned"):
        config = RunConfig(
            method=method, data=data, model=Architecture(num_layers=1, num_heads=2, d_model=16), train=train
        )
        train_run(config, folder / method, silent)
    return folder


@pytest.fixture
def config(runs):
    return GenerateConfig(str(runs / "alibi"), prompt="document 3", max_new_tokens=60, seed=1)


def test_pieces_past_the_training_length_are_those_of_the_seed(config):
    prompt, *pieces = generate(config)
    assert prompt == "document 3"
    assert LENGTH < len(pieces) <= 61  # and what the decoder holds back until the end
    assert list(generate(config)) == [prompt, *pieces]
    assert list(generate(replace(config, seed=2))) != [prompt, *pieces]


def test_without_a_prompt_it_begins_a_document(config):
    begun = [list(generate(replace(config, prompt=None, seed=seed))) for seed in range(4)]
    assert {pieces[0] for pieces in begun} == {""}
    assert any("".join(pieces) for pieces in begun)  # a seed may end it at once


@pytest.mark.parametrize(
    "changes",
    [
        *({"temperature": value} for value in (-1.0, math.inf, math.nan)),
        *({"top_p": value} for value in (0.0, 1.01, math.nan)),
        {"top_k": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(config, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name}="):
        replace(config, **changes)


def test_past_a_learned_table_is_refused(config, runs):
    with pytest.raises(ValueError, match=f"takes {LENGTH}"):
        list(generate(replace(config, model=str(runs / "learned"))))


@pytest.fixture(scope="module")
def pretrained(runs):
    """Folders that transformers saved models to, by type; a BLOOM has ALiBi, a GPT-2 a table, a Llama turns."""
    tokenizer = load_tokenizer(runs / "alibi" / "tokenizer.json")
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    models = {
        "bloom": transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, seq_length=LENGTH)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_positions=LENGTH)),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
            )
        ),
    }
    generator = torch.Generator().manual_seed(0)
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        model.save_pretrained(runs / name)
        tokenizer.save(runs / name / "tokenizer.json")
    return runs


@pytest.mark.parametrize(("model", "scaling"), [("bloom", None), ("bloom", "linear"), ("llama", "linear")])
def test_a_pretrained_model_is_continued_exactly_past_its_training_length(pretrained, config, model, scaling):
    folder = str(pretrained / model)
    added = "".join(list(generate(replace(config, model=folder, temperature=0.0, scaling=scaling)))[1:])
    tokenizer, model = load_tokenizer(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.encode(config.prompt)
    length = len(ids) + config.max_new_tokens
    if model.config.model_type == "llama":
        stretch(model, f"linear-fixed={length / LENGTH}")
    else:
        extend(model, scaling=scaling, length=length)
    for _ in range(config.max_new_tokens):  # each token from a full forward pass
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    assert len(ids) > LENGTH
    assert config.prompt + added == tokenizer.decode(ids)


def test_a_pretrained_model_is_sampled_by_the_seed(pretrained, config):
    config = replace(config, model=str(pretrained / "gpt2"), max_new_tokens=8, prompt="d")
    texts = ["".join(generate(replace(config, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_what_train_from_wrote_is_continued(pretrained, config, corpus, tmp_path):
    start = starting_config(str(pretrained / "bloom"))
    data = replace(start.data, data=str(corpus), valid_fraction=0.2, cache=str(tmp_path / "cache"))
    train = replace(start.train, steps=1, batch_size=2, warmup_steps=0, device="cpu")
    train_run(replace(start, data=data, train=train), tmp_path / "run", silent)
    pieces = list(generate(replace(config, model=str(tmp_path / "run"))))
    assert pieces[0] == config.prompt
    assert len(pieces) > LENGTH


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        ("alibi", {"dtype": "float32"}, "dtype=float32: .* is a run"),
        ("alibi", {"train_length": 8}, "train_length=8: .* is a run"),
        ("alibi", {"scaling": "linear"}, "scaling=linear: .* is a run"),
        ("bloom", {"dtype": "int8"}, "dtype='int8'"),
        ("bloom", {"top_k": 0}, "top_k=0"),
        ("bloom", {"scaling": "wide"}, "^scaling='wide'"),
        ("gpt2", {}, "takes 16; ask for fewer"),
        ("gpt2", {"scaling": "linear"}, "^scaling=linear: .*gpt2"),
        (
            "gpt2",
            {"train_length": 8, "prompt": "d", "max_new_tokens": 1},
            "^train_length=8: nothing is scaled by it",
        ),
        ("bloom", {"device": ""}, "^device=''"),
        ("bloom", {"dtype": ""}, "^dtype=''"),
        ("encoder", {}, "is an encoder: longreach embed"),
        ("untold", {}, "tokenizer"),
    ],
)
def test_what_cannot_be_continued_is_told(pretrained, config, model, changes, told):
    folder = pretrained / model
    if model == "encoder":
        write(Published("jina", layers=1), folder)
    if model == "untold":
        transformers.AutoModelForCausalLM.from_pretrained(pretrained / "bloom").save_pretrained(folder)
    with pytest.raises(ValueError, match=told):
        list(generate(replace(config, model=str(folder), **changes)))


def test_an_empty_prompt_is_refused(config):
    with pytest.raises(ValueError, match="prompt is empty"):
        replace(config, prompt="")
