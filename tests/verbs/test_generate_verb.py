from dataclasses import replace

import pytest

from longreach.data.prepare import DataConfig
from longreach.models.config import Architecture
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs.generate import GenerateConfig, generate
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
    return GenerateConfig(runs / "alibi", prompt="document 3", max_new_tokens=60, seed=1)


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
    "changes", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}], ids=str
)
def test_values_out_of_range_are_named(config, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        list(generate(replace(config, **changes)))


def test_past_a_learned_table_is_refused(config, runs):
    with pytest.raises(ValueError, match=f"holds {LENGTH}"):
        list(generate(replace(config, run=runs / "learned")))
