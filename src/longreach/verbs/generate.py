"""A text continued by a trained run: `generate`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longreach.data.tokenizer import StreamingDecoder
from longreach.models.generate import stream
from longreach.verbs.train import open_run


@dataclass(frozen=True)
class GenerateConfig:
    """What is to be continued, and how."""

    run: Path
    """Folder of a trained run."""
    prompt: str | None = None
    """Text to continue, or - for standard input; by default the start of a document."""
    max_new_tokens: int = 256
    """How many tokens to add at most."""
    temperature: float = 0.8
    """0 takes the likeliest token; otherwise logits are divided by it and a token is drawn."""
    top_k: int | None = None
    """Draw only among the k likeliest tokens."""
    top_p: float | None = None
    """Draw only among the likeliest tokens that together hold probability p."""
    seed: int = 0
    """Seed of the draws."""
    device: str | None = None
    """Where to run; by default where the run was trained."""


def generate(config: GenerateConfig) -> Iterator[str]:
    """The prompt, then what the run adds, piece by piece as it is drawn.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: its files are damaged, or a setting is out of range.
    """
    run = open_run(config.run, config.device)
    ids = run.tokenizer.encode(config.prompt) if config.prompt else [run.tokenizer.eos_id]
    steps = stream(
        run.model,
        [ids],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_id=run.tokenizer.eos_id,
        seed=config.seed,
    )
    decoder = StreamingDecoder(run.tokenizer)
    yield config.prompt or ""
    for (token,) in steps:
        if token is not None:
            yield decoder.push(token)
    yield decoder.finish()
