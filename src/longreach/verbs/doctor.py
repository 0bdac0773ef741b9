"""One page on a pretrained ALiBi model: what its stock code does, how far its heads see, how to scale: `doctor`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longreach.data.corpora import Corpus, idle_field, open_corpus
from longreach.data.prepare import naming
from longreach.data.tokenizer import Tokenizer
from longreach.measure.bootstrap import Units, intervals, units
from longreach.measure.plan import MOST, MOST_LISTED, EvaluateConfig
from longreach.measure.score import score
from longreach.measure.subject import Subject
from longreach.measure.transformers import HuggingFaceModel
from longreach.pretrained.diagnosis import Diagnosis, HeadReach, Progress, StockRun, diagnose
from longreach.pretrained.extend import extend
from longreach.pretrained.restore import restore
from longreach.reading import refuse_empty
from longreach.report.grid import MISSING, Grid, format_multiple, format_percent, format_perplexity, to_rich
from longreach.train.loop import resolve_device
from longreach.verbs.open import load_subject, named_dtype, names_pretrained

TRIED = ("none", "linear", "ntk")
"""The scalings that are tried at each length, simplest first: of two that the text cannot tell apart, the first is
named first. "none" leaves the model as its configuration says."""

WINDOWS = 4
"""How many windows of the longest length are scored, where the text has as much."""

HEAD_ROWS = 16
"""Rows of the table of reach; a model of more heads has several of neighbouring slopes in a row."""

FOLLOWED = 1e-3
"""Largest difference of logits at which the stock code follows what its family is known to do: float32 rounds."""

SEED = 0
"""Of random tokens."""


@dataclass(frozen=True)
class DoctorConfig:
    """What is to be examined."""

    model: str
    """A folder or a name on the Hugging Face hub."""
    text: str | None = None
    """Text to examine it on: file, folder or glob; random tokens when none is given."""
    text_field: str | None = None
    """Field or column of text that holds it; text when none is given."""
    skip_bad: bool = False
    """Leave out files and lines that are no text, instead of refusing them."""
    valid_lengths: tuple[int, ...] = ()
    """Lengths in tokens at which it is wanted; its training length and twice that when none are given."""
    train_length: int | None = None
    """L in tokens, where its configuration does not tell it."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto for that of its files."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or another device of torch."""
    trust_remote_code: bool = False
    """Run code that comes with it."""
    max_memory: float = 16.0
    """GiB that the scores of its stock code may take; it is not run at lengths that take more."""

    def __post_init__(self) -> None:
        refuse_empty(self, "model")
        named_dtype(self.dtype)  # refuses
        if len(self.valid_lengths) > MOST_LISTED:
            raise ValueError(f"valid_lengths has {len(self.valid_lengths)} lengths: give at most {MOST_LISTED}")
        for length in self.valid_lengths:
            if not 2 <= length <= MOST["valid_lengths"]:
                raise ValueError(
                    f"valid_lengths has {length}: give lengths of 2 tokens at least and {MOST['valid_lengths']} at most"
                )
        if self.text is None:
            for name, default in (("text_field", None), ("skip_bad", False)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)}: it is for text; give that too, or leave it out")
        if not 0 < self.max_memory <= 2**30:
            raise ValueError(f"max_memory={self.max_memory:g}: give a positive number of GiB, at most {2**30}")

    def idle(self) -> dict[str, str]:
        """Name of a field that nothing heeds beside the others -> why."""
        return idle_field(self.text_field, self.text)

    def corpus(self) -> Corpus:
        """The text, of which one is given."""
        assert self.text is not None
        return open_corpus(self.text, text_field=self.text_field or "text", skip_bad=self.skip_bad)


@dataclass(frozen=True)
class Trial:
    """What each scaling does at one length beyond L."""

    length: int
    perplexity: tuple[float, ...]
    """Of each of TRIED, per token, in nonoverlapping windows of L'."""
    advised: tuple[str, ...]
    """The scaling of the lowest perplexity, and those that the text cannot tell from it, simplest first."""
    helps: bool
    """Whether the lowest perplexity is below that of the model at L."""


@dataclass(frozen=True)
class Checkup:
    """All that the page says."""

    config: DoctorConfig
    """What was examined, its lengths filled in."""
    train_length: int
    diagnosis: Diagnosis
    """What its stock code does, and how far its heads see."""
    base_perplexity: float | None = None
    """Perplexity per token as it was trained: in nonoverlapping windows of L, not scaled. None where no length is
    beyond L, or there is no text."""
    tokens: int = 0
    """How many tokens were scored for it, and for each trial."""
    trials: tuple[Trial, ...] = ()
    """One for each length beyond L; none where there is no text."""


def examine(config: DoctorConfig, progress: Progress = lambda stage, done, total: None) -> Checkup:
    """Load a model and find out what the page says.

    Raises:
        ValueError: there is no such model, it has no ALiBi, or the text is shorter than the longest length.
    """
    if not names_pretrained(config.model):
        raise ValueError(
            f"model={config.model}: it is no model of Hugging Face, which doctor examines; export makes one of a run"
        )
    subject = load_subject(
        config.model,
        device=resolve_device(config.device),
        dtype=config.dtype,
        train_length=config.train_length,
        trust_remote_code=config.trust_remote_code,
    )
    length = subject.train_length
    config = replace(config, valid_lengths=tuple(sorted(set(config.valid_lengths or (length, 2 * length)))))
    longest = max(config.valid_lengths)
    if config.text is None:
        tokens = np.random.default_rng(SEED).integers(0, subject.tokenizer.text_vocab_size, longest)
    else:
        with naming("text"):
            corpus = config.corpus()
            tokens = read_tokens(corpus, subject.tokenizer, least=longest + 1, most=WINDOWS * longest + 1)
        if corpus.skipped is not None and corpus.skipped.count:
            progress(f"left out {corpus.skipped}", 1, 1)
    assert isinstance(subject.model, HuggingFaceModel)  # load_subject makes no other
    model = subject.model.model
    diagnosis = diagnose(
        model,
        torch.from_numpy(tokens[:longest]).to(subject.device),
        config.valid_lengths,
        max_bytes=int(config.max_memory * 2**30),
        progress=progress,
    )
    checkup = Checkup(config, length, diagnosis)
    beyond = [wanted for wanted in config.valid_lengths if wanted > length]
    if config.text is None or not beyond:
        return checkup
    base, trials = try_scalings(subject, tokens, beyond, progress)
    return replace(checkup, base_perplexity=base, tokens=len(tokens) - 1, trials=trials)


def read_tokens(corpus: Corpus, tokenizer: Tokenizer, least: int, most: int) -> np.ndarray:
    """The first tokens of a text, (N,) int64 with least <= N <= most, eos after each document.

    Args:
        corpus: the text.
        tokenizer: the model's.
        least: how many it takes.
        most: how many are wanted.

    Raises:
        ValueError: it cannot be read, or has fewer.
    """
    ids: list[int] = []
    for document in corpus:
        for piece in document.pieces:
            ids += tokenizer.encode(piece)
            if len(ids) >= most:
                return np.array(ids[:most])
        ids.append(tokenizer.eos_id)
    if len(ids) < least:
        raise ValueError(
            f"{corpus.name!r} has {len(ids):,} tokens, the lengths need {least:,}: give more, or shorter ones"
        )
    return np.array(ids)


def try_scalings(
    subject: Subject, tokens: np.ndarray, lengths: Sequence[int], progress: Progress
) -> tuple[float, tuple[Trial, ...]]:
    """Perplexity at L as trained, and with each of TRIED at lengths beyond it, on the same tokens (N + 1,)."""
    drawn = units(tokens, subject.tokenizer.eos_id, max(lengths))
    base = _nll(subject, tokens, subject.train_length, "none").mean()
    trials = []
    for done, length in enumerate(lengths):
        progress("trying scalings", done, len(lengths))
        nll = np.stack([_nll(subject, tokens, length, scaling) for scaling in TRIED], axis=1)  # [N, scalings]
        means = nll.mean(axis=0)
        perplexity = tuple(np.exp(means).tolist())
        trials.append(Trial(length, perplexity, _indistinguishable(nll, drawn), helps=bool(means.min() < base)))
    progress("trying scalings", len(lengths), len(lengths))
    return float(np.exp(base)), tuple(trials)


def _nll(subject: Subject, tokens: np.ndarray, length: int, scaling: str) -> np.ndarray:
    """The nll of every token but the first, (N,), in nonoverlapping windows of a length, the model extended."""
    assert isinstance(subject.model, HuggingFaceModel)
    model = subject.model.model
    named = None if scaling == "none" else scaling
    extend(model, scaling=named, train_length=subject.train_length, length=length)
    try:
        return score(
            HuggingFaceModel(model),
            tokens,
            valid_length=length,
            stride=length,
            vocab_size=subject.vocab_size,
            device=subject.device,
            tokens_per_batch=EvaluateConfig().tokens_per_batch,
        ).nll
    finally:
        restore(model)


def _indistinguishable(nll: np.ndarray, drawn: Units) -> tuple[str, ...]:
    """The scaling of the lowest mean of nll (N, S), and those whose difference from it may be none, simplest first."""
    best = int(nll.mean(axis=0).argmin())
    sums = np.stack([np.bincount(drawn.ids, weights=each) for each in (nll - nll[:, best : best + 1]).T], axis=1)
    counts = np.repeat(np.bincount(drawn.ids)[:, None].astype(np.float64), nll.shape[1], axis=1)
    lows = [low for low, _ in intervals(sums, counts)]
    return tuple(
        name for i, (name, low) in enumerate(zip(TRIED, lows, strict=True)) if i == best or low is None or low <= 0
    )


def print_checkup(checkup: Checkup, console: Console) -> None:
    """Print the page."""
    diagnosis = checkup.diagnosis
    _print(console, checkup.config.model, "bold")
    _print(console, f"{diagnosis.form.family}, {diagnosis.dtype}, trained at {checkup.train_length:,} tokens")
    _print(console, "\nALiBi as its stock code has it", "bold")
    table = Table.grid(padding=(0, 0, 0, 2))
    for name, words in _form(diagnosis):
        table.add_row(Text(name), Text(words))
    console.print(table)
    show(console, _stock_grid(checkup))
    show(console, reach_grid(diagnosis.heads, diagnosis.reach_length, diagnosis.tolerance, _source(checkup)))
    if checkup.trials:
        show(console, _scaling_grid(checkup))
    _print(console, f"\n{_advice(checkup)}")


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style))


def show(console: Console, grid: Grid) -> None:
    """Print a grid whose title and note may be wider than it."""
    _print(console, f"\n{grid.title}", "bold")
    console.print(to_rich(replace(grid, title="", note="")))
    _print(console, grid.note)


def _form(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    form = diagnosis.form
    if form.deviation is None:
        followed = "not by running it: its stock code crashes"
    elif form.deviation == 0:
        followed = "its stock code follows this, bit for bit"
    elif form.deviation < FOLLOWED:
        followed = f"its stock code follows this, to {form.deviation:.1g} of a logit"
    else:
        followed = f"its stock code does not follow this: logits are off by up to {form.deviation:.2g}"
    slopes = f"{len(form.slopes)} heads, {max(form.slopes):.3g} to {min(form.slopes):.3g}: {form.rule}"
    return [("slopes", slopes), ("score", form.score), ("bias", form.bias), ("checked", followed)]


def _stock_grid(checkup: Checkup) -> Grid:
    import transformers

    diagnosis = checkup.diagnosis
    half = any(run.exact_kl is not None for run in diagnosis.runs)
    columns: tuple[tuple[str, ...], ...] = (("length",), ("stock code",), ("logits", "off by"), ("KL",))
    rows = []
    for run in diagnosis.runs:
        figures = (run.difference, run.kl, run.exact_kl)[: 3 if half else 2]
        rows.append((f"{run.length:,}", _verdict(run), *map(_figure, figures)))
    if diagnosis.static_cache is not None:
        outcome = f"crashes: {diagnosis.static_cache}" if diagnosis.static_cache else "works"
        rows.append(("any", f"static cache: {outcome}", *[MISSING] * (3 if half else 2)))
    note = f"Against longreach.extend(model), on {_source(checkup)}. KL: mean, in nats."
    if half:
        columns = (*columns, ("KL of", "extended"))
        note = f"Against longreach.extend(model) in float32, on {_source(checkup)}. KL: mean, in nats; of the extended "
        note += f"model in {diagnosis.dtype} it is what rounding costs anyone."
    title = f"Stock code of transformers {transformers.__version__}, {diagnosis.attention}"
    return Grid(title, note, columns, tuple(rows), text_columns=2)


def _verdict(run: StockRun) -> str:
    return f"{run.outcome}: {run.mistake}" if run.mistake else run.outcome


def _figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1e}" if value < 0.01 else f"{value:.3g}"


def _source(checkup: Checkup) -> str:
    return "random tokens" if checkup.config.text is None else checkup.config.text


def reach_grid(heads: Sequence[HeadReach], length: int, tolerance: float, source: str) -> Grid:
    """How far heads see at a length, steepest first.

    Args:
        heads: of all layers.
        length: of the text, in tokens.
        tolerance: what was tolerated.
        source: the text, in words.
    """
    heads = sorted(heads, key=lambda head: -head.slope)
    borders = np.linspace(0, len(heads), min(HEAD_ROWS, len(heads)) + 1).round().astype(int)
    rows = [_reach_row(heads[start:stop], length) for start, stop in pairwise(borders)]
    share = float(np.mean([head.kept for head in heads]))
    rows.append(("all heads", *[""] * 3, format_percent(share)))
    note = (
        f"At {length:,} tokens, on {source}, over {len(heads[0].tokens)} layers: keys beyond "
        f"hold at most {tolerance:.0e} of a token's attention together. Work: blocks within it."
    )
    columns = (("slope",), ("min",), ("median",), ("max",), ("work", "kept"))
    return Grid("Reach of its heads, in tokens", note, columns, tuple(rows))


def _reach_row(heads: Sequence[HeadReach], length: int) -> tuple[str, ...]:
    """One row for heads of neighbouring slopes, steepest first."""
    slopes = f"{heads[0].slope:.3g}" if len(heads) == 1 else f"{heads[0].slope:.3g} to {heads[-1].slope:.3g}"
    tokens = np.concatenate([head.tokens for head in heads])
    kept = float(np.mean([head.kept for head in heads]))
    furthest = (int(tokens.min()), int(np.median(tokens)), int(tokens.max()))
    return (slopes, *("all" if each >= length else f"{each:,}" for each in furthest), format_percent(kept))


def _scaling_grid(checkup: Checkup) -> Grid:
    length = checkup.train_length
    rows = tuple(
        (f"{trial.length:,}", format_multiple(trial.length, length), *map(format_perplexity, trial.perplexity))
        for trial in checkup.trials
    )
    best = frozenset((row, 2 + int(np.argmin(trial.perplexity))) for row, trial in enumerate(checkup.trials))
    assert checkup.base_perplexity is not None  # there are trials
    note = (
        f"Per token, over the same {checkup.tokens:,} tokens in nonoverlapping windows; in windows of the training "
        f"length {length:,} it is {format_perplexity(checkup.base_perplexity)}."
    )
    columns = (("length",), ("",), *((name,) for name in TRIED))
    return Grid("Perplexity past the training length, by scaling", note, columns, rows, best)


def _advice(checkup: Checkup) -> str:
    """Which scaling to use, in words, or why nothing can be said."""
    beyond = [length for length in checkup.config.valid_lengths if length > checkup.train_length]
    if not beyond:
        return f"Scaling: none is needed up to the training length of {checkup.train_length:,} tokens."
    if not checkup.trials:
        return "Scaling: no recommendation, for random tokens cannot tell: give --text."
    return "\n".join(_sentence(trial, checkup) for trial in checkup.trials)


def _sentence(trial: Trial, checkup: Checkup) -> str:
    first, *others = trial.advised
    best = TRIED[int(np.argmin(trial.perplexity))]
    arguments = ["model"]
    if first != "none":  # which is what the configuration says
        arguments.append(f'scaling="{first}"')
    if checkup.diagnosis.train_length != checkup.train_length:
        arguments.append(f"train_length={checkup.train_length}")
    line = f"At {trial.length:,}: longreach.extend({', '.join(arguments)})"
    if others:
        line += f"; this text cannot tell it from {' and '.join(others)} (lowest: {best})"
    if not trial.helps:
        trained = f"windows of {checkup.train_length:,} do"
        line += f". None predicts better than {trained}: expect no gain from the longer context"
    return line + "."
