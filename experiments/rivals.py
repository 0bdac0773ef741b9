"""ALiBi beside its rivals at one training length: what the experiments on slopes and on descendants share."""

from experiments.claim import is_above, is_below, perplexity, ratio, records, times, told
from longreach.report.grid import Grid, format_speed
from longreach.results import OverSeeds, Results

OURS = "alibi"


def beside(results: Results) -> dict[str, OverSeeds]:
    """Rival -> its perplexity over ALiBi's at the longest tested length, paired by seed."""
    (train,) = results.train_lengths()
    longest = results.valid_lengths(train)[-1]
    ours = records(results, OURS, train, longest)
    rivals = (method for method in results.methods() if method != OURS)
    return {m: ratio(theirs, ours) for m in rivals if (theirs := records(results, m, train, longest))}


def sentences(results: Results) -> tuple[str, ...]:
    """Who is below, above and not told apart from ALiBi at the longest tested length."""
    found = beside(results)
    (train,) = results.train_lengths()
    groups = {
        "below ALiBi's": [m for m, r in found.items() if is_below(r, 1)],
        "above it": [m for m, r in found.items() if is_above(r, 1)],
        "not told apart from it": [m for m, r in found.items() if not is_below(r, 1) and not is_above(r, 1)],
    }
    told_of = (
        f"{name} with {', '.join(f'`{m}` {told(found[m], times)}' for m in methods)}"
        for name, methods in groups.items()
        if methods
    )
    return (f"Perplexity at {results.valid_lengths(train)[-1]:,} tokens is {'; '.join(told_of)}.",)


def grid(results: Results) -> Grid:
    """Perplexity by method and length, growth from the training length, and training speed."""
    (train,) = results.train_lengths()
    tested = results.valid_lengths(train)
    rows = []
    for method in results.methods():
        cells = [records(results, method, train, n) for n in tested]
        growth = told(ratio(cells[-1], cells[0]), times) if cells[-1] else "-"
        speeds = [entry.tokens_per_second for entry in results.training if entry.method == method]
        speed = format_speed(sum(speeds) / len(speeds) if speeds else None)
        rows.append((method, *(told(perplexity(entries)) for entries in cells), growth, speed))
    return Grid(
        title=f"Perplexity per token, trained at {train:,} tokens, by tested length",
        note="In brackets 95% t intervals over seeds.",
        columns=(("method",), *((f"{n:,}",) for n in tested), ("longest", "/ 1x"), ("training", "tokens/s")),
        rows=tuple(rows),
    )
