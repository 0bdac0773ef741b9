"""docs/claims.md and the experiments that it tells of."""

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from experiments import page, run
from experiments.claim import HOLDS, IN_PART, NOT_HERE, verdict
from experiments.interpolation import commands as interpolation
from experiments.retrofit import claim as retrofit_claim
from experiments.retrofit import commands as retrofit
from longreach.cli import main as longreach
from longreach.data.prepare import DataConfig, prepare
from longreach.pretrained.convert import convert
from longreach.pretrained.save import save_pretrained
from longreach.reading import read_file
from longreach.results import Results
from longreach.verbs.compare import CompareConfig, compare

ROOT = Path(__file__).parents[2]

unrendered = pytest.mark.usefixtures("unrendered")


def test_the_page_and_its_figures_are_what_the_committed_results_give(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.main()
    assert (tmp_path / "docs/claims.md").read_bytes() == (ROOT / "docs/claims.md").read_bytes()
    made, committed = (
        {path.name: path.read_bytes() for path in (root / "docs/claims").iterdir()} for root in (tmp_path, ROOT)
    )
    assert made == committed


def test_every_experiment_is_on_the_page():
    folders = {path.parent.name for path in (ROOT / "experiments").glob("*/claim.py")}
    assert folders == set(page.EXPERIMENTS)


def test_committed_results_name_no_path_of_a_machine():
    for path in (ROOT / "experiments").glob("*/results*.json"):
        words = re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text())
        assert not [word for word in words if word.startswith(("/", "~")) or " /" in word]


@pytest.mark.parametrize(
    ("name", "unusual"),
    [
        ("train_short_test_long", []),
        ("slopes_of_12_heads", ["2 layers of width 144 with 12 heads (0.65M parameters)"]),
        ("headline", ["500 steps of 2,048 tokens"]),
        (
            "interpolation",
            ["2,000 steps of 1,024 tokens", "300 steps of 1,024 tokens", "24,576 tokens are scored"],
        ),
    ],
)
def test_what_an_experiment_has_otherwise_than_the_head_says_is_on_the_page(name, unusual):
    results = page.read(page.files(name))
    assert page.setting(results) == unusual
    assert not unusual or f"\n*Setting.* {'; '.join(unusual)}.\n" in page.section(name, results)


def test_the_page_says_what_text_each_is_to_be_run_again_with():
    text = (ROOT / "docs/claims.md").read_text()
    for name in page.EXPERIMENTS:
        assert f'*Run again.* `make experiments/{name} DATA="books/*.txt" VALID="held-out/*.txt"`' in text
        provenance = page.read(page.files(name)).provenance
        assert Path(provenance.corpus).name in text


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the committed results of `slopes`, where longreach finds these again, of a text that is named."""
    (tmp_path / "experiments/slopes").mkdir(parents=True)
    committed = tmp_path / "experiments/slopes/results.json"
    committed.write_bytes((ROOT / "experiments/slopes/results.json").read_bytes())
    monkeypatch.chdir(tmp_path)

    def find(corpus_hash):
        def longreach(words):
            assert words[words.index("--data") :][:4] == ["--data", "books", "--valid-data", "held-out"]
            results = Results.read(committed)
            found = replace(results.provenance, corpus_hash=corpus_hash, corpus="books")
            Path("runs/experiments/slopes").mkdir(parents=True)
            replace(results, provenance=found).write("runs/experiments/slopes/results.json")

        monkeypatch.setattr(run, "longreach", longreach)
        return committed

    return find


def test_results_of_the_same_text_take_the_place_of_the_committed_ones(checkout):
    committed = checkout(Results.read(ROOT / "experiments/slopes/results.json").provenance.corpus_hash)
    run.main("slopes", "books", "held-out")
    assert Results.read(committed).provenance.corpus == "books"


def test_committed_results_of_another_text_stay(checkout):
    committed = checkout("another")
    before = committed.read_bytes()
    with pytest.raises(ValueError, match=r"^experiments/slopes/results\.json: of another text than runs/.*remove that"):
        run.main("slopes", "books", "held-out")
    assert committed.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("slopes", "", "held-out"), "DATA is empty: give books, as docs/claims.md says at its head"),
        (("slopes", "books", ""), "VALID is empty: give books, as docs/claims.md says at its head"),
        (
            ("retrofit", "books", "held-out"),
            "runs/experiments/retrofit/smollm2 is not there: write it first, as experiments/retrofit/weights.py says",
        ),
    ],
)
def test_what_is_missing_is_told_in_one_line_before_any_work(words, line, tmp_path):
    command = [sys.executable, "-m", "experiments.run", *words]
    path = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"experiments.run: {line}\n")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text that a tokenizer of 300 tokens can be trained on."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(50)]
    lines = ('{"text": "' + " ".join(draw.choices(names, k=400)) + '"}' for _ in range(40))
    path.write_text("\n".join(lines))
    return str(path)


OF_ONE_COMPARISON = [name for name in page.EXPERIMENTS if run.several(name) is None]


@unrendered
@pytest.mark.parametrize("name", OF_ONE_COMPARISON)
def test_every_comparison_runs_at_toy_size_and_can_be_judged(name, words, tmp_path):
    config = toy(read_file(CompareConfig, ROOT / "experiments" / name / "config.toml"), words, str(tmp_path / "cache"))
    results = compare(config, tmp_path / "run", lambda *stage, **note: None)
    assert not results.failures()
    check_judged(name, results)


def test_one_comparison_is_one_command():
    (command,) = run.commands("slopes", ["--data", "a.txt"], [], "runs/slopes")
    assert command == [
        *("compare", "--config-file", "experiments/slopes/config.toml", "--data", "a.txt", "--output", "runs/slopes")
    ]


def check_judged(name, results):
    section = page.section(name, results)
    assert page.claim_of(name).statement in section
    assert any(f"**{word}.**" in section for word in (HOLDS, IN_PART, NOT_HERE))


def run_small(name, words, folder, smaller, monkeypatch):
    """Run all commands of an experiment, each with further options by its verb, into a folder; its results."""
    monkeypatch.chdir(ROOT)
    runs = str(folder / "runs")
    for command in run.commands(name, ["--data", words, "--valid-data", words], ["--data", words], runs):
        longreach([*command, *smaller(command)])
    return page.read(run.results(name, runs).values())


@unrendered
def test_interpolation_runs_at_toy_size_and_can_be_judged(words, tmp_path, monkeypatch):
    monkeypatch.setattr(interpolation, "SEEDS", (0,))
    monkeypatch.setattr(interpolation, "FOLDS", (1, 2))
    train = ["--steps", "2", "--warmup-steps", "1"]
    shape = ["--num-layers", "1", "--num-heads", "2", "--d-model", "8", "--vocab-size", "300"]
    test = ["--valid-tokens", "512", "--cases-per-depth", "1", "--num-depths", "1"]
    place = ["--cache", str(tmp_path / "cache")]

    def smaller(command):
        return test if command[0] == "evaluate" else train if "--from" in command else [*train, *shape, *place]

    check_judged("interpolation", run_small("interpolation", words, tmp_path, smaller, monkeypatch))


@unrendered
def test_the_retrofit_runs_at_toy_size_and_can_be_judged(words, tmp_path, monkeypatch):
    for module in (retrofit, retrofit_claim):
        for constant, value in {"TESTED": (512, 1024), "ASKED": (512,)}.items():
            monkeypatch.setattr(module, constant, value)
    prepared = prepare(DataConfig(data=words, vocab_size=300, cache=str(tmp_path / "cache")), 0, lambda *stage: None)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=512, **size)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "runs/smollm2")
    save_pretrained(convert(model), tmp_path / "runs/untrained")
    for name in ("smollm2", "untrained"):
        prepared.tokenizer.save(tmp_path / "runs" / name / "tokenizer.json")
    train = ["--steps", "2", "--warmup-steps", "1", "--cache", str(tmp_path / "cache")]
    asked = ["--cases-per-depth", "1", "--num-depths", "1"]

    def smaller(command):
        return train if command[0] == "train" else asked if "passkey" in command else []

    results = run_small("retrofit", words, tmp_path, smaller, monkeypatch)
    check_judged("retrofit", results)


def toy(config, words, cache):
    """The experiment with its methods and one seed: two steps of a small model, at an eighth of each length."""
    shrunk = {name: tuple(n // 8 for n in getattr(config, name)) for name in ("train_lengths",)}
    evaluate = replace(
        config.evaluate,
        valid_lengths=tuple(dict.fromkeys(n // 8 for n in config.evaluate.valid_lengths)),
        offsets=tuple(n // 8 for n in config.evaluate.offsets),
        valid_tokens=512,
        strides=tuple(min(stride, 4) for stride in config.evaluate.strides[:1]),
    )
    train = replace(config.train, steps=2, warmup_steps=1, train_length=config.train.train_length // 8)
    return replace(
        config,
        **shrunk,
        shapes=("1x8", "1x16")[: len(config.shapes)],
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
