"""The README's commands and code do what it says."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from longreach.cli import main
from longreach.data.found import walk
from longreach.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes a command of the README quick without changing what it does. Options given twice take the last value.
TRAINING = "--num-layers 1 --num-heads 2 --d-model 16 --vocab-size 300 --steps 3 --warmup-steps 1 --batch-size 2"
TESTING = "--valid-tokens 2048"
SMALLER = {
    "compare": f"{TRAINING} {TESTING}",
    "train": TRAINING,
    "evaluate": TESTING,
    "extend": TESTING,
}

pytestmark = pytest.mark.usefixtures("unrendered")


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def test_it_opens_with_two_commands():
    assert blocks("sh")[0].splitlines() == ["make demo", "make test"]


def test_make_demo_runs_what_it_says():
    plan = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "longreach compare --output runs/demo --seeds 0,1,2" in plan
    assert "`longreach compare --output runs/demo --seeds 0,1,2`" in README


@pytest.fixture
def _as_a_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Of Python's library a few files, as text that is much like the whole.
    monkeypatch.setattr("longreach.data.corpora.walk", lambda *folders: walk(*folders)[::10])
    Path("books").mkdir()
    for number in range(12):
        lines = (f"On page {page} of book {number}, {page * number} words are told.\n" for page in range(400))
        Path("books", f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    # What stands in a folder of the name of a model on the hub is loaded from there.
    folder = Path("bigscience/bloom-560m")
    tokenizer = train_tokenizer(["On page 7 of book 3, 21 words are told."], 300)
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, n_layer=1, n_head=2, seq_length=2048
    )
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")


@pytest.mark.usefixtures("_as_a_user")
def test_every_command_runs_in_order(capsys, keep_what_is_loaded):
    commands = [line for block in blocks("sh")[1:] for line in block.splitlines()]
    commands.insert(0, "longreach compare --output runs/demo --seeds 0,1,2")
    assert all(command.startswith("longreach ") for command in commands)
    for command in commands:
        words = shlex.split(command)[1:]
        smaller = SMALLER.get(words[0], "")
        if "--from" in words:  # a model with a tokenizer
            smaller = smaller.replace("--vocab-size 300", "")
        if words[0] == "evaluate" and "retrieval" in words:  # for which no text is read
            smaller = ""
        main([*words, *shlex.split(smaller)])
        keep_what_is_loaded()
        assert capsys.readouterr().out.strip(), command
    for path in ("runs/demo/report.html", "runs/demo/alibi-seed0/model.safetensors", "runs/books/results.json"):
        assert Path(path).exists()
    assert Path("runs/alibi-evaluation/report.html").exists()


@pytest.mark.parametrize("path", ["README.md", "docs/reach.md"])
def test_code_runs(path):
    (code,) = blocks("python", (ROOT / path).read_text(encoding="utf-8"))
    exec(compile(code, path, "exec"), {})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
