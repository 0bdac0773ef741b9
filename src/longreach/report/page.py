"""`report.html`: one file that a browser shows without network, scripts or anything beside it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from longreach.files import write_atomically
from longreach.report.drawing import DARK, LIGHT, to_png, to_svg
from longreach.report.grid import to_rich
from longreach.report.section import Picture, Section
from longreach.report.subjects import (
    caches,
    context,
    cost,
    decomposition,
    differences,
    offsets,
    paper,
    perplexity,
    retrieval,
    skipped,
    strides,
    summaries,
)
from longreach.results import Provenance, Results

if TYPE_CHECKING:
    from rich.console import Console

SUBJECTS = (
    *(perplexity, differences, paper, context, decomposition, strides, offsets, caches),
    *(cost, retrieval, summaries, skipped),
)
"""What the page is about, from top to bottom."""


@dataclass(frozen=True)
class Drawn:
    """A figure, drawn for light and for dark backgrounds."""

    light: bytes
    """SVG for light backgrounds and for print."""
    dark: bytes
    """SVG for dark backgrounds."""
    png: bytes
    """PNG for light backgrounds."""
    width: float
    """In inches, at which its text is as large as the page's notes."""


def sections(results: Results) -> list[Section]:
    """All that there is to show, in the page's order."""
    return [section for subject in SUBJECTS for section in subject.sections(results)]


def write_report(
    results: Results, folder: str | os.PathLike[str], on_drawn: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write `report.html` and `figures/*.{svg,png}`, one figure for each kind of entry, and return the page's path.

    The folder is made if need be, files of the same names are replaced, each of them whole or not at all. The bytes
    depend on the results and the versions of matplotlib and jinja2 only. `on_drawn` is told how many figures are drawn
    and how many there are. Raises OSError where the system does.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    shown = sections(results)
    pictures = [section.picture for section in shown if section.picture is not None]
    drawn: dict[str, Drawn] = {}
    for picture in pictures:
        on_drawn(len(drawn), len(pictures))
        drawn[picture.name] = _draw(picture)
    on_drawn(len(drawn), len(pictures))
    for name, images in drawn.items():
        write_atomically(folder / "figures" / f"{name}.svg", images.light)
        write_atomically(folder / "figures" / f"{name}.png", images.png)
    page = folder / "report.html"
    # A path on this system may hold bytes that are no text; the page shows a question mark for them.
    write_atomically(page, _page(results.provenance, shown, drawn).encode("utf-8", "replace"))
    return page


def _draw(picture: Picture) -> Drawn:
    light = picture.draw(LIGHT)
    return Drawn(to_svg(light), to_svg(picture.draw(DARK)), to_png(light), light.get_figwidth())


def _page(provenance: Provenance, shown: list[Section], drawn: dict[str, Drawn]) -> str:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("longreach.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    facts = {
        **_conditions(provenance),
        "seed of the split": provenance.split_seed,
        "corpus": provenance.corpus,
        "corpus hash": provenance.corpus_hash,
        "tokenizer hash": provenance.tokenizer_hash,
        "vocabulary": f"{provenance.vocab_size:,} tokens",
        "begun": provenance.starts[0].time,
        "last started": provenance.starts[-1].time,
    }
    return environment.from_string(text).render(
        sections=shown, drawn=drawn, facts=facts, config=json.dumps(provenance.config, indent=2, ensure_ascii=False)
    )


def _conditions(provenance: Provenance) -> dict[str, str]:
    """With what it ran: each of the different answers of all starts, in the order of these."""
    described = {
        "longreach": [s.longreach + (f", commit {s.git_commit}" if s.git_commit else "") for s in provenance.starts],
        "PyTorch, Python": [f"{start.torch}, {start.python}" for start in provenance.starts],
        "platform": [start.platform for start in provenance.starts],
        "device": [f"{start.device}, {start.num_threads} threads" for start in provenance.starts],
    }
    return {name: "; then ".join(dict.fromkeys(values)) for name, values in described.items()}


def print_tables(results: Results, console: Console) -> None:
    """Print what was found, from perplexity to summaries, and what was skipped. No number is cut off: a terminal
    narrower than a table wraps its lines.
    """
    from rich.measure import Measurement

    for grid in (grid for section in sections(results) for grid in section.tables):
        table = to_rich(grid)
        # Left to itself, rich would shorten the cells of a wide table to the width of the console.
        unbounded = console.options.update(max_width=100_000)
        narrowest = Measurement.get(console, unbounded, table).minimum
        if narrowest > console.width:
            table.width = narrowest
        console.print(table, crop=False, overflow="ignore")
