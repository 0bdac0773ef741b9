"""py.typed is true: the types of all public names are told to mypy, which `make types` runs on typed_user.py."""

import tomllib
from pathlib import Path

import longreach

ROOT = Path(__file__).parents[1]
USER = "tests/typed_user.py"


def test_types_are_told_to_type_checkers():
    assert (Path(longreach.__file__).parent / "py.typed").exists()
    code = (ROOT / USER).read_text(encoding="utf-8")
    for name in longreach.__all__:
        assert f"longreach.{name}" in code
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert USER in mypy["files"]
    assert mypy["warn_unused_ignores"]  # by which its mistakes must be seen
