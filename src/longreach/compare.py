"""The main job: train position methods side by side on identical batches, test each at many lengths, report."""

from dataclasses import dataclass, replace
from pathlib import Path

from longreach.data.prepare import DataConfig, PreparedData, prepare
from longreach.evaluate.sweep import EvaluateConfig
from longreach.models.config import ARCHITECTURES, Architecture
from longreach.report.page import write_report
from longreach.results import Results
from longreach.runs import Progress, evaluate_run, open_run, provenance, train_run, validation_tokens
from longreach.train.config import RunConfig, TrainConfig, check_folder, claim_folder
from longreach.train.loop import resolve_device


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

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty: give at least one position method")
        for method in self.methods:
            self.run(method)  # refuses what does not fit together
        if len(set(map(run_name, self.methods))) < len(self.methods):
            raise ValueError(f"methods={','.join(self.methods)}: give each method once")

    def run(self, method: str) -> RunConfig:
        """The training run of one method."""
        return RunConfig(
            method=method,
            longest_length=max((self.train.train_length, *self.evaluate.valid_lengths)),
            data=self.data,
            model=self.model,
            train=self.train,
        )


def compare(config: CompareConfig, output: Path, progress: Progress) -> Results:
    """Run a comparison into a folder, or go on with what is there, and write its report.

    The folder gets config.toml, a folder for each method, results.json, figures/ and report.html. What is finished
    is not done again; an interrupted comparison run again gives the numbers of an uninterrupted one.

    Raises:
        ValueError: the folder holds another comparison, the data changed since it began, or too little data.
        FloatingPointError: training diverged.
        OSError: a file cannot be read or written.
    """
    config = replace(config, evaluate=config.evaluate.resolved(config.train.train_length))
    check_folder(output, config)  # before the time that reading the data takes
    resolve_device(config.train.device)
    prepared = prepare(config.data, config.train.seed, progress)
    tokens = validation_tokens(prepared, config.evaluate)
    claim_folder(output, config)
    results = _begin(config, prepared, output / "results.json")
    for method in config.methods:
        folder = output / run_name(method)
        training = train_run(config.run(method), folder, prepared, progress)
        if training not in results.training:
            results = results.add(training)
        lengths = config.evaluate.valid_lengths
        missing = [length for length in lengths if results.find(method, config.train.train_length, length) is None]
        if not missing:
            continue
        run = open_run(folder)
        for valid_length in missing:
            results = results.add(evaluate_run(run, tokens, valid_length, config.evaluate, progress))
            results.write(output / "results.json")
    write_report(results, output)
    return results


def run_name(method: str) -> str:
    """Name of a method's folder: no colons, which some file systems refuse."""
    return method.replace(":", "_")


def _begin(config: CompareConfig, prepared: PreparedData, path: Path) -> Results:
    """The results so far, or new ones."""
    if not path.exists():
        return Results(provenance=provenance(config, prepared, config.train.device, config.train.seed))
    results = Results.read(path)
    if results.provenance.corpus_hash != prepared.corpus_hash:
        raise ValueError(
            f"data {prepared.corpus_name!r} has changed since the comparison in {path.parent} began: "
            "give a new output folder, or the text as it was"
        )
    return results
