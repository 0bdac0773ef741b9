"""Models measured one after another into one file of results: the verbs `evaluate` and `extend`."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from longreach.data.corpora import idle_field
from longreach.data.prepare import DataConfig, ValidationData, prepare_validation
from longreach.data.tokenizer import Tokenizer, load_tokenizer
from longreach.folder import begin, begun_with, hold, this_start
from longreach.measure.material import Material, num_read, read_material, text_of
from longreach.measure.plan import TEXT_TASKS, EvaluateConfig
from longreach.measure.subject import Subject
from longreach.measure.sweep import Share, evaluate
from longreach.measure.text_tasks import Text
from longreach.pretrained.lengths import training_length
from longreach.pretrained.load import adapt, load_configuration
from longreach.reading import refuse_below, refuse_empty, refuse_repeats, respelled
from longreach.report.page import write_report
from longreach.results import Entry, Model, Provenance, Results, Start, TrainingRecord
from longreach.results.document import pack_entries, unpack_entries
from longreach.train.config import RunConfig
from longreach.train.loop import resolve_device
from longreach.train.parallel import ALONE, Ranks
from longreach.train.tracking import check_trackers, evaluated
from longreach.verbs.open import fine_tuning, load_subject, named_dtype, names_pretrained, require_decoder, tokenizer_of
from longreach.verbs.report import MOST_MODELS
from longreach.verbs.scalings import adapt_by, check_pretrained_scaling, require_scaling, scaled_method
from longreach.verbs.sharing import shared_subject
from longreach.verbs.start import digest_of_weights
from longreach.verbs.train import Progress, check_record, open_run, provenance, read_run, tracking

_Split = tuple[DataConfig, str, int | None]


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation: models, and what is asked of each."""

    models: tuple[str, ...]
    """Folders of trained runs, as `train` writes them and `compare` does for each method, or Hugging Face models: a
    folder or a name on the hub."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured."""
    data: str | None = None
    """Text to test on: file, folder, glob, or hf:NAME[:CONFIG] with its split validation, if it has one; by default the
    validation text of each run, and for models trained elsewhere the source code of Python's standard library."""
    text_field: str | None = None
    """Field or column of data that holds the text; by default that of each run's own text, else text."""
    skip_bad: bool = False
    """Leave out files and lines of data that are no text, instead of refusing them; they are counted."""
    device: str | None = field(default=None, metadata={"may_differ": True})
    """Where to run; by default where a run was trained, and cuda for other models where there is one."""
    context_parallel: int = field(default=1, metadata={"may_differ": True})
    """How many processes share each window, a piece of it each, for lengths whose activations are too large for one: as
    many as torchrun started. For runs of longreach, and for windows of text without a cache."""
    train_length: int | None = None
    """L in tokens of Hugging Face models, where their configuration does not tell it."""
    dtype: str = "auto"
    """Of Hugging Face models: float32, bfloat16, float16, or auto for that of their files."""
    trust_remote_code: bool = False
    """Run code that comes with a Hugging Face model."""
    scalings: tuple[str, ...] = ()
    """How positions are scaled past L, one after another: none, linear, ntk, linear-fixed=FACTOR or ntk-fixed=FACTOR,
    and +logn after any of them, for runs of alibi and rotary and for Hugging Face models with ALiBi or rotary
    positions; yarn or yarn-fixed=FACTOR for rotary positions; stock for the own code of a Hugging Face model. "none" is
    a run as it was trained, a Hugging Face model as its configuration says, with the alibi_scaling that it has; the
    others take the place of that. When nothing is given, a Hugging Face model whose configuration says no alibi_scaling
    is left to its own code too."""

    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = field(default=(), metadata={"may_differ": True})
    """Where figures are shown too as they are measured."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty: give the folder of a trained run, or a Hugging Face model")
        refuse_empty(self, "models")
        named_dtype(self.dtype)  # refuses
        refuse_repeats(self, "models", read=os.path.normpath)
        refuse_below(self, 1, "train_length", "context_parallel")
        if self.context_parallel > 1:
            for name, able in (("tasks", ("perplexity", "positions")), ("protocols", ("nonoverlapping",))):
                if others := set(getattr(self.evaluate, name)) - set(able):
                    raise ValueError(
                        f"context_parallel={self.context_parallel} with {name}={','.join(sorted(others))}: "
                        f"it is for {' and '.join(able)}; leave one out"
                    )
        if self.data is None:
            for name, default in (("text_field", None), ("skip_bad", False)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)}: it is for data; give that too, or leave it out")
        if (count := len(self.models) * max(1, len(self.scalings))) > MOST_MODELS:
            raise ValueError(f"models: with their scalings they are {count:,}, give at most {MOST_MODELS:,}")
        refuse_repeats(self, "scalings", read=lambda word: word if word == "stock" else require_scaling(word))

    def idle(self) -> dict[str, str]:
        """Name of a field that nothing heeds beside the others -> why."""
        fields = self.evaluate.idle()
        if not set(self.evaluate.tasks) & set(TEXT_TASKS):
            fields |= dict.fromkeys(
                ("data", "text_field", "skip_bad"), f"tasks={','.join(self.evaluate.tasks)} score no text"
            )
        else:
            fields |= idle_field(self.text_field, self.data)
        return fields


@dataclass(frozen=True)
class _Model:
    """A model under a scaling, as far as its files tell of it before the weights are loaded."""

    name: str
    """As MODELS gives it."""
    identity: Model
    """Which one it is, in results."""
    data: DataConfig
    """Whose validation text it is tested on."""
    seed: int
    """Of its training, which decides on the split where the data does not."""
    tokenizer: Tokenizer
    device: torch.device
    training: TrainingRecord | None
    """What its training took, where it was trained by longreach."""
    pretrained: Any
    """Its configuration, where it is one of Hugging Face."""
    load: Callable[[], Subject]

    @property
    def split(self) -> _Split:
        """What decides on the validation text and its tokens."""
        seed = self.data.seed_of_split(self.seed) if self.data.valid_data is None else None
        return replace(self.data, tokenizer=None, split_seed=None), self.tokenizer.fingerprint, seed


def evaluate_models(
    config: EvaluationConfig,
    output: Path | None,
    progress: Progress,
    on_results: Callable[[Results], None] = lambda results: None,
    ranks: Ranks = ALONE,
) -> Results:
    """Measure models into a folder, or go on with what is there, and write its report; without a folder, only measure.

    All models are scored on the same text, and it is checked to be long enough for all before the first is loaded. When
    a model fails, the report of what was measured until then is written first.

    Args:
        config: the models, and what is measured.
        output: the folder.
        progress: told of each stage as it goes on.
        on_results: told of all results so far, after each piece of work.
        ranks: the processes that share the work, all of which call this; rank 0 has the results and writes.

    Raises:
        ValueError: there is no such model, the folder holds another evaluation, what is read has changed since it was
            begun, or the text does not serve.
        OSError: another process works in the folder, or a file cannot be read or written.
    """
    with ExitStack() as stack:
        with ranks.leading():
            check_trackers(config.track)
            if config.track and output is None:
                raise ValueError(f"track={','.join(config.track)}: it goes on in the folder of output: give that too")
            _check_context(config, ranks)
            pairs = itertools.product(config.models, config.scalings or (None,))
            _check_heeded(config)
            models = [_find(name, config, scaling) for name, scaling in pairs]
            _check_told_apart(models)
            if output is not None and ranks.is_first:
                stack.enter_context(hold(output, config))
            material = read_material(config.evaluate, None)
            prepared, texts = _read_texts(models, config, progress)
            sources = material.sources
            if output is not None:  # digests are kept for a folder, and they take as long as reading all weights
                for model in models:
                    sources = sources | digest_of_weights(model.name, model.pretrained)
            digests = _digests(models, prepared) | sources
            device = models[0].device
            if output is not None and ranks.is_first:
                starts = begin(output, config, digests, device)
            else:
                starts = (this_start(config, device),)
            track = stack.enter_context(tracking(config.track, output or Path(), config, ranks))
            path = None if output is None else output / "results.json"
            results = read_results(path, _provenance(config, starts, models, prepared, sources))
        try:
            for model in models:
                if model.training is not None and model.training not in results.training:
                    results = results.add(model.training)
                on_text = replace(material, text=texts.get(model.split))
                subject, share = model.load(), shared_out(ranks)
                if config.context_parallel > 1:
                    subject, share = shared_subject(subject, ranks), ranks.together

                def show(entries: Sequence[Entry], model: _Model = model) -> None:
                    track(0, {f"{model.identity}/{name}": value for name, value in evaluated(entries).items()})

                for so_far in measure(subject, on_text, config.evaluate, results, starts, path, progress, share, show):
                    results = so_far
                    on_results(results)
        except Exception:
            if output is not None and ranks.is_first and results.entries():
                write_report(results, output, partial(progress, "drawing the report"))
            raise
        on_results(results)  # where nothing was left to do, too
        if output is not None and ranks.is_first:
            write_report(results, output, partial(progress, "drawing the report"))
    return results


def _check_context(config: EvaluationConfig, ranks: Ranks) -> None:
    """Raise ValueError where the models' windows cannot be shared by all ranks."""
    if config.context_parallel == 1:
        return
    if config.context_parallel != ranks.size:
        raise ValueError(
            f"context_parallel={config.context_parallel} and {ranks.size} process{'es' if ranks.size > 1 else ''}: "
            f"start {config.context_parallel} by torchrun --nproc-per-node {config.context_parallel} -m longreach"
        )
    for name in config.models:
        if names_pretrained(name):
            raise ValueError(
                f"context_parallel={config.context_parallel}: {name} is a Hugging Face model, with attention of its "
                "own; leave it out"
            )


def shared_out(ranks: Ranks) -> Share:
    """Lets each rank take the next piece of work that is left."""
    return partial(ranks.shared, pack=pack_entries, unpack=unpack_entries)


def _check_heeded(config: EvaluationConfig) -> None:
    """Raise ValueError for an option that none of the models heeds."""
    if any(map(names_pretrained, config.models)):
        return
    for option in ("dtype", "trust_remote_code"):
        if (value := getattr(config, option)) != getattr(EvaluationConfig, option):
            raise ValueError(f"{option}={value}: it is for Hugging Face models, of which none is given; leave it out")


def _find(name: str, config: EvaluationConfig, scaling: str | None) -> _Model:
    """A model under a scaling."""
    if names_pretrained(name):
        model = _find_pretrained(name, config, scaling, fine_tuning(name))
    else:
        model = _find_run(name, config, scaling)
    if config.data is None:
        return model
    return replace(
        model,
        data=replace(
            model.data,
            data=config.data,
            valid_data=config.data,
            text_field=config.text_field or model.data.text_field,
            skip_bad=config.skip_bad,
            streaming=False,
        ),
    )


def _find_run(name: str, config: EvaluationConfig, scaling: str | None) -> _Model:
    """A model of our own. What its training took is told of it as it was trained."""
    folder = Path(name)
    run = read_run(folder)
    if config.train_length not in (None, run.train.train_length):
        raise ValueError(
            f"train_length={config.train_length}: {name} was trained by longreach at {run.train.train_length}; "
            "leave it out"
        )
    method = run.method if scaling is None else scaled_method(run, scaling, name)
    scaled = method != run.method
    identity = replace(run.identity, method=f"{run.method}:{scaling}") if scaled else run.identity
    tokenizer = str(folder / "tokenizer.json")
    return _Model(
        name=name,
        identity=identity,
        data=replace(run.data, tokenizer=tokenizer),
        seed=run.train.seed,
        tokenizer=load_tokenizer(tokenizer),
        device=resolve_device(run.train.device if config.device is None else config.device),
        training=None if scaled else _training(folder, run),
        pretrained=None,
        load=lambda: replace(open_run(folder, config.device, method), identity=identity),
    )


def _find_pretrained(name: str, config: EvaluationConfig, scaling: str | None, fine_tuned: RunConfig | None) -> _Model:
    """A model of Hugging Face, or one that was fine-tuned from it by longreach."""
    require_decoder(name)
    given = config.train_length or (fine_tuned.train.train_length if fine_tuned else None)
    configuration = load_configuration(name, trust_remote_code=config.trust_remote_code)
    if scaling is not None:
        check_pretrained_scaling(name, configuration, scaling)
    train_length = training_length(name, configuration, given)
    identity = Model(
        name if scaling is None else f"{name}:{scaling}", train_length, fine_tuned.train.seed if fine_tuned else None
    )
    trained_on = fine_tuned.train.device if fine_tuned else "auto"
    device = resolve_device(trained_on if config.device is None else config.device)
    training = _training(Path(name), fine_tuned) if fine_tuned else None
    if training is not None:  # it has another name in results, and may be measured as if trained at another length
        training = replace(training, model=identity) if training.train_length == train_length else None

    def load() -> Subject:
        subject = load_subject(
            name,
            configuration,
            device=device,
            dtype=config.dtype,
            train_length=given,
            trust_remote_code=config.trust_remote_code,
            adapt=adapt if scaling is None else partial(adapt_by, scaling, given),
        )
        return replace(subject, identity=identity)

    return _Model(
        name=name,
        identity=identity,
        data=replace(fine_tuned.data if fine_tuned else DataConfig(), tokenizer=name),
        seed=fine_tuned.train.seed if fine_tuned else 0,
        tokenizer=tokenizer_of(name),
        device=device,
        training=training,
        pretrained=configuration,
        load=load,
    )


def _training(folder: Path, run: RunConfig) -> TrainingRecord | None:
    """What the training of a run took, where that was written down."""
    return check_record(folder, run) if (folder / "training.json").exists() else None


def _check_told_apart(models: Sequence[_Model]) -> None:
    """Raise ValueError where a table would have two models under one name."""
    seen: dict[Model, str] = {}
    for model in models:
        same = seen.setdefault(model.identity, model.name)
        if same != model.name:
            raise ValueError(
                f"models: {same} and {model.name} are both {model.identity}, which a table cannot tell apart: evaluate "
                "them into two folders"
            )


def _read_texts(
    models: Sequence[_Model], config: EvaluationConfig, progress: Progress
) -> tuple[dict[_Split, ValidationData], dict[_Split, Text]]:
    """The data of each split, and the one text that all models are scored on, in the tokens of each.

    Both are empty where no text is scored.

    Raises:
        ValueError: the text is too short for one of the models, the validation text of one is not that of the first, or
            a model may have been trained on what would be scored.
    """
    longest = max(config.evaluate.longest_window(model.identity.train_length) for model in models)
    if not longest:
        return {}, {}
    prepared: dict[_Split, ValidationData] = {}
    for model in models:
        if model.split not in prepared:
            try:
                prepared[model.split] = prepare_validation(
                    model.data, model.tokenizer, model.seed, num_read(config.evaluate, longest), progress
                )
            except ValueError as error:
                if config.data is None:
                    raise
                raise ValueError(respelled(str(error), {"valid_data": "data"})) from error
    first = models[0]
    for model in models:
        if prepared[model.split].valid_hash != prepared[first.split].valid_hash:
            raise ValueError(
                f"models: {model.name} has not the validation text of the first one: give the text by data"
            )
        if config.data is None:
            _check_held_out(Path(model.name), prepared[model.split])
    return prepared, {split: text_of(data, config.evaluate, longest) for split, data in prepared.items()}


def _check_held_out(folder: Path, prepared: ValidationData) -> None:
    """Check that what is held out of the text of a run was held out when it was trained."""
    trained_here = (folder / "config.toml").exists()
    if trained_here and prepared.split_off and begun_with(folder)["text"] != prepared.corpus_hash:
        raise ValueError(
            f"models: the text of {folder} has changed since that was trained on it, so that it may have seen what is "
            "held out now: give the text as it was, or another to test on by --data"
        )


def _digests(models: Sequence[_Model], prepared: Mapping[_Split, ValidationData]) -> dict[str, str]:
    """Of the text, where one is scored, and of the tokenizers."""
    text = {"text": prepared[models[0].split].corpus_hash} if prepared else {}
    return text | {"tokenizer": " ".join(dict.fromkeys(model.tokenizer.fingerprint for model in models))}


def _provenance(
    config: EvaluationConfig,
    starts: tuple[Start, ...],
    models: Sequence[_Model],
    prepared: Mapping[_Split, ValidationData],
    sources: dict[str, str],
) -> Provenance:
    """That of the first model, with the tokenizers and the files of all."""
    first = models[0]
    of_first = provenance(config, starts, first.tokenizer, prepared.get(first.split), sources)
    return replace(of_first, tokenizer_hash=_digests(models, prepared)["tokenizer"])


def read_results(path: Path | None, provenance: Provenance) -> Results:
    """The results that a file holds so far, or new ones with their provenance. ValueError where it is damaged."""
    return Results.read(path) if path is not None and path.exists() else Results(provenance=provenance)


def measure(
    subject: Subject,
    material: Material,
    config: EvaluateConfig,
    results: Results,
    starts: tuple[Start, ...],
    path: Path | None,
    progress: Progress,
    share: Share,
    on_entries: Callable[[Sequence[Entry]], None] = lambda entries: None,
) -> Iterator[Results]:
    """Results with what a configuration asks of a subject, after each piece of work, then written to path already.

    They came from these starts; where nothing is left to do they stay as they are. `share` shares the work out among
    several ranks, of which the first has all results. `on_entries` is told what each piece gave.
    """
    resolved = config.resolved(subject.train_length)
    for entries in evaluate(subject, material, resolved, results.cells(), progress, share):
        results = results.started(starts).add(*entries)
        if path is not None:
            results.write(path)
        on_entries(entries)
        yield results
