import dataclasses
import json

import pytest

from longreach.data.prepare import DataConfig, prepare
from longreach.models.config import Architecture
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs.train import train_run

MIXED = RunConfig(
    model=Architecture(num_layers=1, num_heads=2, d_model=16),
    train=TrainConfig(
        train_length=48, steps=8, batch_size=4, warmup_steps=1, checkpoint_every=3, device="cpu", mix=("retrieval=0.5",)
    ),
)
PLAIN = dataclasses.replace(MIXED, train=dataclasses.replace(MIXED.train, mix=()))


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return prepare(DataConfig(data=str(corpus), vocab_size=300, cache=str(cache)), seed=0)


def losses(config, folder, prepared, stop_after=None):
    def progress(stage, done, total, note=""):
        if done == stop_after:
            raise Interrupted

    train_run(config, folder, progress, prepared)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_interrupted_mixed_run_resumes_to_the_same_numbers(tmp_path, prepared):
    whole = losses(MIXED, tmp_path / "whole", prepared)
    with pytest.raises(Interrupted):
        losses(MIXED, tmp_path / "parts", prepared, stop_after=5)
    assert losses(MIXED, tmp_path / "parts", prepared) == whole
    assert len(whole) == 8
    assert losses(PLAIN, tmp_path / "plain", prepared) != whole


def test_a_mix_that_does_not_fit_claims_no_folder(tmp_path, prepared):
    config = dataclasses.replace(MIXED, train=dataclasses.replace(MIXED.train, train_length=8))
    with pytest.raises(ValueError, match=r"^mix=retrieval=0.5: sequences of 9 tokens"):
        losses(config, tmp_path / "run", prepared)
    assert not (tmp_path / "run").exists()
