"""SmolLM2-135M given ALiBi: trained at a short length, then tested far past it beside its own rotary positions."""

from collections.abc import Iterator

LENGTH, WINDOW = 512, 8192
"""What ALiBi is trained at, and what the model was pretrained at."""
FAR = (WINDOW, 2 * WINDOW)
NEAR = (LENGTH, 2 * LENGTH, 4 * LENGTH, 8 * LENGTH)
ROTARY, ALIBI, UNTRAINED = "smollm2", "alibi", "untrained"
TESTS = ("near", "far-rotary", "far-alibi")
"""Folders of the results that the claim is judged by."""


def commands(text: list[str], tested: list[str], runs: str) -> Iterator[list[str]]:
    """As `experiments.run.commands`; the models lie in the folder already, as weights.py writes them."""
    rotary, alibi, untrained = (f"{runs}/{name}" for name in (ROTARY, ALIBI, UNTRAINED))
    yield [
        *("train", "--from", rotary, *text, "--train-length", str(LENGTH), "--batch-size", "2", "--steps", "300"),
        *("--learning-rate", "0.0005", "--warmup-steps", "10", "--precision", "bf16", "--output", alibi),
    ]
    asked = ["--valid-tokens", str(FAR[-1]), "--cases-per-depth", "2", "--num-depths", "3", *tested]
    near, far = (",".join(map(str, lengths)) for lengths in (NEAR, FAR))
    yield [
        *("evaluate", rotary, untrained, alibi, "--task", "perplexity,passkey", "--lengths", near, *asked),
        *("--output", f"{runs}/tests/near"),
    ]
    for name, model, scalings in (("rotary", rotary, "none,linear,ntk,yarn"), ("alibi", alibi, "none,linear")):
        yield [
            *("evaluate", model, "--scaling", scalings, "--task", "perplexity", "--lengths", far, *asked),
            *("--output", f"{runs}/tests/far-{name}"),
        ]
