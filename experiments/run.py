"""Run an experiment of docs/claims.md again: python -m experiments.run NAME [DATA VALID].

Its commands are printed as one would type them. Run again, it goes on where it stopped.
"""

import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longreach.cli import main as longreach


def several(name: str) -> Any:
    """The module commands.py of an experiment of several commands; None for one that is a single comparison."""
    module = f"experiments.{name}.commands"
    return import_module(module) if find_spec(module) else None


def commands(name: str, text: list[str], tested: list[str], runs: str) -> Iterator[list[str]]:
    """The words of each of its commands after `longreach`.

    Args:
        name: of the experiment.
        text: options of `train` that name the text to learn from and the one for validation; may be empty.
        tested: options of `evaluate` that name the one for validation.
        runs: the folder of all that is trained and tested.
    """
    if module := several(name):
        yield from module.commands(text, tested, runs)
    else:
        yield ["compare", "--config-file", f"experiments/{name}/config.toml", *text, "--output", runs]


def results(name: str, runs: str) -> dict[str, Path]:
    """Name of each of its files of results -> where its commands leave it."""
    if module := several(name):
        return {f"results-{test}.json": Path(runs, "tests", test, "results.json") for test in module.TESTS}
    return {"results.json": Path(runs, "results.json")}


def main(name: str, data: str = "", valid: str = "") -> None:
    """Run all commands on a text, by default that of `longreach`, then copy the results beside the claim."""
    runs = f"runs/experiments/{name}"
    text = [word for option in (("--data", data), ("--valid-data", valid)) if option[1] for word in option]
    for words in commands(name, text, ["--data", valid] if valid else [], runs):
        print(shlex.join(["longreach", *words]), flush=True)
        longreach(words)
    for copy, original in results(name, runs).items():
        shutil.copy(original, Path("experiments", name, copy))


if __name__ == "__main__":
    main(*sys.argv[1:])
