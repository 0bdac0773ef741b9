"""The main job: train position methods side by side on identical batches, test each at many lengths, report."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from longreach.data.prepare import DataConfig, prepare
from longreach.folder import begin, hold
from longreach.measure.plan import EvaluateConfig
from longreach.models.config import ARCHITECTURES, Architecture
from longreach.report.page import write_report
from longreach.results import Model, Results
from longreach.train.config import RunConfig, TrainConfig
from longreach.train.loop import resolve_device
from longreach.verbs.evaluate import case_sources, measure, read_material, read_results
from longreach.verbs.train import Progress, open_run, provenance, text_of, train_run


@dataclass(frozen=True)
class CompareConfig:
    """One comparison: the same data, model and training for every method."""

    methods: tuple[str, ...] = ("alibi", "rotary", "t5", "sinusoidal")
    """Position methods, each with options as in rotary:base=500000."""
    data: DataConfig = DataConfig()
    """The text."""
    model: Architecture = ARCHITECTURES["demo"]
    """The shape."""
    train: TrainConfig = TrainConfig()
    """The training."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """The test."""

    train_lengths: tuple[int, ...] = ()
    """L: every method is trained at each of these lengths; at train_length alone when none are given. A batch holds as
    many tokens at each as batch_size sequences of train_length do."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty: give at least one position method")
        if len(set(map(run_name, self.methods))) < len(self.methods):
            raise ValueError(f"methods={','.join(self.methods)}: give each method once")
        if len(set(self.train_lengths)) < len(self.train_lengths):
            raise ValueError(f"train_lengths={','.join(map(str, self.train_lengths))}: give each length once")
        for train_length in self.lengths:
            for method in self.methods:
                self.run(method, train_length)  # refuses what does not fit together

    @property
    def lengths(self) -> tuple[int, ...]:
        """The training lengths."""
        return self.train_lengths or (self.train.train_length,)

    @property
    def longest_length(self) -> int:
        """The longest length that any model is trained or tested at."""
        tested = [self.evaluate.resolved(train_length).valid_lengths for train_length in self.lengths]
        return max((*self.lengths, *itertools.chain(*tested)))

    def run(self, method: str, train_length: int) -> RunConfig:
        """The training run of one method at one length."""
        batch_tokens = self.train.batch_size * self.train.train_length
        if train_length < 1 or batch_tokens % train_length:
            raise ValueError(
                f"train_lengths={train_length}: it does not divide the {batch_tokens} tokens of a batch of batch_size="
                f"{self.train.batch_size} sequences of train_length={self.train.train_length}; change one of them"
            )
        return RunConfig(
            method=method,
            longest_length=self.longest_length,
            data=self.data,
            model=self.model,
            train=replace(self.train, train_length=train_length, batch_size=batch_tokens // train_length),
        )

    def folder(self, method: str, train_length: int) -> str:
        """Name of a run's folder: that of its method, with the training length where there are several."""
        return f"{run_name(method)}-{train_length}" if len(self.lengths) > 1 else run_name(method)


def compare(
    config: CompareConfig,
    output: Path,
    progress: Progress,
    on_model: Callable[[Results, Model], None] = lambda results, model: None,
) -> Results:
    """Run a comparison into a folder, or go on with what is there, and write its report.

    The folder gets config.toml, a folder for each trained model, results.json, figures/ and report.html. What is
    finished is not done again; an interrupted comparison run again gives the numbers of an uninterrupted one.

    Args:
        config: what is compared.
        output: the folder.
        progress: told of each stage as it goes on.
        on_model: told of each model, and of all results so far, as soon as it is trained and measured.

    Raises:
        ValueError: the folder holds another comparison, the data changed since it began, or too little data.
        BlockingIOError: another process works in the folder.
        FloatingPointError: training diverged.
        OSError: a file cannot be read or written.
    """
    device = resolve_device(config.train.device)
    with hold(output, config):
        prepared = prepare(config.data, config.train.seed, progress)
        longest_window = max(map(config.evaluate.longest_window, config.lengths))
        material = read_material(config.evaluate, text_of(prepared, config.evaluate, longest_window))
        sources = case_sources(config.evaluate)
        starts = begin(output, config, prepared.digests | sources, device)
        path = output / "results.json"
        results = read_results(
            path, provenance(config, starts[0], config.train.seed, prepared.tokenizer, prepared, sources)
        )
        for train_length, method in itertools.product(config.lengths, config.methods):
            folder = output / config.folder(method, train_length)
            training = train_run(config.run(method, train_length), folder, progress, prepared)
            if training not in results.training:
                results = results.add(training)
            subject = open_run(folder).subject()
            for grown in measure(subject, material, config.evaluate, results, path, progress):
                results = grown
            on_model(results, subject.identity)
        write_report(results, output)
    return results


def run_name(method: str) -> str:
    """Name of a method's folder: no colons, which some file systems refuse."""
    return method.replace(":", "_")
