"""Which tests a run leaves to another: conftest.py marks and selects by what stands here."""

import inspect
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent

INTERPRETED_PATHS = (
    "src/longreach/ops/triton",
    "src/longreach/ops/reach.py",
    "src/longreach/ops/lse_bound.py",
    "tests/adversarial.py",
    "tests/ops/test_reach.py",
    "tests/ops/test_triton",
    "tests/ops/triton_interpreter.py",
    "tests/which_tests.py",
    "requirements",
)
"""What the Triton kernels compute depends on, as beginnings of paths: their tests are interpreted in full where one of
these changed."""


def uses_transformers(item: pytest.Item) -> bool:
    """Whether a test depends on the version of transformers: it names the library, itself or by what it uses."""
    fixtures = item._fixtureinfo.name2fixturedefs
    used = (fixtures[name][-1].func for name in item.fixturenames if name in fixtures)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return any_leads_to_transformers(item.function, *used) or leads_to_transformers(parameters, set())


@cache
def any_leads_to_transformers(*functions: FunctionType) -> bool:
    """As `leads_to_transformers`, found once for all parameters that a test is run with."""
    return leads_to_transformers(functions, set())


def leads_to_transformers(thing: Any, seen: set[FunctionType]) -> bool:
    """Whether a value is of transformers, or holds what is, or is a function of the tests that names what is."""
    if isinstance(thing, dict):
        return leads_to_transformers(list(thing.values()), seen)
    if isinstance(thing, list | tuple):
        return any(leads_to_transformers(value, seen) for value in thing)
    if isinstance(thing, ModuleType):
        return of_transformers(thing.__name__)
    function = inspect.unwrap(thing) if callable(thing) else thing
    if isinstance(function, FunctionType) and Path(function.__code__.co_filename).is_relative_to(TESTS):
        if function in seen:
            return False
        seen.add(function)
        names = set(names_in(function.__code__))
        held = [function.__globals__[name] for name in names if name in function.__globals__]
        held += [cell.cell_contents for cell in function.__closure__ or ()]
        return any(map(of_transformers, names)) or leads_to_transformers(held, seen)
    kind = thing if isinstance(thing, type) else type(thing)
    return any(of_transformers(base.__module__) for base in kind.__mro__) or of_transformers(
        getattr(thing, "__module__", None)
    )


def names_in(code: CodeType) -> Iterator[str]:
    """All names in a function, in those inside it too: of globals, attributes and modules that it imports."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def of_transformers(name: str | None) -> bool:
    return (name or "").split(".")[0] == "transformers"


def in_full(repository: Path = ROOT) -> bool:
    """Whether the Triton kernels' tests are to be interpreted in full: what they compute may have changed."""
    changed = changed_paths(repository)
    return changed is None or any(path.startswith(INTERPRETED_PATHS) for path in changed)


def is_left_out(item: pytest.Item, full: bool) -> bool:
    """Whether a test is of the sweep that only `--left-out` runs, unless all of it is to be run anyway."""
    return not full and item.get_closest_marker("interpreted") is not None


@cache
def changed_paths(repository: Path) -> frozenset[str] | None:
    """What differs from where this branch left the main one, committed or not; None where git cannot tell."""
    for main in ("origin/main", "main"):
        base = git(repository, "merge-base", "HEAD", main)
        if base is not None:
            changed = git(repository, "diff", "--name-only", base.strip())
            new = git(repository, "ls-files", "--others", "--exclude-standard")
            return None if changed is None or new is None else frozenset((changed + new).splitlines())
    return None


def git(repository: Path, *words: str) -> str | None:
    """What git prints, None where there is no git, no repository or no such commit."""
    try:
        return subprocess.run(["git", *words], cwd=repository, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
