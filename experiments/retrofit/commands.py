"""SmolLM2-135M given ALiBi: trained at a short length, then tested far past it beside its own rotary positions."""

from collections.abc import Iterator
from pathlib import Path

LENGTH, WINDOW = 512, 8192
"""What ALiBi is trained at, and what the model was pretrained at."""
TESTED = (LENGTH, 4 * LENGTH, WINDOW, 2 * WINDOW)
ASKED = (LENGTH, 4 * LENGTH)
"""Lengths of the passkeys' prompts."""
ROTARY, ALIBI, UNTRAINED = "smollm2", "alibi", "untrained"
SCALINGS = ("linear", "ntk", "yarn")
TESTS = ("perplexity", "scalings", "passkey")
"""Folders of the results that the claim is judged by."""


def commands(text: list[str], tested: list[str], runs: str) -> Iterator[list[str]]:
    """As `experiments.run.commands`; the models lie in the folder already, as weights.py writes them."""
    rotary, alibi, untrained = (f"{runs}/{name}" for name in (ROTARY, ALIBI, UNTRAINED))
    for folder in (rotary, untrained):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is not there: write it first, as experiments/retrofit/weights.py says")
    yield [
        *("train", "--from", rotary, *text, "--train-length", str(LENGTH), "--batch-size", "2", "--steps", "300"),
        *("--learning-rate", "0.0005", "--warmup-steps", "10", "--precision", "bf16", "--output", alibi),
    ]
    everywhere, longest, prompts = (",".join(map(str, lengths)) for lengths in (TESTED, TESTED[-1:], ASKED))
    scored = ["--task", "perplexity", "--dtype", "bfloat16", "--valid-tokens", str(TESTED[-1]), *tested]
    asked = ["--task", "passkey", "--dtype", "bfloat16", "--cases-per-depth", "2", "--num-depths", "3"]
    tests = {
        "perplexity": [rotary, untrained, alibi, *scored, "--lengths", everywhere],
        "scalings": [rotary, "--scaling", ",".join(SCALINGS), *scored, "--lengths", longest],
        "passkey": [rotary, alibi, *asked, "--lengths", prompts],
    }
    for name in TESTS:
        yield ["evaluate", *tests[name], "--output", f"{runs}/tests/{name}"]
