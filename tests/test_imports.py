import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import longreach
import longreach.conformance
import longreach.parallel
import longreach.results

ROOT = Path(longreach.__file__).parent
MODULES = {
    ".".join(("longreach", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

MAY_IMPORT = {
    "ops": set(),
    "positions": {"ops"},
    "parallel": {"ops"},
    "models": {"positions", "ops"},
    "data": set(),
    "results": set(),
    "measure": {"data", "results"},
    "train": {"parallel", "models", "data", "results"},
    "conformance": {"ops"},
    "pretrained": {"ops", "positions", "models", "conformance"},
    "encoders": {"ops", "positions", "models"},
    "report": {"results"},
    "folder": {"results"},
    "options": set(),
}
"""Part of longreach -> the other parts that it may import, DESIGN.md's table."""

LEAVES = {"files", "reading", "foreign", "tokenizing", "cost", "process", "stopping"}
"""Files beside the parts that import none of these, and that any part may import but ops."""

ABOVE = {"verbs", "terminal"}
"""What puts the parts together: it may import anything but the command line."""

ENTRANCES = {"cli", "__main__"}
"""The command line, and `python -m longreach`, which alone may import it."""

IMPLEMENTATIONS = {"reference", "sdpa", "cpu", "triton", "flex"}
"""Modules of ops that each compute attention in their own way."""

HEAVY = {"triton", "transformers", "datasets", "sentence_transformers", "onnx", "matplotlib"}


def part(module):
    """The part of longreach that a module belongs to, "" for the package itself."""
    return [*module.split("."), ""][1]


def imports(module):
    """Full names of all that a module imports, anywhere in it; `from a import b` is read as a.b if that is a module."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source


def ours(module):
    return {name for name in imports(module) if name.split(".")[0] == "longreach"}


def test_there_is_something_to_read():
    assert {"longreach", "longreach.ops.attention", "longreach.positions", "longreach.models.decoder"} <= set(MODULES)
    assert "longreach.ops.visibility" in ours("longreach.ops.reference")
    assert "longreach.ops.attention" in ours("longreach.models.decoder")
    assert "longreach.positions" in ours("longreach.models.config")  # a package


@pytest.mark.parametrize("module", MODULES)
def test_who_may_import_whom(module):
    own = part(module)
    others = {part(name) for name in ours(module)} - {own, ""}
    if own in LEAVES:
        assert others <= LEAVES
    elif own not in ABOVE | ENTRANCES | {""}:  # the package names others for type checkers alone, see below
        assert own in MAY_IMPORT, f"{own} has no row in MAY_IMPORT"
        assert others <= MAY_IMPORT[own] | (set() if own == "ops" else LEAVES)
    if own != "__main__":
        assert "cli" not in others


def test_no_circles():
    assert list(TopologicalSorter({module: ours(module) - {module} for module in MODULES}).static_order())


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "ops"])
def test_ops_imports_torch_alone(module):
    roots = {name.split(".")[0] for name in imports(module)} - {"longreach", *sys.stdlib_module_names}
    allowed = {"torch", "triton"} if module.startswith("longreach.ops.triton") else {"torch"}
    assert roots <= allowed


def test_files_imports_the_standard_library_alone():
    assert {name.split(".")[0] for name in imports("longreach.files")} <= set(sys.stdlib_module_names)


def test_no_circle_of_imports():
    left = {module: ours(module) - {module} for module in MODULES}
    while free := {module for module, needed in left.items() if not needed & left.keys()}:
        left = {module: needed for module, needed in left.items() if module not in free}
    assert not left


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "ops"])
def test_implementations_import_none_but_their_definition(module):
    own = module.removeprefix("longreach.ops.").split(".")[0]
    if own in IMPLEMENTATIONS:
        assert not (IMPLEMENTATIONS - {own, "reference"}) & {
            name.removeprefix("longreach.ops.").split(".")[0] for name in ours(module)
        }


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in ("report", "results")])
def test_reports_need_no_torch(module):
    assert "torch" not in {name.split(".")[0] for name in imports(module)}


def loaded_after(statement):
    """Names of the modules that a fresh process holds after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_longreach_loads_nothing_heavy():
    assert not (HEAVY | {"torch"}) & loaded_after("import longreach; dir(longreach)")


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_the_command_line_answers_without_torch(word):
    quiet = "import contextlib, io, longreach.cli\nwith contextlib.redirect_stdout(io.StringIO()):"
    loaded = loaded_after(f"{quiet}\n with contextlib.suppress(SystemExit): longreach.cli.main([{word!r}])")
    assert not {"torch", "pydantic", "rich", *HEAVY} & loaded


def test_using_attention_and_models_loads_nothing_optional():
    used = "longreach.models.files, longreach.measure.transformers, longreach.ops.triton.operators"
    assert not HEAVY & loaded_after(f"import longreach; longreach.attention; import {used}, longreach.ops.triton.plans")


def test_preparing_text_and_writing_reports_load_no_torch():
    loaded = loaded_after("import longreach.data.prepare, longreach.results, longreach.report.page")
    assert not {"torch", *HEAVY} & loaded


def test_type_checkers_see_what_is_public():
    tree = ast.parse(MODULES["longreach"].read_text(encoding="utf-8"))
    block, at_run_time = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: source.module for source in block.body for alias in source.names}
    assert (ast.unparse(block.test), ast.unparse(at_run_time.test)) == ("TYPE_CHECKING", "not TYPE_CHECKING")
    assert seen == longreach._PUBLIC
    assert set(longreach.__all__) == {*seen, "__version__"}


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their names alone, and refuses the second when all are collected."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_every_public_name_is_in_the_reference():
    page = Path(__file__).parents[1] / "docs" / "api.md"
    told = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    modules = (longreach, longreach.conformance, longreach.parallel, longreach.results)
    public = [f"{module.__name__}.{name}" for module in modules for name in module.__all__]
    assert sorted([*told, "longreach.__version__"]) == sorted(public)


def test_public_names_resolve_and_others_are_refused():
    for name in longreach.__all__:
        assert getattr(longreach, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'Attention'; public names: .*attention"):
        _ = longreach.Attention
