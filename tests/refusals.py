"""Commands that are refused, and strangers' files changed so that they are."""

import json
import re

import pytest

from longreach.cli import main

STAGE = re.compile(r"[a-z ]+: \d+:\d\d:\d\d")
"""How long a stage of the work took, which is told as it ends."""

DEEP = "[" * 5000 + "]" * 5000


def refused(capfd, *words):
    """The one line with which a command ends, and what is written past Python counts too."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    lines = [line for line in capfd.readouterr().err.splitlines() if not STAGE.match(line)]
    assert (end.value.code, len(lines)) == (2, 1), lines
    return lines[0]


def setting(name, value):
    """A change of one field of a JSON file, given as it is to stand there."""

    def change(path):
        values = json.loads(path.read_text())
        values[name] = "@"
        path.write_text(json.dumps(values).replace('"@"', value))

    return change


def text(content):
    return lambda path: path.write_text(content)
