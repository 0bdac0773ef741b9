"""No test is left to another run by mistake."""

import functools
import subprocess

import pytest
import transformers
import which_tests
from which_tests import ROOT, changed_paths, in_full, leads_to_transformers

CONFIGURATIONS = {"bloom": lambda: transformers.BloomConfig()}


class OurOwnModel(transformers.PreTrainedModel):
    pass


def names_it():
    return transformers.BloomConfig()


def imports_it():
    from transformers import BloomConfig

    return BloomConfig()


def imports_a_part():
    import transformers.models.bloom.modeling_bloom as module

    return module


@functools.cache
def calls_what_names_it():
    return [names_it() for _ in range(2)]


def takes_it_from_a_table():
    return CONFIGURATIONS["bloom"]()


def builds_a_class_of_it():
    return OurOwnModel


def calls_itself():
    return calls_itself()


def does_without():
    return ROOT, functools.partial(len), "transformers"


@pytest.mark.parametrize(
    "value",
    [
        names_it,
        imports_it,
        imports_a_part,
        calls_what_names_it,
        takes_it_from_a_table,
        builds_a_class_of_it,
        {"model": [lambda: transformers.BloomConfig()]},
        transformers.BloomConfig(),
    ],
)
def test_what_names_transformers_is_found_however_far_down(value):
    assert leads_to_transformers(value, set())


@pytest.mark.parametrize("value", [does_without, calls_itself, pytest, {"number": 1, "word": "transformers"}, None])
def test_what_does_not_is_not(value):
    assert not leads_to_transformers(value, set())


@pytest.fixture
def model():
    return transformers.BloomModel(takes_it_from_a_table())


@pytest.mark.usefixtures("model")
def test_a_test_is_marked_by_what_it_uses(request):
    assert request.node.get_closest_marker("transformers")


@pytest.fixture
def repository(tmp_path):
    """A branch with one commit of its own, to a page, beside the kernels."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--initial-branch", "main")
    kernels = tmp_path / "src/longreach/ops/triton/kernels.py"
    kernels.parent.mkdir(parents=True)
    kernels.touch()
    git("add", ".")
    git("commit", "--message", "main")
    git("checkout", "-b", "branch")
    (tmp_path / "page.md").touch()
    git("add", ".")
    git("commit", "--message", "branch")
    yield tmp_path
    changed_paths.cache_clear()


def test_a_branch_that_leaves_the_kernels_alone_leaves_their_sweep_out(repository):
    assert changed_paths(repository) == {"page.md"}
    assert not in_full(repository)


@pytest.mark.parametrize("path", ["src/longreach/ops/triton/kernels.py", "src/longreach/ops/triton/new.py"])
def test_a_change_of_the_kernels_asks_for_their_sweep_before_it_is_committed(repository, path):
    (repository / path).write_text("pass")
    assert in_full(repository)


def test_where_git_cannot_tell_the_sweep_runs(tmp_path, repository, monkeypatch):
    subprocess.run(["git", "branch", "--delete", "--force", "main"], cwd=repository, check=True, capture_output=True)
    assert in_full(repository)  # as in a clone of one branch
    assert changed_paths(tmp_path.parent) is None
    monkeypatch.setenv("PATH", "")
    changed_paths.cache_clear()
    assert in_full(ROOT)


def test_every_path_that_is_looked_at_exists():
    for path in which_tests.INTERPRETED_PATHS:
        assert list(ROOT.glob(f"{path}*")), path


@pytest.mark.parametrize(
    ("full", "marked", "left_out"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_the_sweep_alone_is_left_out_and_only_where_nothing_changed(request, full, marked, left_out):
    if marked:
        request.node.add_marker("interpreted")
    assert which_tests.is_left_out(request.node, full) == left_out
