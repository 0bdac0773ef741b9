"""A trained run as a model that stock transformers loads: `export`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from longreach.models.decoder import Decoder
from longreach.pretrained.export import export_mpt
from longreach.reading import respelled
from longreach.report.grid import to_markdown
from longreach.report.subjects.perplexity import main_grid
from longreach.results import Model, Results
from longreach.train.loop import read_training_record
from longreach.verbs.train import open_run


@dataclass(frozen=True)
class ExportConfig:
    """What is to be exported, and as what."""

    run: Path
    """Folder of a trained run."""
    output: Path
    """Folder to write to; new or empty."""
    to: Literal["mpt"] = "mpt"
    """The architecture: MPT is the published one that holds ALiBi without loss."""
    max_length: int | None = None
    """The longest input in tokens that the exported model is to take; 16 times the training length by default."""
    results: Path | None = None
    """A results.json whose perplexities of this run go into the model card; by default that of the comparison that
    the run belongs to."""


def export(config: ExportConfig) -> None:
    """Write a run's model, tokenizer and model card.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: its files are damaged, or the architecture cannot hold what it is; and as `export_mpt`.
        OSError: the folder cannot be written.
    """
    run = open_run(config.run, "cpu")
    assert isinstance(run.model, Decoder)  # the model of a run
    if config.results is None:
        card_table = _of_comparison(config.run)
    elif (card_table := _card_table(_read(config.results), run.identity)) is None:
        raise ValueError(f"results={config.results}: it has no perplexities of {run.identity}; give others, or none")
    try:
        export_mpt(
            run.model,
            config.output,
            max_length=16 * run.train_length if config.max_length is None else config.max_length,
            tokenizer=config.run,
            card_table=card_table,
        )
    except (ValueError, FileExistsError) as error:
        raise type(error)(respelled(str(error), {"folder": "output", "tokenizer": "run"})) from error


def _read(path: Path) -> Results:
    """The results that were asked for."""
    try:
        return Results.read(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"results={path}: {error}") from error


def _of_comparison(run: Path) -> str | None:
    """The perplexities of a run in the comparison that trained it; None where it was trained alone."""
    path = run.resolve().parent / "results.json"
    if not path.exists():
        return None
    record, results = read_training_record(run / "training.json"), Results.read(path)
    alike = (entry.model for entry in results.training if replace(entry, model=record.model) == record)
    # In a comparison of several shapes it has that of its own, too.
    model = next((model for model in alike if replace(model, shape=None) == record.model), None)
    return None if model is None else _card_table(results, model)


def _card_table(results: Results, model: Model) -> str | None:
    """The perplexities of one model as Markdown; None where there are none."""
    alone = Results(
        provenance=results.provenance,
        training=tuple(entry for entry in results.training if entry.model == model),
        records=tuple(entry for entry in results.records if entry.model == model),
    )
    return to_markdown(main_grid(alone, model.train_length)) if alone.records else None
