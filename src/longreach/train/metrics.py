"""metrics.jsonl: one line for each step of a run, and the only place that reads it."""

from dataclasses import dataclass
from pathlib import Path

from longreach.files import open_file, write_atomically
from longreach.reading import parse_json, read_values

FINAL_STEPS = 20
"""Over how many of the last steps `final_loss` is the mean."""


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl."""

    step: int
    """Number of this step, from 1."""
    loss: float
    """Mean nll of the batch in nats per token, before the update."""
    learning_rate: float
    """Of this update."""
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Tokens trained on so far."""
    seconds: float
    """Time spent training so far, over all sessions of the run."""
    valid_loss: float | None = None
    """Mean nll on the validation text after the update, in nats per token, where it was measured."""


def keep_first(path: Path, steps: int) -> None:
    """Drop what an interrupted session logged after its last checkpoint, a torn last line included.

    Raises:
        ValueError: what is left is not the log of so many steps, found before a run goes on and not at its end.
    """
    if not steps and not path.exists():
        return
    kept = _lines(path)[:steps]
    _losses(path, kept, first=1)
    if len(kept) < steps:
        raise _damaged(path, f"it has {len(kept)} of {steps} steps")
    write_atomically(path, "".join(kept).encode())


def final_loss(path: Path) -> float:
    """The mean loss of the last `FINAL_STEPS` steps. ValueError where the file is damaged."""
    lines = _lines(path)
    losses = _losses(path, lines[-FINAL_STEPS:], first=max(1, len(lines) - FINAL_STEPS + 1))
    return sum(losses) / len(losses)


def _lines(path: Path) -> list[str]:
    with open_file(path) as file:
        return file.read().decode(errors="replace").splitlines(keepends=True)


def _losses(path: Path, lines: list[str], first: int) -> list[float]:
    """The losses of lines of metrics.jsonl, those of consecutive steps."""
    losses = []
    for number, line in enumerate(lines, start=first):
        try:
            step = read_values(Step, parse_json(line))
            if step.step != number:
                raise ValueError(f"step={step.step}")
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"line {number}: {error}") from error
        losses.append(step.loss)
    return losses


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): delete its folder to train this run again")
