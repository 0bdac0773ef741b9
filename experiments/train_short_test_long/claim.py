"""Train short, test long: every method at L and 2L, tested far past both."""

from experiments.claim import Claim, Judgement, is_above, is_below, perplexity, ratio, records, times, told, verdict
from longreach.report.grid import Grid
from longreach.report.subjects.perplexity import perplexity_figure
from longreach.results import Results

ORDER = ("alibi", "t5", "rotary", "sinusoidal")
"""From the method that extrapolates best to the one that does worst, as the paper has it."""


def judge(results: Results) -> Judgement:
    """One table for each training length, and the growth at the longest length that all were tested at."""
    tables, findings, parts = [], [], []
    for train in results.train_lengths():
        tested = [length for length in results.valid_lengths(train) if length >= train]
        of = {m: {n: records(results, m, train, n) for n in tested} for m in results.methods(train)}
        rows = [(method, *(told(perplexity(entries)) for entries in by.values())) for method, by in of.items()]
        longest = tested[-1]
        growth = {m: ratio(by[longest], by[train]) for m, by in of.items() if by[longest]}
        named = "; ".join(f"{method} {told(figure, times)}" for method, figure in growth.items())
        findings.append(f"Trained at {train:,}: perplexity at {longest:,} tokens over that at {train:,}: {named}.")
        means = [growth[method].mean for method in ORDER]
        parts += [not is_above(growth["alibi"], 1), all(is_above(growth[m], 1) for m in ORDER[2:])]
        parts += [means == sorted(means), is_below(growth["alibi"], growth["t5"].mean)]
        tables.append(
            Grid(
                title=f"Perplexity per token, trained at {train:,} tokens, by tested length",
                note="In brackets 95% t intervals over seeds.",
                columns=(("method",), *((f"{n:,}",) for n in tested)),
                rows=tuple(rows),
            )
        )
    return Judgement(verdict(parts), tuple(findings), tuple(tables))


CLAIM = Claim(
    title="Train short, test long: ALiBi extrapolates, sinusoidal, rotary and T5 do not",
    statement=(
        "Press et al. 2022, Figure 1 and Tables 2 to 4 (WikiText-103): trained at 512 and tested at 15,512 tokens, "
        "perplexity goes from 19.73 to 18.31 with ALiBi, from 19.65 to 64.94 with T5 biases (at 12,512), from 20.07 to "
        "79.25 with rotary and from 20.05 to 406.01 with sinusoidal positions; at twice the length T5 and ALiBi still "
        "gain."
    ),
    rule=(
        "At each training length: ALiBi's perplexity at the longest length is not above its own at L beyond the "
        "interval; rotary's and sinusoidal's are; growth is in the paper's order, ALiBi, T5, rotary, sinusoidal; and "
        "ALiBi's interval is below T5's growth."
    ),
    judge=judge,
    caveats=(
        "Half a million parameters and a million tokens: absolute perplexities compare with nothing else. Growth is "
        "from a method's own perplexity at L. Rotary positions, near to ALiBi there, have more to lose than sinusoidal "
        "ones, which have learned less by then: the likely reason that the two stand in the other order here, and that "
        "shifted positions and none grow so little."
    ),
    figure=perplexity_figure,
    caption=(
        "Perplexity per token by tested length, both logarithmic: the mean over seeds, single seeds thin. Dotted: the "
        "training length."
    ),
)
