"""The main job: train position methods side by side on identical batches, test each at many lengths, report."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from longreach.data.prepare import DataConfig, prepare
from longreach.folder import begin, hold, this_start
from longreach.measure.material import read_material, text_of
from longreach.measure.plan import EvaluateConfig
from longreach.measure.sweep import failures
from longreach.models.config import ARCHITECTURES, Architecture
from longreach.positions import canonical
from longreach.reading import refuse_repeats, respelled
from longreach.report.page import write_report
from longreach.results import Model, Results, Start
from longreach.train.config import RunConfig, TrainConfig
from longreach.train.loop import read_training_record
from longreach.train.parallel import ALONE, Ranks
from longreach.train.text import training_batches
from longreach.train.tracking import evaluated
from longreach.verbs.evaluate import measure, read_results, shared_out
from longreach.verbs.report import MOST_MODELS
from longreach.verbs.train import Progress, check_run, open_run, provenance, tracking, train_run

FAILURES = (FloatingPointError, MemoryError, RuntimeError, ValueError)
"""What ends one model and not the comparison. A disk that is full would end the others too."""


@dataclass(frozen=True)
class CompareConfig:
    """One comparison: the same data, model and training for every method."""

    methods: tuple[str, ...] = ("alibi", "rotary", "sinusoidal")
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
    shapes: tuple[str, ...] = ()
    """Every method is trained in each of these shapes, layers x width as in 2x128,4x256, with all else as it is given
    (num_heads, d_ff, learning_rate); in that of num_layers and d_model alone when none are given."""
    seeds: tuple[int, ...] = ()
    """Every method is trained at each length with each of these seeds; with seed alone when none are given. All learn
    from one split of the text, that of split_seed, or of seed."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty: give at least one position method")
        refuse_repeats(self, "train_lengths", "shapes", "seeds")
        if self.train.curriculum and len(self.lengths) > 1:
            raise ValueError(
                f"curriculum={','.join(self.train.curriculum)}: it is for one training length, the longest that it "
                f"goes through, and train_lengths={','.join(map(str, self.lengths))}: leave one of them out"
            )
        lists = (self.methods, self.lengths, self.shapes or ("",), self.seeds or (0,))
        if (count := math.prod(map(len, lists))) > MOST_MODELS:
            raise ValueError(
                f"methods: with train_lengths, shapes and seeds they make {count:,} models, "
                f"give at most {MOST_MODELS:,}"
            )
        self.runs()  # refuses what does not fit together
        refuse_repeats(self, "methods", read=canonical)

    def idle(self) -> dict[str, str]:
        """Name of a field that nothing heeds beside the others -> why."""
        fields = self.data.idle() | self.evaluate.idle()
        if self.shapes:
            fields |= dict.fromkeys(("num_layers", "d_model"), f"shapes={','.join(self.shapes)} has it for each model")
        if self.seeds and self.data.split_seed is not None:
            fields["seed"] = f"seeds={','.join(map(str, self.seeds))} and split_seed={self.data.split_seed} are given"
        return fields

    @property
    def lengths(self) -> tuple[int, ...]:
        """The training lengths."""
        return self.train_lengths or (self.train.train_length,)

    @property
    def longest_length(self) -> int:
        """The longest length that any model is trained or tested at."""
        tested = [self.evaluate.resolved(train_length).valid_lengths for train_length in self.lengths]
        return max((*self.lengths, *itertools.chain(*tested)))

    def runs(self) -> tuple[RunConfig, ...]:
        """All training runs: what one seed has to say is complete before the next begins."""
        seeds = self.seeds or (self.train.seed,)
        models = tuple(map(self.model.of_shape, self.shapes)) or (self.model,)
        return tuple(
            self.run(method, model, train_length, seed)
            for seed, model, train_length, method in itertools.product(seeds, models, self.lengths, self.methods)
        )

    def run(self, method: str, model: Architecture, train_length: int, seed: int) -> RunConfig:
        """The training run of one method in one shape at one length with one seed."""
        batch_tokens = self.train.batch_size * self.train.train_length
        if train_length < 1 or batch_tokens % train_length:
            raise ValueError(
                f"train_lengths={train_length}: it does not divide the {batch_tokens} tokens of a batch of batch_size="
                f"{self.train.batch_size} sequences of train_length={self.train.train_length}; change one of them"
            )
        with self.naming_lists():
            return RunConfig(
                method=method,
                longest_length=self.longest_length,
                data=replace(self.data, split_seed=self.data.seed_of_split(self.train.seed)),
                model=model,
                train=replace(
                    self.train, train_length=train_length, batch_size=batch_tokens // train_length, seed=seed
                ),
            )

    @contextmanager
    def naming_lists(self) -> Iterator[None]:
        """Have what is refused of one run named as it was given here, together with others."""
        together = {"method": "methods", "seed": "seeds" if self.seeds else "seed", "curriculum": "curriculum"}
        together["train_length"] = "train_lengths" if self.train_lengths else "train_length"
        try:
            yield
        except ValueError as error:
            raise ValueError(respelled(str(error), together)) from error

    def identity(self, run: RunConfig) -> Model:
        """Which model a run is among the others: with its shape where there are several."""
        return replace(run.identity, shape=run.model.shape) if len(self.shapes) > 1 else run.identity

    def folder(self, model: Model) -> str:
        """Name of a run's folder: that of its method, with shape, training length and seed where there are several."""
        shape = "" if model.shape is None else f"-{model.shape}"
        length = f"-{model.train_length}" if len(self.lengths) > 1 else ""
        seed = f"-seed{model.seed}" if len(self.seeds) > 1 else ""
        return run_name(model.method) + shape + length + seed


def compare(
    config: CompareConfig,
    output: Path,
    progress: Progress,
    on_model: Callable[[Results, Model], None] = lambda results, model: None,
    ranks: Ranks = ALONE,
) -> Results:
    """Run a comparison into a folder, or go on with what is there, and write its report.

    The folder gets config.toml, a folder for each trained model, results.json, figures/ and report.html. What is
    finished is not done again; an interrupted comparison run again gives the numbers of an uninterrupted one.

    A model that fails, as by a loss that diverges, leaves the others: what was asked of it is among the skipped entries
    (`Results.failures`), and is tried again when the comparison is run again.

    Args:
        config: what is compared.
        output: the folder.
        progress: told of each stage as it goes on.
        on_model: told of each model, and of all results so far, as soon as it is trained and measured, or has failed.
        ranks: the processes that share the work, all of which call this; rank 0 has the results and writes.

    Raises:
        ValueError: the folder holds another comparison, the data changed since it began, or too little data.
        BlockingIOError: another process works in the folder.
        OSError: a file cannot be read or written.
    """
    path = output / "results.json"
    with ExitStack() as stack:
        with ranks.leading():
            with config.naming_lists():
                for run in config.runs():
                    device = check_run(run, ranks)
            if ranks.is_first:
                stack.enter_context(hold(output, config))
            prepared = prepare(config.data, config.train.seed, progress)
            longest_window = max(map(config.evaluate.longest_window, config.lengths))
            material = read_material(config.evaluate, text_of(prepared, config.evaluate, longest_window))
            with config.naming_lists():
                for run in config.runs():
                    training_batches(run.train, prepared, ranks)  # refuses too little text
            starts: tuple[Start, ...] = (this_start(config, device),)
            if ranks.is_first:
                starts = begin(output, config, prepared.digests | material.sources, device)
            ranks.check_sees(output)
            results = read_results(path, provenance(config, starts, prepared.tokenizer, prepared, material.sources))
            results = results.without_failures()
            for lost in _lost(config, output, results):
                progress(f"dropping what was measured of {lost}, whose training is gone", 1, 1)
                results = results.without(lost)

        def measured(run: RunConfig, folder: Path) -> Iterator[Results]:
            """Measure one model; the results after each step."""
            with ranks.computing():
                subject = replace(open_run(folder), identity=config.identity(run))
            with tracking(config.train.track, folder, run, ranks) as track:
                yield from measure(
                    subject,
                    material,
                    config.evaluate,
                    results,
                    starts,
                    path,
                    progress,
                    shared_out(ranks),
                    lambda entries: track(run.train.steps, evaluated(entries)),
                )

        for run in config.runs():
            identity = config.identity(run)
            folder = output / config.folder(identity)
            errors: list[Exception] = []
            with _collected(errors):
                training = replace(train_run(run, folder, progress, prepared, ranks), model=identity)
            if not errors:
                results = results if training in results.training else results.add(training)
                with _collected(errors):
                    for so_far in measured(run, folder):
                        results = so_far
            for error in errors:
                failed = failures(identity, config.evaluate, material, results.cells(), error)
                results = results.started(starts).add(*failed)
                if ranks.is_first:
                    results.write(path)
            on_model(results, identity)
        if ranks.is_first:
            write_report(results, output, partial(progress, "drawing the report"))
    return results


@contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    """Add what ends the work on one model to errors, for that on the others to go on."""
    try:
        yield
    except FAILURES as error:
        errors.append(error)


def _lost(config: CompareConfig, output: Path, results: Results) -> list[Model]:
    """The models in results that are not those in their folders: whoever deletes a folder has its run trained again."""
    lost = []
    for training in results.training:
        finished = output / config.folder(training.model) / "training.json"
        with suppress(ValueError):  # a damaged record may be of this training, and fails where the run is gone on with
            if not finished.exists() or replace(read_training_record(finished), model=training.model) != training:
                lost.append(training.model)
    return lost


def run_name(method: str) -> str:
    """Name of a method's folder: no colons, which some file systems refuse."""
    return method.replace(":", "_")
