"""The page and the figures of a folder, from its results alone: `report`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longreach.report.page import write_report
from longreach.results import Results

if TYPE_CHECKING:
    from longreach.verbs.train import Progress  # which would load torch


@dataclass(frozen=True)
class ReportConfig:
    """What is to be reported."""

    folder: Path
    """Folder that holds results.json."""


def report(config: ReportConfig, progress: Progress) -> Path:
    """Write report.html and figures/ beside the results, telling `progress` how far that is; the page's path.

    Raises:
        OSError: there are no results, or the folder cannot be written.
        ValueError: the results are damaged.
    """
    results = Results.read(config.folder / "results.json")
    return write_report(results, config.folder, partial(progress, "drawing the report"))
