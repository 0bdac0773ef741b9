"""Run an experiment of docs/claims.md again: python -m experiments.run NAME DATA VALID.

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
from longreach.results import Results


def several(name: str) -> Any:
    """The module commands.py of an experiment of several commands; None for one that is a single comparison."""
    module = f"experiments.{name}.commands"
    return import_module(module) if find_spec(module) else None


def commands(name: str, text: list[str], tested: list[str], runs: str) -> Iterator[list[str]]:
    """The words of each of its commands after `longreach`.

    Args:
        name: of the experiment.
        text: options of `train` that name the text to learn from and the one for validation.
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


def main(name: str, data: str, valid: str) -> None:
    """Run all commands on a text, then copy the results beside the claim.

    Args:
        name: of the experiment.
        data: the text to learn from, as `longreach train --data` takes it.
        valid: the one to test on.

    Raises:
        ValueError: no text is given; what the experiment begins with is not there; or its committed results are of
            another text, and stay.
    """
    for variable, value in (("DATA", data), ("VALID", valid)):
        if not value:
            raise ValueError(f"{variable} is empty: give books, as docs/claims.md says at its head")
    runs = f"runs/experiments/{name}"
    for words in commands(name, ["--data", data, "--valid-data", valid], ["--data", valid], runs):
        print(shlex.join(["longreach", *words]), flush=True)
        longreach(words)
    copies = {Path("experiments", name, copy): original for copy, original in results(name, runs).items()}
    if kept := [str(copy) for copy, original in copies.items() if copy.exists() and _text(copy) != _text(original)]:
        raise ValueError(
            f"{', '.join(kept)}: of another text than {runs} (corpus_hash); to judge the claim by yours, remove that, "
            "give the same command again, and make claims"
        )
    for copy, original in copies.items():
        shutil.copy(original, copy)


def _text(path: Path) -> str:
    """What tells the text that results are of from any other."""
    return Results.read(path).provenance.corpus_hash


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        print("experiments.run:", error, file=sys.stderr)
        sys.exit(2)
