from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from longreach.options import CommandLine, documentation


@dataclass(frozen=True)
class Shape:
    """A shape."""

    width: int = 8
    """How wide, 100% of it."""
    norm: Literal["layer", "rms"] = "layer"
    """Which
    norm."""
    bias: bool = False
    """Whether there is one."""


@dataclass(frozen=True)
class Wide(Shape):
    width: int = 80
    """How very wide."""


@dataclass(frozen=True)
class Where:
    output: Path
    """Where to."""


@dataclass(frozen=True)
class Job:
    models: tuple[str, ...]
    """Which."""
    shape: Shape = Wide()
    """The shape."""
    valid_lengths: tuple[int, ...] = (1, 2)
    """How long."""
    cap: float | None = None
    """At most."""


def read(*words, start=lambda given: None):
    return CommandLine("tool", "Does it.", words).parse(Where, Job, positional="models", start=start)


def test_options_stand_beside_each_other_in_any_order():
    where, job = read("a", "--width", "3", "--output=o", "b", "--lengths", "4,5", "--bias", "--cap", "-1")
    assert where == Where(Path("o"))
    assert job == Job(("a", "b"), Shape(3, "layer", bias=True), (4, 5), -1.0)
    assert read("a", "--output", "o", "--no-bias")[1] == Job(("a",), Shape(80))


@pytest.mark.parametrize(("word", "path"), [("~", "."), ("~/a", "a"), ("~nobody-here/a", None), ("./~/a", None)])
def test_a_path_begins_at_home_whatever_the_shell_made_of_it(monkeypatch, tmp_path, word, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    where, _ = read("a", f"--output={word}")
    assert where.output == (Path(word) if path is None else tmp_path / path)


def test_what_is_given_changes_what_it_starts_from():
    started = Job(("x",), Shape(5, "rms", bias=True), (7,), 0.5)
    seen = {}

    def start(given):
        seen.update(given)
        return started

    assert read("--output", "o", "--cap", "none", start=start)[1] == Job(("x",), Shape(5, "rms", bias=True), (7,))
    assert seen == {"output": "o", "cap": "none"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "--output is missing: give it"),
        (["--output", "o"], "MODELS is missing: give it"),
        (["a", "--output"], "--output: expected one argument"),
        (["a", "--outputs", "o"], "unknown option --outputs: did you mean --output?"),
        (["a", "--output", "o", "--with=3"], "unknown option --with: did you mean --width?"),
        (["a", "--output", "o", "--zzz"], "unknown option --zzz: see --help"),
        (["a", "--out", "o"], "unknown option --out: did you mean --output?"),
        (["a", "--output", "o", "--width", "w"], "--width='w': give an integer"),
        (["a", "--output", "o", "--norm", "none"], "--norm='none': give 'layer' or 'rms'"),
        (["a", "--output", "o", "--lengths", "1,x"], "--lengths='x': give an integer"),
    ],
)
def test_mistakes_name_the_option(words, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared)
        read(*words)
    assert str(raised.value) == message


def test_a_word_that_no_option_takes():
    with pytest.raises(ValueError, match=r"^'a' stands alone: give the option that it is for before it, see --help$"):
        CommandLine("tool", "", ["a"]).parse(Where)


def test_help_has_sections_docstrings_and_the_defaults_that_are_meant(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as end:
        read("--help", start=lambda given: Job((), Shape(5), (7, 9)))
    assert end.value.code == 0
    assert capsys.readouterr().out == (
        """usage: tool MODELS [options]

Does it.

positional arguments:
  MODELS                      Which.

options:
  -h, --help                  Show this page.
  --output PATH               Where to. (required)
  --valid-lengths INT,..., --lengths INT,...
                              How long. (default: 7,9)
  --cap NUMBER                At most.

The shape:
  --width INT                 How wide, 100% of it. (default: 5)
  --norm layer|rms            Which norm. (default: layer)
  --bias, --no-bias           Whether there is one. (default: false)
"""
    )


def test_docstrings_of_fields_are_inherited_and_replaced():
    assert documentation(Wide) == {**documentation(Shape), "width": "How very wide."}


def test_a_second_name_is_given_once():
    @dataclass(frozen=True)
    class Plan:
        curriculum: tuple[str, ...] = ()
        """Which lengths."""

    words = ["a", "--output", "o", "--lengths", "4,5", "--curriculum", "2:100%"]
    _, plan, job = CommandLine("tool", "Does it.", words).parse(Where, Plan, Job, positional="models")
    assert (plan.curriculum, job.valid_lengths) == (("2:100%",), (4, 5))
    (plan,) = CommandLine("tool", "Does it.", ["--lengths", "2:100%"]).parse(Plan)
    assert plan.curriculum == ("2:100%",)
