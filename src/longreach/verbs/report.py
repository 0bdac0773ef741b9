"""The page and the figures of a folder, from its results alone: `report`."""

from dataclasses import dataclass
from pathlib import Path

from longreach.report.page import write_report
from longreach.results import Results


@dataclass(frozen=True)
class ReportConfig:
    """What is to be reported."""

    folder: Path
    """Folder that holds results.json."""


def report(config: ReportConfig) -> Path:
    """Write report.html and figures/ beside the results; the page's path.

    Raises:
        OSError: there are no results, or the folder cannot be written.
        ValueError: the results are damaged.
    """
    return write_report(Results.read(config.folder / "results.json"), config.folder)
