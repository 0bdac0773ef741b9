"""SmolLM2-135M given ALiBi in place of its rotary positions, before and after training, beside rotary scalings."""

from experiments.claim import Claim, Judgement, times, verdict
from experiments.retrofit.commands import ALIBI, ASKED, LENGTH, ROTARY, TESTED, UNTRAINED, WINDOW
from longreach.report.grid import MISSING, Grid, format_interval, format_percent, format_perplexity
from longreach.report.subjects.retrieval import Score, scores
from longreach.results import Results

EXTRAPOLATES, RECOVERED = 1.02, 1.1
"""Up to these times the perplexity at L, and the stock model's there, one is held or recovered."""

NAMES = {
    ROTARY: "rotary, as it came",
    f"{ROTARY}:linear": "rotary, linear",
    f"{ROTARY}:ntk": "rotary, ntk",
    f"{ROTARY}:yarn": "rotary, yarn",
    UNTRAINED: "ALiBi, not trained",
    ALIBI: "ALiBi, trained",
}
"""The end of a model's name in results -> what the tables call it."""


def judge(results: Results) -> Judgement:
    """One row for each model and scaling, near its new training length and past the window of its pretraining."""
    cells = _cells(results)
    (training,) = results.training
    longest = TESTED[-1]
    stock, trained = (cells[NAMES[name]] for name in (ROTARY, ALIBI))
    growth, recovered = trained[longest] / trained[LENGTH], trained[LENGTH] / stock[LENGTH]
    past = trained[longest] / stock[longest]
    found = _found(results)
    kept = found[NAMES[ALIBI]][LENGTH].correct >= found[NAMES[ROTARY]][LENGTH].correct / 2
    return Judgement(
        verdict((growth <= EXTRAPOLATES, recovered <= RECOVERED, past < 1, kept)),
        (
            f"After {training.tokens:,} tokens of training at {LENGTH:,}, ALiBi's perplexity there is "
            f"{times(recovered)} that of the model as it came, and at {longest:,} tokens {times(growth)} its own at "
            f"{LENGTH:,} and {times(past)} that of the rotary model, pretrained at {WINDOW:,}.",
        ),
        (
            Grid(
                title="Perplexity per token by tested length",
                note=f"One model, pretrained at {WINDOW:,} tokens with rotary positions; ALiBi trained at {LENGTH:,}.",
                columns=(("positions",), *((f"{n:,}",) for n in TESTED)),
                rows=tuple(
                    (name, *(format_perplexity(of[n]) if n in of else MISSING for n in TESTED))
                    for name, of in cells.items()
                ),
            ),
            Grid(
                title="Passkeys found by prompt length",
                note="In brackets 95% intervals of a share (Wilson).",
                columns=(("positions",), *((f"{n:,}",) for n in ASKED)),
                rows=tuple((name, *(_share(of[n]) for n in ASKED)) for name, of in found.items()),
            ),
        ),
    )


def _name(method: str) -> str:
    return NAMES[method.rpartition("/")[2]]


def _cells(results: Results) -> dict[str, dict[int, float]]:
    """Row of the table -> tested length -> perplexity."""
    cells: dict[str, dict[int, float]] = {}
    for entry in results.records:
        cells.setdefault(_name(entry.method), {})[entry.valid_length] = entry.perplexity
    return cells


def _found(results: Results) -> dict[str, dict[int, Score]]:
    of_lengths = (scores("passkey", results, train) for train in results.train_lengths())
    return {_name(method): by_length for found in of_lengths for method, by_length in found.items()}


def _share(score: Score) -> str:
    return f"{format_percent(score.accuracy)} {format_interval(*score.interval, text=format_percent)}"


CLAIM = Claim(
    title="A pretrained rotary model can be given ALiBi, and then extrapolates",
    statement=(
        "No paper's, but what this software offers (`longreach.convert`, `longreach train --from`): SmolLM2-135M, "
        "pretrained on 2T tokens with rotary positions, is given the paper's slopes in their place and trained on; and "
        "models with ALiBi extrapolate (Press et al. 2022), where rotary ones need linear, ntk or yarn scaling past "
        "their window."
    ),
    rule=(
        f"After training, perplexity at {TESTED[-1]:,} tokens is at most {EXTRAPOLATES} times that at {LENGTH:,}, and "
        f"below the unscaled rotary model's; at {LENGTH:,} it is at most {RECOVERED} times that of the model as it "
        "came, and at least half as many passkeys are found."
    ),
    judge=judge,
    caveats=(
        "One seed, and 0.00002% of the tokens of the pretraining. The weights are those of SmolLM2-135M-Instruct in 4 "
        "bits, made float32 again ([weights.py](../experiments/retrofit/weights.py) says from where), trained and "
        "tested in bfloat16. At the longest length all tokens are scored in one window; 6 passkeys are asked for at "
        "each length. That perplexity is level past L is not use of longer context: within its window the rotary model "
        "gains by it, which ALiBi trained at 512 does not."
    ),
)
