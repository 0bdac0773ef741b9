"""What a terminal shows of names that are commands to it, or that rich takes for its own."""

import io

import pytest

from longreach import terminal
from longreach.terminal import TerminalProgress, printable


@pytest.fixture
def shown(monkeypatch):
    """What is written to a terminal."""
    written = io.StringIO()

    class Screen(terminal.Screen):
        def __init__(self, stderr, quiet):
            super().__init__(file=written, force_terminal=True, width=120, quiet=quiet)

    monkeypatch.setattr(terminal, "Screen", Screen)
    return written


def test_what_is_a_command_to_a_terminal_is_spelled_out():
    assert printable("a\x1b[31mb\nc\x7f\x9b2J\u202ed\x00\te") == r"a\x1b[31mb\nc\x7f\x9b2J\u202ed\x00\te"
    assert printable("Grüße, 長さ, [old] \\ x") == "Grüße, 長さ, [old] \\ x"


@pytest.mark.parametrize("name", ["runs/[old]/alibi", "runs/[/x]/alibi", "[bold]runs[/bold]"])
def test_a_bar_shows_names_as_they_are(shown, name):
    with TerminalProgress() as progress:
        progress(f"testing {name}", 1, 2, f"beside {name}")
        progress._bars.refresh()
        bars = shown.getvalue()
    assert f"testing {name}" in bars
    assert f"beside {name}" in bars
    assert shown.getvalue()[len(bars) :].count(f"testing {name}: 0:00:00  beside {name}") == 1


def test_a_name_commands_no_terminal(shown):
    name = "data/\x1b]0;title\x07\x9b2J\nlongreach: all is well.txt"
    with TerminalProgress() as progress:
        progress(f"reading {name}", 1, 2, name)
        progress._bars.refresh()
        progress.say(f"left out 1 bad file or line: {name}")
    spelled = r"data/\x1b]0;title\x07\x9b2J\nlongreach: all is well.txt"
    assert f"left out 1 bad file or line: {spelled}\n" in shown.getvalue()
    assert f"reading {spelled}" in shown.getvalue()
    assert not any(command in shown.getvalue() for command in ("\x1b]0", "\x07", "\x9b", "\nlongreach"))
