"""py.typed is true: what a user writes with the public names passes mypy --strict, and mistakes do not."""

import subprocess
import sys
from pathlib import Path

import longreach

SOURCE = Path(longreach.__file__).parent

RIGHT = """
from pathlib import Path

import longreach
import torch
from torch import Tensor, nn

q, k, v = torch.randn(3, 1, 4, 32, 16)
slopes: Tensor = longreach.alibi_slopes(4)
bias: Tensor = longreach.alibi_bias(slopes, 32)
out: Tensor = longreach.attention(q, k, v, slopes=slopes)
pair: tuple[Tensor, Tensor] = longreach.attention(q, k, v, slopes=slopes, return_lse=True)
kept: Tensor = longreach.reach(q, k, slopes).kept


def longer(model: nn.Module, folder: Path) -> None:
    scaling = longreach.Scaling("linear", train_length=2048)
    extended: nn.Module = longreach.extend(model, scaling=scaling)
    with longreach.fixed_length(extended, 8192):
        extended(torch.zeros(1, 1, dtype=torch.int64))
    longreach.save_pretrained(extended, folder)
    longreach.restore(extended)
    longreach.load_pretrained(folder).eval()
    converted: nn.Module = longreach.convert(model, train_length=2048)
    longreach.unconvert(converted)


version: str = longreach.__version__


def vectors(folder: Path) -> None:
    longreach.register_encoders()
    longreach.load_encoder(folder, scaling="linear").encode(["a text"], max_length=8192)
    longreach.unregister_encoders()


export = longreach.export_mpt
"""

WRONG = """
import longreach
import torch

q = torch.randn(1, 4, 32, 16)
longreach.attention(q, q)  # no v
longreach.attention(q, q, q, return_lse=True).shape  # a pair
longreach.atention  # no such name
"""


def mypy(code, folder):
    """What mypy says of a user's file, a line each."""
    file = folder / "user.py"
    file.write_text(code, encoding="utf-8")
    # What longreach itself is held to is `make test`'s; its types are taken from the source, however it is installed.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", "--no-pretty"]
    cache = SOURCE.parent.parent / ".mypy_cache" / "user"  # a cold one takes most of a minute
    run = subprocess.run(
        [*command, f"--cache-dir={cache}", str(file)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"MYPYPATH": str(SOURCE.parent)},
    )
    return [line for line in run.stdout.splitlines() if "error:" in line] if run.returncode < 2 else [run.stderr]


def test_types_are_told_to_type_checkers(tmp_path):
    assert (SOURCE / "py.typed").exists()
    for name in longreach.__all__:
        assert f"longreach.{name}" in RIGHT
    assert mypy(RIGHT, tmp_path) == []


def test_mistakes_are_seen_by_type_checkers(tmp_path):
    said = mypy(WRONG, tmp_path)
    assert len(said) == 3
    assert "attention" in said[0]
    assert "shape" in said[1]
    assert "atention" in said[2]
