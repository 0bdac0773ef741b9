"""docs/claims.md and the experiments that it tells of."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import page
from experiments.claim import HOLDS, IN_PART, NOT_HERE, verdict
from longreach.reading import read_file
from longreach.results import Results
from longreach.verbs.compare import CompareConfig, compare

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_committed_results_give(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.main()
    assert (tmp_path / "docs/claims.md").read_bytes() == (ROOT / "docs/claims.md").read_bytes()


def test_every_experiment_is_on_the_page():
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/config.toml")}
    assert folders == set(page.EXPERIMENTS)


def test_committed_results_name_no_path_of_a_machine():
    for path in (ROOT / "experiments").glob("*/results.json"):
        provenance = Results.read(path).provenance
        named = [provenance.corpus, provenance.config["data"].get("data", ""), *provenance.sources]
        assert not [name for name in named if name.startswith(("/", "~"))]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text that a tokenizer of 300 tokens can be trained on."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(50)]
    lines = ('{"text": "' + " ".join(draw.choices(names, k=400)) + '"}' for _ in range(40))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("name", page.EXPERIMENTS)
def test_every_experiment_runs_at_toy_size_and_can_be_judged(name, words, tmp_path):
    config = toy(read_file(CompareConfig, ROOT / "experiments" / name / "config.toml"), words, str(tmp_path / "cache"))
    results = compare(config, tmp_path / "run", lambda *stage, **note: None)
    assert not results.failures()
    section = page.section(name, results)
    assert page.claim_of(name).statement in section
    assert any(f"**{word}.**" in section for word in (HOLDS, IN_PART, NOT_HERE))


def toy(config, words, cache):
    """The experiment with its methods and one seed: two steps of a small model, at an eighth of each length."""
    shrunk = {name: tuple(n // 8 for n in getattr(config, name)) for name in ("train_lengths",)}
    evaluate = replace(
        config.evaluate,
        valid_lengths=tuple(n // 8 for n in config.evaluate.valid_lengths),
        valid_tokens=512,
        strides=tuple(min(stride, 4) for stride in config.evaluate.strides[:1]),
    )
    train = replace(config.train, steps=2, warmup_steps=1, train_length=config.train.train_length // 8)
    return replace(
        config,
        **shrunk,
        seeds=config.seeds[:1],
        data=replace(config.data, data=words, vocab_size=300, cache=cache),
        model=replace(config.model, num_layers=1, num_heads=2, d_model=8),
        train=train,
        evaluate=evaluate,
    )


@pytest.mark.parametrize(
    ("parts", "word"), [([True, True], HOLDS), ([True, False], IN_PART), ([False, False], NOT_HERE)]
)
def test_verdicts(parts, word):
    assert verdict(parts) == word
