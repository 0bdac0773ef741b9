"""The documentation site, and the scripts that fill its pages."""

import importlib.util
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longreach.cli import main
from longreach.data.prepare import DataConfig, prepare

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def script(name):
    """docs/name.py as a module, as it is when it is run."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, DOCS / "site.py", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page.stem for page in (tmp_path / "site").rglob("*.html")}
    assert pages >= {"index", "LOG", "CONTRIBUTING", *(page.stem for page in DOCS.glob("*.md"))}
    assert "q: Tensor" in re.sub("<[^>]*>", "", (tmp_path / "site/docs/api.html").read_text(encoding="utf-8"))


def test_each_public_function_tells_of_each_of_its_arguments():
    missing = []
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE):
        function = pkgutil.resolve_name(name)
        if inspect.isfunction(function):
            told = inspect.getdoc(function)
            arguments = inspect.signature(function).parameters
            missing += [
                (name, each) for each in arguments if not re.search(rf"^ +(.*, )?{each}(, .*)?:", told, re.MULTILINE)
            ]
    assert not missing


@pytest.mark.parametrize(
    ("tag", "fetches"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', True),
        ('<img alt="a" src=https://example.org/x.png>', True),
        ('<img src="docs/demo.svg">', False),
        ('<a href="https://arxiv.org/abs/2108.12409">', False),
    ],
)
def test_what_a_browser_would_fetch_is_told_from_links(tag, fetches):
    assert bool(script("site").FETCHED.search(tag)) == fetches


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """A folder with a tiny runs/demo, and a copy of what docs/refresh.py fills and runs."""
    folder = tmp_path_factory.mktemp("demo")
    words = "--methods alibi,learned --num-layers 1 --num-heads 2 --d-model 16 --vocab-size 300 --train-length 16"
    words += " --steps 3 --batch-size 4 --warmup-steps 1 --valid-lengths 16,64 --valid-tokens 256 --valid-fraction 0.2"
    words += f" --data {corpus} --cache {folder / 'cache'} --output {folder / 'runs/demo'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"<svg/>"))
        main(["compare", *words.split()])
    shutil.copy(ROOT / "README.md", folder)
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture
def page_of(folder, monkeypatch):
    """What a page says after a script ran on a copy of it."""
    monkeypatch.chdir(folder)
    return lambda name: (folder / name).read_text(encoding="utf-8")


def test_pages_are_filled_from_what_was_measured_and_the_notebook_runs(page_of, folder, monkeypatch):
    refresh = script("refresh")
    monkeypatch.setattr(refresh, "ROOT", folder)
    refresh.main("runs/demo")
    assert re.search(r"<!-- demo table -->\n\| method \| 16<br>1x", page_of("README.md"))
    assert "From 16 to 64 tokens (4x)" in page_of("README.md")
    for page in ("attention.md", "encoders.md", "extension.md", "parallel.md"):  # of the committed runs
        assert page_of(f"docs/{page}") == (DOCS / page).read_text(encoding="utf-8")
    page = page_of("docs/context.md")
    assert "trained at 16 tokens, tested at 16, 64: alibi, learned" in page
    assert re.search(r"^ +learned +[\d.]+ +-$", page, flags=re.MULTILINE)  # its table ends at 16
    assert re.search(r"alibi: gain [+-][\d.]+ = relief [+-][\d.]+ \+ beyond [+-][\d.]+", page)
    assert "![What this draws](context-1.svg)" in page
    assert b"tokens of context" in Path("docs/context-1.svg").read_bytes()  # matplotlib names each text in a comment
    assert re.search(r"alibi loss, nats per token +([\d.]+ +){2}[\d.]+\n", page)
    assert re.search(r"learned: .*holds 16", page)


@pytest.mark.transformers
def test_the_table_of_per_step_decoding(page_of, folder, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    per_step = script("per_step")
    monkeypatch.setattr(per_step, "LENGTH", 40)
    monkeypatch.setattr(per_step, "__file__", str(folder / "docs" / "per_step.py"))
    per_step.main()
    rows = re.findall(r"^\| (\w+), (linear|ntk) \| (\S+) \| ", page_of("docs/extension.md"), flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [(name, s) for name in per_step.FAMILIES for s in ("linear", "ntk")]
    assert all(float(constant) < 1e-4 for _, _, constant in rows)


@pytest.mark.transformers
def test_a_recipe_of_fine_tuning_fills_a_row(page_of, folder, corpus, monkeypatch):
    finetuning = script("finetuning")
    sizes = {"BATCH_TOKENS": 256, "VALID_BYTES": 20_000, "VALID_TOKENS": 512}
    for name, value in sizes.items():
        monkeypatch.setattr(finetuning, name, value)
    monkeypatch.setattr(finetuning, "PAGE", folder / "docs" / "finetuning.md")
    text = folder / "text.txt"
    text.write_text("".join(path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())), encoding="utf-8")
    texts = finetuning.split(text, folder)
    data = DataConfig(data=str(texts[0]), valid_data=str(texts[1]), vocab_size=300, cache=str(folder / "cache"))
    stock = finetuning.pretrain(finetuning.llama, folder / "stock", prepare(data, seed=0), 40, alibi=False)
    tuned = finetuning.fine_tune(stock, folder / "tuned", texts, steps=11)
    finetuning.fill("retrofitting llama", [finetuning.row("converted", tuned, texts[1])])
    assert re.search(r"^\| converted (\| [\d.]+ ){4}\|$", page_of("docs/finetuning.md"), flags=re.MULTILINE)


def test_the_page_is_what_the_notebook_says():
    """All but the figures: text and code of the page are those of the notebook."""
    page = (DOCS / "context.md").read_text(encoding="utf-8")
    for kind, source in script("notebook").cells((DOCS / "context.py").read_text(encoding="utf-8")):
        words = source if kind == "code" else re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        assert words in page
