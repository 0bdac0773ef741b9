"""Sizes: how far past L sinusoidal positions survive in larger models, and what shifting them in training gives."""

from itertools import pairwise

from experiments.claim import Claim, Judgement, is_above, perplexity, ratio, records, times, told, verdict
from longreach.report.grid import Grid
from longreach.report.subjects.offsets import offset_figure
from longreach.results import OffsetRecord, OverSeeds, Results, over_seeds

SURVIVED = 1.02
"""Up to this times the perplexity at L a length is survived."""

SINUSOIDAL, SHIFTED, OURS = "sinusoidal", "sinusoidal-shifted", "alibi"


def judge(results: Results) -> Judgement:
    """Each method in each shape, from the smallest; the curve of shifted training by where its positions begin."""
    (train,) = results.train_lengths()
    shapes = tuple(dict.fromkeys(str(model.shape) for model in results.models()))
    tested = results.valid_lengths(train)
    survived = {name: _survived(results, name, train) for name in results.methods()}
    growth = {name: _growth(results, name, train, 2 * train) for name in results.methods()}
    sizes = [f"{SINUSOIDAL}:{shape}" for shape in shapes]
    curves = {shape: _curve(results, f"{SHIFTED}:{shape}") for shape in shapes}
    edges = {shape: _edges(curve, tested[-1]) for shape, curve in curves.items()}
    named = ", ".join(f"{shape} {told(survived[f'{SINUSOIDAL}:{shape}'], _tokens)}" for shape in shapes)
    grown = ", ".join(f"{shape} {told(growth[f'{SINUSOIDAL}:{shape}'], times)}" for shape in shapes)
    ends = "; ".join(f"{shape} {told(low, times)} and {told(high, times)}" for shape, (low, high) in edges.items())
    return Judgement(
        verdict(
            (
                all(survived[large].mean < survived[small].mean for small, large in pairwise(sizes)),
                all(growth[large].mean > growth[small].mean for small, large in pairwise(sizes)),
                *(is_above(end, 1) for ends_of in edges.values() for end in ends_of),
                all(survived[f"{OURS}:{shape}"].mean == tested[-1] - train for shape in shapes),
            )
        ),
        (
            f"Tokens past {train:,} that sinusoidal positions survive: {named}; their perplexity at {2 * train:,} over "
            f"that at {train:,}: {grown}.",
            f"Trained shifted, perplexity of windows that begin at 0 and at {tested[-1]:,} over that at "
            f"{tested[-1] // 2:,}: {ends}.",
        ),
        (
            Grid(
                title=f"Tokens past {train:,} survived, and perplexity at {train:,} and {2 * train:,} tokens",
                note=(
                    f"Survived: up to the last of the tested lengths {', '.join(f'{n:,}' for n in tested)} before "
                    f"perplexity exceeds {SURVIVED} times that at {train:,}. In brackets 95% t intervals over seeds."
                ),
                columns=(("method and shape",), ("survived",), (f"{train:,}",), (f"{2 * train:,}",), ("growth",)),
                rows=tuple(
                    (
                        name,
                        told(survived[name], _tokens),
                        *(told(perplexity(records(results, name, train, length))) for length in (train, 2 * train)),
                        told(growth[name], times),
                    )
                    for name in results.methods()
                ),
            ),
            Grid(
                title=f"Perplexity of windows of {train:,} tokens by the position of their first, trained shifted",
                note=(
                    f"Training sequences begin anywhere from 0 to {tested[-1]:,}. In brackets 95% t intervals over "
                    "seeds."
                ),
                columns=(("first position",), *((shape,) for shape in shapes)),
                rows=tuple(
                    (f"{offset:,}", *(told(over_seeds(curves[s][offset]).exponentiated()) for s in shapes))
                    for offset in curves[shapes[0]]
                ),
            ),
        ),
    )


def _survived(results: Results, name: str, train: int) -> OverSeeds:
    """Tokens past L up to which every tested length has at most SURVIVED times the perplexity at L."""
    ends: dict[int | None, int] = {}
    at_train = {entry.seed: entry.perplexity for entry in records(results, name, train, train)}
    failed = set()
    for length in results.valid_lengths(train):
        for entry in records(results, name, train, length):
            if entry.perplexity > SURVIVED * at_train[entry.seed]:
                failed.add(entry.seed)
            elif entry.seed not in failed:
                ends[entry.seed] = length - train
    return over_seeds([float(end) for end in ends.values()])


def _growth(results: Results, name: str, train: int, length: int) -> OverSeeds:
    return ratio(records(results, name, train, length), records(results, name, train, train))


def _curve(results: Results, name: str) -> dict[int, list[float]]:
    """Position of the first token -> losses, one for each seed."""
    curve: dict[int, list[float]] = {}
    for entry in sorted(_offsets(results, name), key=lambda entry: entry.offset):
        curve.setdefault(entry.offset, []).append(entry.loss)
    return curve


def _offsets(results: Results, name: str) -> list[OffsetRecord]:
    return [entry for entry in results.offsets if entry.method == name]


def _edges(curve: dict[int, list[float]], longest: int) -> tuple[OverSeeds, OverSeeds]:
    """Perplexity of windows that begin at 0, and at the last position that any does in training, over the middle's."""
    middle = curve[longest // 2]
    first, last = (
        over_seeds([there - here for there, here in zip(curve[edge], middle, strict=True)]).exponentiated()
        for edge in (0, longest)
    )
    return first, last


def _tokens(count: float) -> str:
    return f"{count:,.0f}"


CLAIM = Claim(
    title="Larger sinusoidal models survive fewer tokens past their training length, and shifting fails at the edges",
    statement=(
        "The ALiBi author's note on why sinusoidal positions do not extrapolate: larger models overfit the positions "
        "that they see more; trained on windows shifted at random, a model does well at the positions in the middle of "
        "the range and badly at its edges. In Press et al. 2022, Tables 2 and 3, 247M parameters trained at 512 stay "
        "within 2% for 90 further tokens, trained at 1,024 for 100."
    ),
    rule=(
        "From each size to the next, the tokens that sinusoidal positions survive become fewer on average and the "
        "growth to 2L larger; with shifted training, in each size, windows that begin at either edge of the range have "
        "a higher perplexity than those in its middle, beyond the interval over seeds; ALiBi survives every tested "
        "length."
    ),
    judge=judge,
    caveats=(
        "Shapes are layers x width. They are far from the sizes that the note speaks of, and all learn from as many "
        "tokens at one learning rate."
    ),
    figure=offset_figure,
    caption=(
        "Perplexity of the same windows when all their positions are raised: the mean over seeds, single seeds thin."
    ),
)
