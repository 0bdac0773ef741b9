"""The length grid: ALiBi trained at several lengths, each tested at all longer ones."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from experiments.claim import Claim, Judgement, is_above, is_below, perplexity, ratio, records, times, told, verdict
from longreach.report.curves import Curve, Panel, Scales, draw_panels
from longreach.report.drawing import LIGHT
from longreach.report.grid import MISSING, Grid
from longreach.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def judge(results: Results) -> Judgement:
    """Rows are training lengths, columns the lengths tested at."""
    lengths = results.train_lengths()
    tested = results.valid_lengths(lengths[0])
    longest = tested[-1]
    cells = {(train, valid): records(results, "alibi", train, valid) for train in lengths for valid in tested}
    gains = {train: ratio(cells[train, longest], cells[train, train]) for train in lengths}
    steps = {pair: ratio(cells[pair[1], longest], cells[pair[0], longest]) for pair in pairwise(lengths)}
    rows = []
    for train in lengths:
        texts = (told(perplexity(cells[train, n])) if n >= train else MISSING for n in tested)
        rows.append((f"{train:,}", *texts))
    own = "; ".join(f"{train:,}: {told(gain, times)}" for train, gain in gains.items())
    next_one = "; ".join(f"{after:,} over {before:,}: {told(step, times)}" for (before, after), step in steps.items())
    return Judgement(
        verdict([all(is_below(g, 1) for g in gains.values()), all(is_below(s, 1) for s in steps.values())]),
        (
            f"Perplexity at {longest:,} tokens over that at the training length, trained at {own}.",
            f"At {longest:,} tokens, trained at the longer over trained at the shorter length, {next_one}.",
            *(["A ratio above 1 is a perplexity that rose."] if any(is_above(g, 1) for g in gains.values()) else []),
        ),
        (
            Grid(
                title="Perplexity per token of ALiBi by training length (rows) and tested length (columns)",
                note="In brackets 95% t intervals over seeds.",
                columns=(("trained at",), *((f"{n:,}",) for n in tested)),
                rows=tuple(rows),
            ),
        ),
    )


def draw(results: Results) -> Figure:
    """One curve for each training length, from that length on."""
    first, *_ = lengths = results.train_lengths()
    curves = []
    for train in lengths:
        tested = (n for n in results.valid_lengths(train) if n >= train)
        cells = {float(n): perplexity(records(results, "alibi", train, n)) for n in tested}
        means = {length: cell.mean for length, cell in cells.items() if cell}
        curves.append(Curve(f"alibi:{train}", means, remark=" tokens"))
    scales = Scales("Validation length in tokens", "Perplexity per token")
    return draw_panels([Panel("By training length", first, tuple(curves))], scales, LIGHT)


CLAIM = Claim(
    title="Trained at any length, ALiBi is better at longer ones, and best when trained longer",
    statement=(
        "Press et al. 2022, Table 5 (WikiText-103): trained at 64, perplexity falls from 28.46 at 64 to 21.53 at 3,072 "
        "tokens; at 128 from 23.98 to 20.28; at 256 from 21.29 to 19.03; at 512 from 19.73 to 18.40. Each longer "
        "training length is better at every tested one."
    ),
    rule=(
        "Both parts must hold beyond the interval over seeds: perplexity at the longest tested length is below that at "
        "the training length, for each training length, and falls from each training length to the next."
    ),
    judge=judge,
    caveats=(
        "A model of this size uses little context, so that what there is to gain is small; a part of each fall is "
        "relief from the early token curse. All lengths see the same number of tokens in training, a hundredth of the "
        "paper's: where longer sequences are no better here, the likely reason is that nothing is learned yet from the "
        "tokens that only they show, while fewer of them make up a batch."
    ),
    figure=draw,
    caption=(
        "ALiBi's perplexity per token by tested length, both logarithmic, one curve for each training length, from "
        "there on: the mean over seeds."
    ),
)
