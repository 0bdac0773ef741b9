"""The page and the figures of one folder or of several, from their results alone: `report`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longreach.reading import refuse_repeats
from longreach.report.page import write_report
from longreach.results import Results, merge

if TYPE_CHECKING:
    from longreach.verbs.train import Progress  # which would load torch


MOST_MODELS = 1000
"""How many models one page may show, and so one comparison or evaluation may have."""


@dataclass(frozen=True)
class ReportConfig:
    """What is to be reported."""

    folders: tuple[Path, ...]
    """Folders that hold results.json, as `compare` and `evaluate` write it. Several are shown on one page where they
    agree in text, tokenizer and settings."""
    output: Path | None = None
    """Folder to write report.html and figures to; that of the results when none is given, so that several need one."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("folders is empty: give a folder that holds results.json")
        refuse_repeats(self, "folders")
        if len(self.folders) > MOST_MODELS:
            raise ValueError(f"folders: these are {len(self.folders):,}, give at most {MOST_MODELS:,}")
        if len(self.folders) > 1 and self.output is None:
            raise ValueError(f"output is missing with {len(self.folders)} folders: give the folder for their page")


def report(config: ReportConfig, progress: Progress) -> Path:
    """Write report.html and figures/, telling `progress` how far that is; the page's path.

    Raises:
        OSError: there are no results, or the folder cannot be written.
        ValueError: results are damaged, or do not compare.
    """
    results = merge({str(folder): Results.read(folder / "results.json") for folder in config.folders})
    if (count := len(results.models())) > MOST_MODELS:
        raise ValueError(f"folders: they hold {count:,} models, a page has room for {MOST_MODELS:,}; give fewer")
    output = config.folders[0] if config.output is None else config.output
    return write_report(results, output, partial(progress, "drawing the report"))
