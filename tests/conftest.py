"""What all tests share."""

import gc
import os
import warnings
from dataclasses import replace

import hypothesis
import pytest
import torch
from which_tests import in_full, is_left_out, uses_transformers

from longreach.ops.crossovers import CROSSOVERS, ROW

# Triton reads this once, when it is first imported, which torch's own modules may do at any time.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test may depend on a network; without this each try of the hub would wait for one.
os.environ["HF_HUB_OFFLINE"] = "1"

# Two test processes run side by side on two cores: more threads would only wait for each other.
torch.set_num_threads(1)

# A loaded machine is no reason to fail, and a failure must be found again.
hypothesis.settings.register_profile("longreach", deadline=None, derandomize=True)
hypothesis.settings.load_profile("longreach")


def pytest_addoption(parser):
    parser.addoption(
        "--left-out",
        action="store_true",
        help="run what a run without it leaves out: interpreted Triton, where nothing that it computes changed",
    )


def pytest_collection_modifyitems(config, items):
    """Mark what depends on the version of transformers, and leave out the sweep of interpreted Triton."""
    for item in items:
        if uses_transformers(item):
            item.add_marker(pytest.mark.transformers)
    full = torch.cuda.is_available() or in_full()
    here = [item for item in items if is_left_out(item, full) == config.getoption("left_out")]
    config.hook.pytest_deselected(items=[item for item in items if item not in here])
    items[:] = here


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    """What the command line sets is of its whole process, which here has other tests to run."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def keep_what_is_loaded():
    """Hundreds of thousands of objects of torch and transformers stay to the end: no search for garbage need see them.

    Each measurement of memory begins with such a search, which is most of what a small one takes otherwise. A long test
    may call this again, after it has loaded more.
    """

    def keep():
        if len(gc.get_objects()) > 50_000:
            gc.collect()
            gc.freeze()

    keep()
    return keep


@pytest.fixture
def unrendered(monkeypatch):
    """Reports whose figures are made but not rendered, which takes longer than all else about a small comparison.

    tests/report renders every figure, and a comparison that is a process of its own renders those of a whole page.
    """
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"<svg/>"))


@pytest.fixture
def choose_from(monkeypatch):
    """A function that has "auto" take the implementation that skips what is beyond reach from so many tokens on."""

    def choose(tokens, processor=ROW):
        lengths = dict.fromkeys((2, 4), tokens)
        cached = dict.fromkeys((2, 4), 0)
        changed = replace(CROSSOVERS[processor], forward=lengths, training=lengths, decoding=lengths, cached=cached)
        monkeypatch.setitem(CROSSOVERS, processor, changed)

    return choose


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of twelve small documents with a learnable pattern, for tests that train."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        lines = [
            f"document {number} line {line}: the sum of {line} and {number} is {line + number}.\n" for line in range(60)
        ]
        (folder / f"{number:02}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def events():
    """A function that reads TensorBoard's files in a folder: its numbers, and its texts, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        files = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        tags = files.Tags()
        scalars = {tag: {event.step: event.value for event in files.Scalars(tag)} for tag in tags["scalars"]}
        texts = {
            tag.removesuffix("/text_summary"): {
                event.step: event.tensor_proto.string_val[0].decode() for event in files.Tensors(tag)
            }
            for tag in tags["tensors"]
        }
        return scalars, texts

    return read


@pytest.fixture
def scale_bloom_bias(monkeypatch):
    """A function that has the stock code of BLOOM multiply its bias, of each head by its own where factors are (H,).

    An extended model is not changed. Versions of transformers make the bias differently, and all hand it to attention.
    """
    from transformers.models.bloom.modeling_bloom import BloomAttention

    stock = BloomAttention.forward

    def scale(factor):
        factor = torch.as_tensor(factor).view(-1, 1, 1)

        def forward(self, hidden_states, residual, alibi, **options):
            return stock(self, hidden_states, residual, alibi=factor * alibi, **options)  # [H, 1, T], for one sequence

        monkeypatch.setattr(BloomAttention, "forward", forward)

    return scale
