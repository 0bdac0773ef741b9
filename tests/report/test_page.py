import base64
import dataclasses
import html
import html.parser
import json
import math
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from longreach.report.page import write_report
from longreach.results import Results

CITATION_LINKS = {"https://arxiv.org/abs/2108.12409v2"}


class Page(html.parser.HTMLParser):
    """The tags and attributes of a page, its text, and whether every tag that was opened was closed."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(path):
    return path.read_text(encoding="utf-8")


def assert_needs_nothing_but_itself(source):
    for tag, attributes in Page(source).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "srcset", "data", "poster", "background", "action"):
            assert attributes.get(name, "data:").startswith("data:")
        if "href" in attributes:
            assert (tag, attributes["href"]) in {("a", link) for link in CITATION_LINKS}
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*)</style>", source, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    # What the embedded images refer to lies within them.
    for image in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", source):
        for element in ElementTree.fromstring(base64.b64decode(image)).iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
    assert "default-src 'none'" in source


def test_page_says_what_was_measured(demo, tmp_path):
    path = write_report(demo, tmp_path / "new" / "folder")
    text = Page(read(path)).text
    for expected in (
        "alibi (0.98x) extrapolates from 128 to 2,048 tokens (16x)",
        "The shape agrees with the paper's",
        "Perplexity per token, trained at 128 tokens",
        "130.50",
        "Bits per byte",
        "Evaluation speed",
        "Peak memory of evaluation",
        "its table holds 128 positions",
        "4,213,760",
        "Press, Smith and Lewis",
        "commit abc123",
        "c0ffee",
        '"d_model": 256',
    ):
        assert expected in text
    assert sorted(os.listdir(path.parent)) == ["figures", "report.html"]
    assert sorted(os.listdir(path.parent / "figures")) == [
        f"{name}.{kind}" for name in ("paper", "perplexity") for kind in ("png", "svg")
    ]
    for kind in ("paper", "perplexity"):
        assert (path.parent / "figures" / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.fromstring((path.parent / "figures" / f"{kind}.svg").read_bytes())


def test_how_many_figures_are_drawn_is_told_from_the_first_on(demo, tmp_path):
    told = []
    write_report(demo, tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_page_of_everything_needs_nothing_but_itself(everything, tmp_path):
    source = read(write_report(everything, tmp_path))
    assert_needs_nothing_but_itself(source)
    page = Page(source)
    for expected in (
        "In perplexity at 256 tokens, alibi trained at 128 is worse than sinusoidal trained at 256",
        "Perplexity per word, trained at 256",
        "Past 128 tokens of context, loss falls further with alibi",
        "From 256 to 4,096 tokens (16x), context beyond 256 may help alibi and bigscience/bloom-1b7",
        "Where windows slide by 1, perplexity from 128 to 2,048 tokens",
        "raising all positions, by up to 2,048, leaves the perplexity of alibi as it is",
        "In windows of 128 tokens, the training length, perplexity beside recomputing holds with alibi (cached",
        "Beside sinusoidal at the same training length",
        "Cost, as in the paper's Table 1",
        "42 of 50 answers of passkey",
        "Summaries of meetings",
        "its table holds 128 positions",
    ):
        assert expected in page.text
    assert page.text.count("Whiskers: 95% bootstrap intervals") == 1  # said once for both training lengths
    names = {"perplexity", "paper", "context", "decomposition", "offsets"}
    names |= {"retrieval-lines", "retrieval-passkey"}
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == names
    assert sum(tag == "img" for tag, _ in page.tags) == len(names)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


@pytest.mark.usefixtures("unrendered")
def test_page_over_seeds_does_not_speak_of_one_seed(everything, seeded, tmp_path):
    page = Page(read(write_report(seeded(everything), tmp_path / "seeds")))
    alone = Page(read(write_report(everything, tmp_path / "one")))
    for disclaimer in ("one model from one seed", "Each model is one seed", "of one run on"):
        assert disclaimer in alone.text
        assert disclaimer not in page.text
    for statement in ("Which differences hold over seeds?", "mean over 3 seeds", "Thin lines are single seeds"):
        assert statement in page.text
        assert statement not in alone.text


def test_page_without_perplexity_leads_with_what_there_is(empty, found, tmp_path):
    page = Page(read(write_report(empty.add(found("alibi", 256, 0.5, 7)), tmp_path)))
    assert "alibi finds 7 of 10 answers of lines in prompts of 256 tokens" in page.text
    assert page.text.count("finds 7 of 10") == 1
    assert "Nothing has been measured" not in page.text
    assert "Press, Smith and Lewis" not in page.text
    assert next(attributes for tag, attributes in page.tags if tag == "p") == {"class": "headline"}


def test_page_of_what_was_skipped_alone_says_so(empty, skipped, tmp_path):
    entry = dataclasses.replace(skipped("alibi", 256, "out of memory"), task="kv", stride=None, protocol=None)
    page = Page(read(write_report(empty.add(entry), tmp_path)))
    assert "Nothing has been measured yet" in page.text
    assert "out of memory" in page.text


def test_user_given_names_are_escaped(
    demo, record, skipped, training, provenance, strided, context, decomposed, offset, found, summary, tmp_path
):
    attack = """<script>alert("1")</script>'"&<img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}"""
    names = [field.name for field in dataclasses.fields(provenance) if type(getattr(provenance, field.name)) is str]
    told = ("longreach", "torch", "python", "platform", "device", "git_commit")
    start = dataclasses.replace(provenance.starts[0], **dict.fromkeys(told, attack))
    hostile = dataclasses.replace(
        provenance, starts=(start,), config={attack: [attack]}, **dict.fromkeys(names, attack)
    )
    results = dataclasses.replace(demo, provenance=hostile)
    results = results.add(record(f"rotary:{attack}", 128, 70.0), skipped(attack, 4096, attack))
    results = results.add(dataclasses.replace(training(attack), attention=attack))
    results = results.add(
        strided(attack, 128, 9.0),
        strided(attack, 128, 9.0, protocol="cached"),
        context(attack, 256, 65, 128, 4.0, resampled=attack),
        context(attack, 256, 129, 256, 3.0, resampled=attack),
        decomposed(attack, 256, 0.1, 0.1),
        offset(attack, 0, 9.0),
        found(attack, 128, 0.5, 1, task=f"../../{attack}"),
        summary(attack, 128, 0.2),
    )
    page = Page(read(write_report(results, tmp_path)))
    assert all(tag != "script" for tag, _ in page.tags)
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.text.count(attack) >= len(told) + len(names) + 4
    assert json.dumps(attack)[1:-1] in page.text  # the configuration
    figures = [file for file in (tmp_path / "figures").iterdir() if file.suffix == ".svg"]
    assert len(figures) == 6
    for file in figures:
        ElementTree.fromstring(file.read_bytes())
    assert sorted(os.listdir(tmp_path)) == ["figures", "report.html"]


@pytest.mark.filterwarnings("error")  # as matplotlib gives for what its font has not
def test_names_that_no_font_has_and_no_svg_may_hold(empty, record, context, decomposed, offset, found, tmp_path):
    names = ("models/模型", "m\x1b[31mred", "a\x0bb", "x\ny", "a\x00b", "\u202eevil", "a--b-->", "\ufffe")
    results = empty
    for name in names:
        results = results.add(
            *(record(name, length, 9.0) for length in (128, 256)),
            context(name, 256, 65, 128, 4.0),
            context(name, 256, 129, 256, 3.0),
            decomposed(name, 256, 0.1, 0.1),
            offset(name, 0, 9.0),
            found(name, 128, 0.5, 1),
        )
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    assert all(html.escape(name) in page for name in names)
    figures = [*(tmp_path / "figures").glob("*.svg")]
    assert len(figures) == 6
    for file in figures:
        ElementTree.fromstring(file.read_bytes())


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [("alibi", 256, 75.0)],
        [("alibi", 128, math.inf), ("alibi", 256, 80.0)],
        [("caf\u00e9 " + "very-long-name-" * 20, 128, 75.0), ("alibi", 128, 75.0, 64)],
    ],
)
def test_odd_results_give_a_page(empty, record, cells, tmp_path):
    results = empty.add(*(record(*cell) for cell in cells))
    text = Page(read(write_report(results, tmp_path))).text
    assert ("Nothing has been measured yet" in text) == (not cells)
    assert ("perplexities above a billion" in text) == any(cell[2] == math.inf for cell in cells)


def test_from_the_file_alone_in_a_fresh_process_without_torch_and_with_the_same_bytes(demo, tmp_path):
    demo.write(tmp_path / "results.json")
    code = (
        "import sys; from longreach.results import Results; from longreach.report.page import write_report;"
        "write_report(Results.read(sys.argv[1]), sys.argv[2]);"
        "print(*({'torch', 'matplotlib.pyplot', 'transformers'} & set(sys.modules)))"
    )
    arguments = [str(tmp_path / "results.json"), str(tmp_path / "fresh")]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
    here = write_report(Results.read(tmp_path / "results.json"), tmp_path / "here")
    assert here.read_bytes() == (tmp_path / "fresh" / "report.html").read_bytes()


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, longreach, longreach.report, longreach.report.page;"
        "print(*({'torch', 'matplotlib', 'jinja2', 'rich', 'numpy'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == []


def test_failed_write_keeps_the_old_page(demo, empty, tmp_path, monkeypatch):
    before = write_report(demo, tmp_path).read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(empty, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["figures", "report.html"]
