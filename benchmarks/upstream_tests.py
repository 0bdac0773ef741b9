"""Run transformers' own tests of BLOOM, MPT and Falcon with alibi on stock and on extended models, side by side.

    python benchmarks/upstream_tests.py transformers-5.23.0 transformers --output benchmarks/results/upstream-tests.json

Given are one or more unpacked source trees of transformers. The distribution on PyPI holds the tests that all models
share and none of those of families and of generation, which a later tree gives: a checkout of the repository, of a time
as near as may be. Their tests need `parameterized` and `httpx`. For the extended run each model is extended, without a
scaling, as soon as its constructor is done, loaded models included. What needs a network, an accelerator or several
processes fails or is skipped alike. The run ends with status 1 where a test passes on stock alone that EXCEPTIONS does
not name; docs/extension.md lists these.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import longreach
from longreach.files import write_atomically

FAMILIES = {"bloom": "Bloom", "mpt": "Mpt", "falcon": "Falcon"}
"""Name of a family's folder and the beginning of its classes' names."""

EXCEPTIONS: dict[str, str] = {}
"""Test -> why it passes on stock alone."""


class Outcomes:
    """A plugin of pytest that collects the outcome of each test by its name."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.partition("::")[2]
        if self.found.get(name) != "failed" and (report.when == "call" or report.outcome != "passed"):
            self.found[name] = report.outcome  # subtests report under the name of their test
        if report.outcome == "failed":
            self.errors[name] = (
                report.longrepr.reprcrash.message.splitlines()[0]
                if hasattr(report.longrepr, "reprcrash")
                else str(report.longrepr)
            )


def run_family(family: str, tests: Path, extended: bool, keyword: str) -> tuple[dict[str, str], dict[str, str]]:
    """Outcome of each test of a family, and the last line of each failure."""
    os.chdir(tests.parent)
    sys.path.insert(0, str(tests.parent))
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    _leave_out_processes()
    _give_falcon_alibi()
    if extended:
        _extend_every_model(family)
    outcomes = Outcomes()
    file = tests / "models" / family / f"test_modeling_{family}.py"
    options = ["-qq", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-rN", "--show-capture=no", "-Wignore"]
    pytest.main([str(file), *options, "-k", keyword, "-c", os.devnull, f"--rootdir={tests.parent}"], plugins=[outcomes])
    return outcomes.found, outcomes.errors


def _leave_out_processes() -> None:
    """What starts processes for tests of parallelism is in no distribution: whoever calls it is skipped."""

    class Absent(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **kwargs: pytest.skip("needs several processes")

    sys.modules["tests.distributed_testing_utils"] = Absent("tests.distributed_testing_utils")


def _give_falcon_alibi() -> None:
    """Let a FalconConfig of the tests have alibi."""
    make = transformers.FalconConfig.__init__

    @functools.wraps(make)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{"alibi": True, **kwargs})

    transformers.FalconConfig.__init__ = made


def _extend_every_model(family: str) -> None:
    """Extend each model of a family when its outermost constructor is done."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    depth = 0

    def extending(make: Any) -> Any:
        @functools.wraps(make)
        def made(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal depth
            depth += 1
            try:
                make(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                longreach.extend(self, scaling="none")

        return made

    for name, kind in vars(modeling).items():
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if is_model and name.startswith(FAMILIES[family]) and "__init__" in vars(kind):
            kind.__init__ = extending(kind.__init__)


def assembled(trees: list[Path], folder: Path) -> Path:
    """The tests of several source trees in one, those of an earlier tree in place of a later one's."""
    for tree in reversed(trees):
        for part in ("tests", "utils"):
            if (tree / part).exists():
                shutil.copytree(tree / part, folder / part, dirs_exist_ok=True)
    (folder / "tests" / "__init__.py").touch()
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    return folder / "tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="+", help="unpacked source trees of transformers")
    parser.add_argument("--output", type=Path, help="JSON that holds a summary by version, which is added to")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", choices=("stock", "extended"), help="one of the two runs, printed alone")
    parser.add_argument("-k", default="", help="as for pytest")
    options = parser.parse_args()
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        tests = assembled(options.trees, Path(folder))
        for family in options.families:
            found, errors = {}, {}
            for contender in ("stock", "extended"):
                if options.only in (None, contender):
                    arguments = (family, tests, contender == "extended", options.k)
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        found[contender], errors[contender] = pool.apply(run_family, arguments)
                    print(family, contender, dict(Counter(found[contender].values())), flush=True)
            if options.only is None:
                alone = passed_on_stock_alone(family, found, errors["extended"])
                lost += len([name for name in alone if name.rpartition("::")[2] not in EXCEPTIONS])
                if options.output is not None:
                    write(options.output, [tree.name for tree in options.trees], family, found, alone)
    sys.exit(1 if lost else 0)


def passed_on_stock_alone(family: str, found: dict[str, dict[str, str]], errors: dict[str, str]) -> list[str]:
    """Tests that only the stock code passes, each printed with its reason."""
    passed = [name for name, outcome in found["stock"].items() if outcome == "passed"]
    alone = [name for name in passed if found["extended"].get(name) != "passed"]
    for name in alone:
        print(f"  {name}: {EXCEPTIONS.get(name.rpartition('::')[2]) or errors.get(name, 'is not run')}")
    return alone


def write(path: Path, trees: list[str], family: str, found: dict[str, dict[str, str]], alone: list[str]) -> None:
    """Put a family's summary into a file, beside those of other families and versions."""
    summaries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    summary: dict[str, Any] = {contender: dict(Counter(outcomes.values())) for contender, outcomes in found.items()}
    of_version = summaries.setdefault(f"transformers {transformers.__version__}", {})
    of_version[family] = {**summary, "passed on stock alone": alone, "tests of": trees}
    write_atomically(path, json.dumps(summaries, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
