"""`report.html`: one file that a browser shows without network, scripts or anything beside it."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from longreach.report import figures, tables
from longreach.report.findings import agreement_with_paper, extrapolation
from longreach.report.paper_tables import CITATION, URL
from longreach.results import Results, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One figure, drawn for light and for dark backgrounds."""

    light: bytes
    """SVG for light backgrounds and for print."""
    dark: bytes
    """SVG for dark backgrounds."""
    png: bytes
    """PNG for light backgrounds."""
    alternative: str
    """What the figure shows, for those who do not see it."""


def write_report(results: Results, folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `figures/{perplexity,paper}.{svg,png}` into `folder`; return the page's path.

    The folder is made if need be, files of the same names are replaced, each of them whole or not at all. The bytes
    depend on the results and the versions of matplotlib and jinja2 only. Raises OSError where the system does.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    pictures = _pictures(results)
    for name, picture in pictures.items():
        write_atomically(folder / "figures" / f"{name}.svg", picture.light)
        write_atomically(folder / "figures" / f"{name}.png", picture.png)
    page = folder / "report.html"
    # A path on this system may hold bytes that are no text; the page shows a question mark for them.
    write_atomically(page, _page(results, pictures).encode("utf-8", "replace"))
    return page


def _page(results: Results, pictures: dict[str, Picture]) -> str:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("longreach.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    lengths = results.train_lengths()
    provenance = results.provenance
    facts = {
        "longreach": provenance.longreach + (f", commit {provenance.git_commit}" if provenance.git_commit else ""),
        "PyTorch, Python": f"{provenance.torch}, {provenance.python}",
        "platform": provenance.platform,
        "device": f"{provenance.device}, {provenance.num_threads} threads",
        "seed": provenance.seed,
        "corpus": provenance.corpus,
        "corpus hash": provenance.corpus_hash,
        "tokenizer hash": provenance.tokenizer_hash,
        "vocabulary": f"{provenance.vocab_size:,} tokens",
        "created": provenance.created,
    }
    return environment.from_string(text).render(
        findings=[extrapolation(results, length) for length in lengths],
        agreements=[(length, agreement_with_paper(results, length)) for length in lengths],
        pictures=pictures,
        main_grids=[tables.main_grid(results, length) for length in lengths],
        detail_grids=[make(results, length) for length in lengths for make in _DETAILS],
        paper=tables.paper_grid(),
        training=tables.training_grid(results),
        skipped=tables.skipped_grid(results),
        off_scale=any(record.perplexity > figures.OFF_SCALE for record in results.records),
        facts=facts,
        config=json.dumps(provenance.config, indent=2, ensure_ascii=False),
        citation=CITATION,
        url=URL,
    )


_DETAILS = (tables.bits_per_byte_grid, tables.evaluation_speed_grid, tables.evaluation_memory_grid)


def _pictures(results: Results) -> dict[str, Picture]:
    light, dark = figures.LIGHT, figures.DARK
    return {
        "perplexity": _picture(
            figures.perplexity_figure(results, light),
            figures.perplexity_figure(results, dark),
            "Perplexity per token against validation length, one curve per method. The table below has the numbers.",
        ),
        "paper": _picture(
            figures.paper_figure(light),
            figures.paper_figure(dark),
            "The paper's perplexity against validation length for models trained at 512, 1,024 and 3,072 tokens.",
        ),
    }


def _picture(light: Figure, dark: Figure, alternative: str) -> Picture:
    return Picture(figures.to_svg(light), figures.to_svg(dark), figures.to_png(light), alternative)
