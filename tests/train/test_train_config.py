import contextlib
import dataclasses
from itertools import pairwise

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from longreach.data.prepare import DataConfig
from longreach.models.config import Architecture
from longreach.reading import plain_values, read_file
from longreach.train.config import PRESETS, RunConfig, TrainConfig
from longreach.verbs.compare import CompareConfig


@pytest.mark.parametrize("kind", [RunConfig, CompareConfig])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_their_file(tmp_path, kind, preset):
    config = dataclasses.replace(kind(), **PRESETS[preset])
    (tmp_path / "config.toml").write_text(tomli_w.dumps(plain_values(config)))
    assert read_file(kind, tmp_path / "config.toml") == config


@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-8, 10),
    text=st.text(max_size=20),
    heads=st.sampled_from([1, 2, 4, 8]),
)
def test_any_configuration_survives_its_file(tmp_path_factory, steps, rate, text, heads):
    config = RunConfig(
        data=DataConfig(data=text),
        model=Architecture(num_heads=heads),
        train=TrainConfig(steps=steps, warmup_steps=0, learning_rate=rate, mix=("retrieval=0.2",)),
    )
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(tomli_w.dumps(plain_values(config)))
    assert read_file(RunConfig, path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[train]\nstepz = 3\n",
            r"config\.toml: unknown key 'train\.stepz': did you mean steps\? Known are train_length",
        ),
        ("[train]\nsteps = 0\n", r"config\.toml: train\.steps=0: give a positive integer"),
        ("[train]\nprecision = 'fp8'\n", r"train\.precision='fp8': give 'auto', 'fp32' or 'bf16'"),
        ('method = "foo"\n', "method='foo': give one of alibi"),
        ("[model]\nnum_heads = 7\n", "model.num_heads=7 does not divide model.d_model=64"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_file(RunConfig, tmp_path / "config.toml")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"train_length": 0}, "train_length"),
        ({"steps": -1}, "steps"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 6, "accumulation": 4}, "accumulation"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"gradient_clip": float("inf")}, "gradient_clip"),
        ({"warmup_steps": 151}, "warmup_steps"),
        ({"final_learning_rate": 1.5}, "final_learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"mix": ("retrieval=2",)}, "mix"),
        ({"context_parallel": 3, "train_length": 2}, "context_parallel"),
        ({"context_parallel": 9, "train_length": 64, "curriculum": ("8:50%", "64:50%")}, "context_parallel"),
        ({"mix": ("lines=0.1",)}, "mix"),
    ],
)
def test_contradictions_are_named(values, name):
    with pytest.raises(ValueError, match=f"^{name}="):
        TrainConfig(**{"steps": 150, **values})


def test_a_curriculum_goes_through_its_lengths_by_their_shares():
    config = TrainConfig(train_length=64, steps=7, warmup_steps=0, curriculum=("16:50%", "64:25%", "32:25%"))
    assert [config.length_at(step) for step in range(7)] == [16, 16, 16, 16, 64, 32, 32]
    assert TrainConfig(train_length=64).length_at(5) == 64


@given(cuts=st.sets(st.integers(1, 99), max_size=5), steps=st.integers(1, 60))
def test_a_curriculum_that_is_taken_has_steps_of_every_stage(cuts, steps):
    borders = [0, *sorted(cuts), 100]
    lengths = [2**number for number in range(len(borders) - 1)]
    shares = [f"{length}:{end - start}%" for length, (start, end) in zip(lengths, pairwise(borders), strict=True)]
    with contextlib.suppress(ValueError):
        config = TrainConfig(train_length=lengths[-1], steps=steps, warmup_steps=0, curriculum=tuple(shares))
        assert list(dict.fromkeys(map(config.length_at, range(steps)))) == lengths


@pytest.mark.parametrize(
    ("curriculum", "changes", "message"),
    [
        (("16:90%", "64:10"), {}, r"^curriculum=16:90%,64:10: give LENGTH:SHARE% for each, as in 512:90%,2048:10%$"),
        (("0:50%", "64:50%"), {}, "give LENGTH:SHARE%"),
        (("16:0%", "64:100%"), {}, "give LENGTH:SHARE%"),
        (("16:50%", "64:49%"), {}, r"its shares are 99% in all; give 100%$"),
        (("16:50%", "32:50%"), {}, r"its longest is 32 and train_length=64: give the same$"),
        (("24:50%", "64:50%"), {}, r"24 does not divide 64, the longest: change one of them$"),
        (("16:99%", "64:1%"), {"steps": 40}, r"64:1% has none of steps=40, by whole steps: give it more$"),
        (
            ("16:15%", "64:10%", "32:75%"),
            {"steps": 10, "warmup_steps": 0},
            r"64:10% has none of steps=10, by whole steps: give it more$",
        ),
        (("64:1%", "32:99%"), {"steps": 40}, r"64:1% has none of steps=40, by whole steps: give it more$"),
        (("16:50%", "64:50%"), {"mix": ("retrieval=0.2",)}, r"would cut what is mixed in \(mix=retrieval=0\.2\)"),
    ],
)
def test_contradictory_curricula_are_refused(curriculum, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(train_length=64, curriculum=curriculum, **changes)
