"""What the page shows, from first to last: each section is one function, which gives None when it has nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from longreach.report import context_findings, figures, tables
from longreach.report.context_figures import context_figure, decomposition_figure, offset_figure
from longreach.report.context_tables import decomposition_grid, offset_grid, stride_grid, ways_grid
from longreach.report.cost_findings import cost, training_advantage
from longreach.report.drawing import Theme
from longreach.report.findings import Finding, agreement_with_paper, extrapolation
from longreach.report.grid import Grid
from longreach.report.heatmaps import retrieval_figure, stride_figure
from longreach.report.line_panels import OFF_SCALE
from longreach.report.paper_tables import CITATION, URL
from longreach.report.selection import perplexity_lengths, retrieval_tasks
from longreach.report.task_findings import retrieval, summaries
from longreach.report.task_tables import accuracy_grid, summary_grid
from longreach.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure that is still to be drawn, once for each theme."""

    name: str
    """Of its files."""
    draw: Callable[[Theme], Figure]
    """Gives the figure."""
    alternative: str
    """What it shows, for those who do not see it."""


@dataclass(frozen=True)
class Section:
    """A part of the page: what to conclude, what it is seen in, and the numbers."""

    title: str
    """Its heading."""
    findings: tuple[Finding, ...] = ()
    """What to conclude and how sure one can be; with several training lengths, one for each."""
    picture: Picture | None = None
    """What it is seen in."""
    reading: str = ""
    """How to read the picture or the tables; may be empty."""
    tables: tuple[Grid, ...] = ()
    """The numbers."""
    source: tuple[str, str] | None = None
    """Name and address of what is quoted."""

    @property
    def certainties(self) -> tuple[str, ...]:
        """How sure one can be, each way of saying it once."""
        return tuple(dict.fromkeys(finding.certainty for finding in self.findings if finding.certainty))


def sections(results: Results) -> list[Section]:
    """All that there is to show, in the page's order."""
    made = [
        perplexities(results),
        paper(results),
        contexts(results),
        decompositions(results),
        strides(results),
        offsets(results),
        ways(results),
        costs(results),
        *(retrievals(results, task) for task in retrieval_tasks(results)),
        meetings(results),
        skipped(results),
    ]
    return [section for section in made if section is not None]


def perplexities(results: Results) -> Section | None:
    """Perplexity against length: who extrapolates, and the paper's headline."""
    lengths = perplexity_lengths(results)
    if not lengths:
        return None
    picture = Picture(
        "perplexity",
        lambda theme: figures.perplexity_figure(results, theme),
        "Perplexity per token against validation length, one curve per method. The table below has the numbers.",
    )
    reading = (
        "A curve that stays level or falls to the right of the dotted line, the training length, belongs to a "
        "method that extrapolates: longer inputs do not harm it. A curve that rises belongs to one that does not. "
        "The same tokens are scored at every length, in nonoverlapping windows; both axes are logarithmic. Part "
        "of a fall is relief from the early token curse: longer windows leave fewer tokens with little context. "
        "Each curve is one model from one seed; a difference of a percent or two may be chance."
        + _off_scale(any(record.perplexity > OFF_SCALE for record in results.records))
    )
    is_drawn = any(record.protocol == "nonoverlapping" for record in results.records)
    advantage = training_advantage(results)
    makers = (tables.main_grid, tables.word_grid, tables.bits_per_byte_grid)
    return Section(
        title="Perplexity at each length",
        findings=(*(extrapolation(results, n) for n in lengths), *(() if advantage is None else (advantage,))),
        picture=picture if is_drawn else None,
        reading=reading if is_drawn else "",
        tables=tuple(g for make in makers for n in lengths if (g := make(results, n)) is not None),
    )


def paper(results: Results) -> Section | None:
    """The paper's own curves, where there are some to set them beside."""
    lengths = perplexity_lengths(results)
    if not lengths:
        return None
    return Section(
        title="Beside the paper's own curves",
        findings=tuple(agreement_with_paper(results, length) for length in lengths),
        picture=Picture(
            "paper",
            figures.paper_figure,
            "The paper's perplexity against validation length for models trained at 512, 1,024 and 3,072 tokens.",
        ),
        reading=(
            "In the paper ALiBi alone stays level at every training length; sinusoidal leaves its level soon after "
            "the training length, rotary and the T5 bias later. Tables 2 to 4 (pages 16 to 18): WikiText-103 "
            "validation set, 247M parameters, nonoverlapping evaluation, perplexity per word. The T5 bias ran out of "
            "memory at the longest lengths. Model, corpus and tokens differ from those above: compare shapes, not "
            "levels."
        ),
        tables=(tables.paper_grid(),),
        source=(f"{CITATION}, arXiv 2108.12409v2", URL),
    )


def contexts(results: Results) -> Section | None:
    """Loss against context."""
    if not results.contexts:
        return None
    return Section(
        title="Does loss fall with context?",
        findings=_findings(context_findings.loss_by_context, results),
        picture=Picture(
            "context",
            lambda theme: context_figure(results, theme),
            "Loss against tokens of context, one curve per method, with the training length marked.",
        ),
        reading=(
            "Tokens at the start of a window have little context and a high loss: the early token curse. Thin dotted "
            "curves are of windows of the training length. A curve that goes on falling past the dotted line belongs "
            "to a model that uses longer context."
        ),
    )


def decompositions(results: Results) -> Section | None:
    """Where gains past the training length come from."""
    if not results.decompositions:
        return None
    return Section(
        title="Longer context, or relief from the early token curse?",
        findings=_findings(context_findings.decomposition, results),
        picture=Picture(
            "decomposition",
            lambda theme: decomposition_figure(results, theme),
            "Relief and beyond as bars around zero for each method and length. The table below has the numbers.",
        ),
        reading=(
            "Relief is the part of the gain that remains when no token may see more than the training length; beyond "
            "is what the context past it adds, or takes where the bar is on the left. Bars with an arrow go on past "
            "the scale, to the value written on them."
        ),
        tables=_grids(decomposition_grid, results),
    )


def strides(results: Results) -> Section | None:
    """Sliding windows beside nonoverlapping ones."""
    grids = _grids(stride_grid, results)
    if not grids:
        return None
    return Section(
        title="Sliding windows",
        findings=_findings(context_findings.strides, results),
        picture=Picture(
            "strides",
            lambda theme: stride_figure(results, theme),
            "Perplexity by validation length and stride, one map per model. The tables below have the numbers.",
        ),
        reading="The smaller the stride, the fewer tokens are scored with little context, and the dearer is scoring.",
        tables=grids,
    )


def offsets(results: Results) -> Section | None:
    """The same tokens at other positions."""
    if not results.offsets:
        return None
    return Section(
        title="The same tokens at other positions",
        findings=_findings(context_findings.offsets, results),
        picture=Picture(
            "offsets",
            lambda theme: offset_figure(results, theme),
            "Perplexity against the position of each window's first token. The table below has the numbers.",
        ),
        reading=(
            "To the right of the dotted line whole windows lie at positions past the training length. A method that "
            "sees distances alone is level."
            + _off_scale(any(entry.perplexity > OFF_SCALE for entry in results.offsets))
        ),
        tables=_grids(offset_grid, results),
    )


def ways(results: Results) -> Section | None:
    """Recomputing a window against keeping it in a cache."""
    grids = _grids(ways_grid, results)
    if not grids:
        return None
    return Section(
        title="Recompute the window, or keep it in a cache?",
        findings=_findings(context_findings.ways, results),
        tables=grids,
    )


def costs(results: Results) -> Section | None:
    """Speed and memory."""
    finding = cost(results)
    makers = (tables.evaluation_speed_grid, tables.evaluation_memory_grid)
    details = tuple(g for n in perplexity_lengths(results) for make in makers if (g := make(results, n)) is not None)
    trained = (tables.cost_grid(results), tables.training_grid(results)) if results.training else ()
    if not details and not trained:
        return None
    return Section("Speed and memory", () if finding is None else (finding,), tables=(*trained, *details))


def retrievals(results: Results, task: str) -> Section:
    """Answers found in long prompts."""
    return Section(
        title="Retrieval: a word told once" if task == "retrieval" else f"Retrieval: {task}",
        findings=_findings(lambda results, length: retrieval(results, task, length), results),
        picture=Picture(
            f"retrieval-{quote(task, safe='', errors='surrogatepass')}",
            lambda theme: retrieval_figure(results, task, theme),
            f"Answers of {task} found, by prompt length and depth, one map per model. The table below sums over depth.",
        ),
        reading=(
            "Cells: exact matches of cases. Depth: where the answer stood, 0% at the prompt's start, 100% at its end."
        ),
        tables=_grids(lambda results, length: accuracy_grid(results, task, length), results),
    )


def meetings(results: Results) -> Section | None:
    """Summaries."""
    finding, grid = summaries(results), summary_grid(results)
    if finding is None or grid is None:
        return None
    return Section("Summaries of meetings", (finding,), tables=(grid,))


def skipped(results: Results) -> Section | None:
    """What could not be measured."""
    if not results.skipped:
        return None
    return Section("What was left out", tables=(tables.skipped_grid(results),))


def _findings(make: Callable[[Results, int], Finding | None], results: Results) -> tuple[Finding, ...]:
    return tuple(found for n in results.train_lengths() if (found := make(results, n)) is not None)


def _grids(make: Callable[[Results, int], Grid | None], results: Results) -> tuple[Grid, ...]:
    return tuple(grid for n in results.train_lengths() if (grid := make(results, n)) is not None)


def _off_scale(is_there: bool) -> str:
    return " Triangles at the upper edge stand for perplexities above a billion." if is_there else ""
