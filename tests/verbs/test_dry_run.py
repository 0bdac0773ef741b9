from dataclasses import replace

import pytest

from longreach.cli import main
from longreach.data.prepare import DataConfig
from longreach.models.config import Architecture
from longreach.models.decoder import Decoder
from longreach.train.config import RunConfig, TrainConfig
from longreach.train.parallel import Ranks
from longreach.verbs import dry_run as module
from longreach.verbs.dry_run import dry_run


def silent(stage, done, total, note=""):
    pass


@pytest.fixture
def config(corpus, tmp_path):
    return RunConfig(
        data=DataConfig(data=str(corpus), vocab_size=300, valid_fraction=0.2, cache=str(tmp_path / "cache")),
        model=Architecture(num_layers=2, num_heads=2, d_model=16),
        train=TrainConfig(train_length=16, steps=1000, batch_size=4, accumulation=2, device="cpu", precision="fp32"),
    )


def test_it_counts_what_a_training_takes_and_writes_nothing(config, tmp_path):
    forecast = dry_run(config, silent)
    parameters = sum(parameter.numel() for parameter in Decoder(config.model_config(300)).parameters())
    assert (forecast.parameters, forecast.weights, forecast.optimizer) == (parameters, 4 * parameters, 8 * parameters)
    # Half a batch of 4 x 16 tokens: 17 vectors of 16 numbers in each of 2 blocks, and logits with their gradient.
    assert forecast.activations == 32 * (2 * 17 * 16 * 4 + 300 * 8)
    assert forecast.estimate == 16 * parameters + forecast.activations
    assert (forecast.tokens_per_step, forecast.steps) == (64, 1000)
    assert forecast.fits
    assert forecast.seconds_per_step > 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("changes", "name", "factor"),
    [
        ({"precision": "bf16"}, "activations", (2 * 17 * 16 * 2 + 300 * 10) / (2 * 17 * 16 * 4 + 300 * 8)),
        ({"recompute": True}, "activations", ((2 + 17) * 16 * 4 + 300 * 8) / (2 * 17 * 16 * 4 + 300 * 8)),
        ({"accumulation": 1}, "activations", 2),
    ],
)
def test_what_changes_memory_is_heeded(config, monkeypatch, changes, name, factor):
    monkeypatch.setattr(module, "total_memory", lambda device: 0)  # nothing is tried
    before, after = (
        getattr(dry_run(replace(config, train=train), silent), name)
        for train in (config.train, replace(config.train, **changes))
    )
    assert after == pytest.approx(factor * before)


def test_what_will_not_fit_is_not_tried(config, monkeypatch, capsys):
    monkeypatch.setattr(module, "total_memory", lambda device: 1000)
    forecast = dry_run(config, silent)
    assert not forecast.fits
    assert forecast.seconds_per_step is None
    words = f"--data {config.data.data} --cache {config.data.cache} --valid-fraction 0.2 --vocab-size 300 --device cpu"
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--output", "nowhere", "--dry-run", *words.split()])
    said = capsys.readouterr()
    assert said.out.splitlines()[1].startswith("memory of each in GiB: weights 0.00, gradients 0.00, optimizer 0.00")
    assert "longreach train: it will not fit: give --recompute, a larger --accumulation, or" in said.err


def test_processes_of_torchrun_share_a_machine_s_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Ranks(0, 4).processes_here == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert Ranks(0, 4).processes_here == 4
    assert Ranks().processes_here == 1


def test_a_pretrained_model_is_refused(config, monkeypatch):
    monkeypatch.setattr(module, "check_start", lambda config, load: "its configuration")
    with pytest.raises(ValueError, match=r"^dry_run: start_from='org/model' has a shape of its own: leave dry_run"):
        dry_run(replace(config, start_from="org/model"), silent)
