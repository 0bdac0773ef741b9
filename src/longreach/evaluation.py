"""Models measured one after another into one file of results: the verbs `evaluate` and `extend`."""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longreach.data.prepare import DataConfig, prepare
from longreach.evaluate.config import RETRIEVAL_TASKS, EvaluateConfig
from longreach.evaluate.huggingface import StateLength, load_subject
from longreach.evaluate.retrieval import read_cases
from longreach.evaluate.scorer import Text
from longreach.evaluate.subject import Subject
from longreach.evaluate.summarize import read_meetings
from longreach.evaluate.sweep import Material, evaluate
from longreach.extension.extend import extend, fixed_length
from longreach.extension.interpolation import SCALINGS
from longreach.extension.pretrained import adapt, holds_pretrained
from longreach.report.page import write_report
from longreach.results import Provenance, Results
from longreach.runs import Progress, open_run, provenance, text_of
from longreach.train.config import RunConfig, check_folder, claim_folder, load_config
from longreach.train.loop import resolve_device


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation: models, and what is asked of each."""

    models: tuple[str, ...]
    """Folders of trained runs, as `train` writes them and `compare` does for each method, or Hugging Face models: a
    folder or a name on the hub."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured."""
    data: str | None = None
    """Text to test on: file, folder, glob or hf:NAME[:CONFIG]; by default the validation text of each run, and for
    models trained elsewhere the source code of Python's standard library."""
    device: str | None = None
    """Where to run; by default where a run was trained, and cuda for other models where there is one."""
    train_length: int | None = None
    """L in tokens of Hugging Face models, where their configuration does not tell it."""
    dtype: str = "auto"
    """Of Hugging Face models: float32, bfloat16, float16, or auto for that of their files."""
    trust_remote_code: bool = False
    """Run code that comes with a Hugging Face model."""
    scalings: tuple[str, ...] = ()
    """How the slopes of Hugging Face models with ALiBi are scaled past L, one after another: none, linear, ntk or
    linear-fixed=FACTOR, and +logn after any of them; stock is the model's own code. When none is given, as the
    model's configuration says."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("MODELS is empty: give the folder of a trained run, or a Hugging Face model")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"MODELS={' '.join(self.models)}: give each model once")
        if self.train_length is not None and self.train_length < 1:
            raise ValueError(f"train_length={self.train_length}: give a positive number of tokens")
        if len(set(self.scalings)) < len(self.scalings):
            raise ValueError(f"scalings={','.join(self.scalings)}: give each once")
        for scaling in self.scalings:
            if scaling != "stock":
                _parse_scaling(scaling)


def evaluate_models(config: EvaluationConfig, output: Path | None, progress: Progress) -> Results:
    """Measure models into a folder, or go on with what is there, and write its report; without a folder, only measure.

    Raises:
        ValueError: there is no such model, the folder holds another evaluation, or the text does not serve.
        OSError: a file cannot be read or written.
    """
    if output is not None:
        check_folder(output, config)
    path = None if output is None else output / "results.json"
    results: Results | None = None
    measured: dict[tuple[str, int], str] = {}
    for name, scaling in itertools.product(config.models, config.scalings or (None,)):
        subject, data, seed = open_subject(name, config, scaling)
        same = measured.setdefault((subject.name, subject.train_length), name)
        if same != name:
            raise ValueError(
                f"MODELS: {same} and {name} are both {subject.name} trained at {subject.train_length}, which a table "
                "cannot tell apart: evaluate them into two folders"
            )
        asked = config.evaluate.resolved(subject.train_length)
        longest_window = asked.longest_window(subject.train_length)
        prepared = prepare(data, seed, progress) if longest_window else None
        material = read_material(asked, None if prepared is None else text_of(prepared, asked, longest_window))
        now = provenance(config, str(subject.device), seed, subject.tokenizer, prepared)
        if output is not None:
            claim_folder(output, config)
        results = begin(path, now) if results is None else _on_the_same_text(results, now, name)
        results = measure(subject, material, config.evaluate, results, path, progress)
    assert results is not None  # there is at least one model
    if output is not None:
        write_report(results, output)
    return results


def open_subject(name: str, config: EvaluationConfig, scaling: str | None) -> tuple[Subject, DataConfig, int]:
    """A model under a scaling, the data whose validation text it is tested on, and the seed of that data's split."""
    folder = Path(name)
    trained_here = (folder / "config.toml").exists()
    if holds_pretrained(folder) or not (trained_here or (folder.is_dir() and not (folder / "config.json").exists())):
        fine_tuned = load_config(RunConfig, folder / "config.toml") if trained_here else None
        train_length = config.train_length or (fine_tuned.train.train_length if fine_tuned else None)
        subject = load_subject(
            name,
            device=resolve_device(config.device or (fine_tuned.train.device if fine_tuned else "auto")),
            dtype=config.dtype,
            train_length=train_length,
            trust_remote_code=config.trust_remote_code,
            adapt=adapt if scaling is None else partial(_adapt_by, scaling, train_length),
        )
        data, seed = (fine_tuned.data, fine_tuned.train.seed) if fine_tuned else (DataConfig(), 0)
        tokenizer = name
    else:
        if scaling is not None:
            raise ValueError(
                f"scalings={scaling}: {name} was trained by longreach; fine-tune it with --from and a method such as "
                "alibi:dynamic=true"
            )
        run = open_run(folder, config.device)
        if config.train_length not in (None, run.model.config.train_length):
            raise ValueError(
                f"train_length={config.train_length}: {name} was trained by longreach at "
                f"{run.model.config.train_length}; leave it out"
            )
        subject, data, seed = run.subject(), run.config.data, run.config.train.seed
        tokenizer = str(folder / "tokenizer.json")
    if scaling is not None:
        subject = replace(subject, name=f"{name}:{scaling}")
    if config.data is not None:
        data = replace(data, data=config.data, valid_data=config.data, streaming=False)
    return subject, replace(data, tokenizer=tokenizer), seed


def _adapt_by(scaling: str, train_length: int | None, model: Any) -> StateLength | None:
    """Extend a loaded model in place by a scaling, or leave it to its stock code."""
    if scaling == "stock":
        return None
    extend(model, train_length=train_length, **_parse_scaling(scaling))
    return partial(fixed_length, model)


def _parse_scaling(scaling: str) -> dict[str, Any]:
    """What `extend` is given for NAME[=FACTOR][+logn]."""
    base, plus, logn = scaling.partition("+")
    name, equals, factor = base.partition("=")
    if (plus and logn != "logn") or name not in SCALINGS or bool(equals) != (name == "linear-fixed"):
        raise ValueError(
            f"scalings={scaling}: give stock, or one of {', '.join(SCALINGS)} (as in linear-fixed=2), and +logn"
        )
    try:
        return {"scaling": name, "factor": float(factor) if equals else None, "logn": bool(logn)}
    except ValueError:
        raise ValueError(f"scalings={scaling}: {factor!r} is no number; give L'/L, as in linear-fixed=2") from None


def read_material(config: EvaluateConfig, text: Text | None) -> Material:
    """The text, and what the files of a configuration hold.

    Raises:
        ValueError: a file cannot be read, or lacks a field; the line is named.
    """
    cases = None
    if config.cases is not None:
        (task,) = (task for task in config.tasks if task in RETRIEVAL_TASKS)
        cases = read_cases(task, Path(config.cases))
    return Material(text, cases, () if config.meetings is None else read_meetings(Path(config.meetings)))


def begin(path: Path | None, now: Provenance) -> Results:
    """The results that a file holds so far, or new ones.

    Raises:
        ValueError: the file is damaged, or what it holds was measured on another text.
    """
    if path is None or not path.exists():
        return Results(provenance=now)
    results = Results.read(path)
    if results.provenance.corpus_hash != now.corpus_hash:
        raise ValueError(
            f"data {now.corpus!r} has changed since {path} was begun: give a new output folder, or the text as it was"
        )
    return results


def measure(
    subject: Subject,
    material: Material,
    config: EvaluateConfig,
    results: Results,
    path: Path | None,
    progress: Progress,
) -> Results:
    """Results with what a configuration asks of a subject; each piece of work is written to path when it is done."""
    resolved = config.resolved(subject.train_length)
    for entries in evaluate(subject, material, resolved, results.cells(), progress):
        results = results.add(*entries)
        if path is not None:
            results.write(path)
    return results


def _on_the_same_text(results: Results, now: Provenance, name: str) -> Results:
    """The results, to which another model's are to be added.

    Raises:
        ValueError: it would be tested on another text than the models before.
    """
    before = results.provenance
    if (before.corpus_hash, before.seed) != (now.corpus_hash, now.seed):
        raise ValueError(f"MODELS: {name} was not trained on the text of the first one: give the text by data")
    hashes = dict.fromkeys((*before.tokenizer_hash.split(), now.tokenizer_hash))
    return replace(results, provenance=replace(before, tokenizer_hash=" ".join(hashes)))
