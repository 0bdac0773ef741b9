"""Position interpolation: models of two methods, tested under every scaling, and fine-tuned at twice their length."""

from collections.abc import Iterator

SEEDS = (0, 1, 2)
LENGTH, FOLDS = 128, (1, 1.5, 2, 3, 4)
SCALINGS = {
    "alibi": ("none", "linear", "linear-fixed=2", "ntk", "ntk-fixed=2", "none+logn"),
    "rotary": ("none", "linear", "linear-fixed=2", "ntk", "ntk-fixed=2", "yarn", "none+logn"),
}
FACTOR = "scaling=linear-fixed=2"
TESTS = ("alibi", "rotary", "tuned")
"""Folders of the results that the claim is judged by."""


def commands(text: list[str], tested: list[str], runs: str) -> Iterator[list[str]]:
    """As `experiments.run.commands`; runs are tested on their own text for validation."""
    config = "experiments/interpolation/config.toml"
    for method in SCALINGS:
        for seed in SEEDS:
            options = ["--config-file", config, "--method", method, "--seed", str(seed), *text]
            yield ["train", *options, "--output", f"{runs}/{method}-seed{seed}"]
    lengths = ",".join(str(int(LENGTH * fold)) for fold in FOLDS)
    asked = ["--task", "perplexity,retrieval", "--lengths", lengths, "--valid-tokens", "24576"]
    for method, scalings in SCALINGS.items():
        models = [f"{runs}/{method}-seed{seed}" for seed in SEEDS]
        yield ["evaluate", *models, "--scaling", ",".join(scalings), *asked, "--output", f"{runs}/tests/{method}"]
    tuned = []
    for method in SCALINGS:
        for factor in (None, FACTOR):
            for seed in SEEDS:
                tuned.append(f"{runs}/tuned/{method}{'-factor' if factor else ''}-seed{seed}")
                yield [
                    *("train", "--from", f"{runs}/{method}-seed{seed}"),
                    *("--method", f"{method}:{factor}" if factor else method),
                    *("--train-length", str(2 * LENGTH), "--batch-size", "4", "--steps", "300"),
                    *("--learning-rate", "0.001", "--warmup-steps", "20", "--mix", "retrieval=0.2"),
                    *("--output", tuned[-1]),
                ]
    yield ["evaluate", *tuned, *asked, "--output", f"{runs}/tests/tuned"]
