"""What is asked of a model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from longreach.measure.retrieval import TASKS as RETRIEVAL_TASKS
from longreach.reading import refuse_below, refuse_repeats
from longreach.results import PROTOCOLS, Cell, Model
from longreach.results.merge import HEEDED_BY

TEXT_TASKS = ("perplexity", "positions", "probes")
"""Tasks that score a text."""

TASKS = (*TEXT_TASKS, *RETRIEVAL_TASKS, "qmsum")
"""What may be asked of a model."""

MOST = {
    "valid_lengths": 2**24,
    "offsets": 2**31,
    "num_depths": 1000,
    "cases_per_depth": 100_000,
    "summary_tokens": 2**20,
}
"""Field -> the most that has an end in sight: prompts are made to lengths, and at every depth."""

MOST_LISTED = 100
"""The most values of a list: each is a measurement, and a column of a table or a point of a figure."""

MOST_CASES = 100_000
"""The most cases that are generated for a length."""

OFFSETS = (0, 0.25, 0.5, 1, 2, 4, 8, 16)
"""Positions that the probes start windows at where none are given, in training lengths."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How models are tested."""

    tasks: tuple[str, ...] = ("perplexity", "positions")
    """What to measure: perplexity, positions (loss by context, and where gains come from), probes (why absolute
    positions fail), the retrieval tasks lines, topics, kv, passkey and retrieval, and qmsum (summaries)."""
    valid_lengths: tuple[int, ...] = ()
    """L_valid, the lengths in tokens to test at; 1, 2, 4, 8 and 16 times the training length when none are given."""
    valid_tokens: int = 16384
    """How many tokens are scored, the same at every length: at least the longest length, at most what there is."""
    tokens_per_batch: int = 4096
    """About how many tokens one forward pass of the evaluation holds; the default is what was fastest on two CPU
    cores."""
    protocols: tuple[str, ...] = ("nonoverlapping",)
    """How the text is cut for perplexity: nonoverlapping windows; cached, one stream in which each token sees its last
    L_valid tokens through a KV cache; cached-unbounded, where it sees all; cached-shifted, the naive way, where
    positions stay below L_valid."""
    strides: tuple[int, ...] = ()
    """S, the tokens newly scored in each window: each adds sliding-window perplexity at every length above it."""
    capped_stride: int | None = None
    """S of the windows of L tokens that decide, for positions, how much of a gain is relief from the early token
    curse; exact at 1, and an eighth of L when not given."""
    offsets: tuple[int, ...] = ()
    """Positions that probes start windows of L tokens at; from 0 to 16 L when none are given."""
    word_level: bool = False
    """Whether the text is split into words by spaces, as WikiText-103 is: then perplexity per word is given too."""
    cases: str | None = None
    """File of cases for the one retrieval task asked for; generated at the lengths when none is given."""
    cases_per_depth: int = 10
    """How many cases to generate for each length and depth."""
    cases_seed: int = 0
    """Seed of generated cases."""
    num_depths: int = 5
    """At how many depths of the prompt answers stand, evenly from its start to its end."""
    meetings: str | None = None
    """File of meetings for qmsum."""
    summary_tokens: int = 256
    """The most tokens of a summary."""

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("protocols", PROTOCOLS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}={value!r}: give one or more of {', '.join(known)}")
        if not self.tasks:
            raise ValueError("tasks is empty: give at least one")
        if "sliding-window" in self.protocols:
            raise ValueError("protocols=sliding-window: leave it out and give the strides, as in strides=1,64")
        refuse_below(self, 1, "valid_lengths", "valid_tokens", "tokens_per_batch", "strides", "capped_stride")
        refuse_below(self, 1, "cases_per_depth", "num_depths", "summary_tokens")
        refuse_below(self, 0, "offsets", "cases_seed")
        lists = ("valid_lengths", "strides", "offsets", "tasks", "protocols")
        refuse_repeats(self, *lists)
        for name in lists:
            if len(values := getattr(self, name)) > MOST_LISTED:
                shown = ",".join(map(str, values))
                raise ValueError(f"{name}={shown}: these are {len(values)}, give at most {MOST_LISTED}")
        for name, largest in MOST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number > largest:
                    raise ValueError(f"{name}={number}: give at most {largest}")
        if self.cases_per_depth * self.num_depths > MOST_CASES:
            raise ValueError(
                f"cases_per_depth={self.cases_per_depth}: with num_depths={self.num_depths} these are "
                f"{self.cases_per_depth * self.num_depths} cases for each length, give at most {MOST_CASES}"
            )
        if self.valid_lengths and self.strides and max(self.strides) > max(self.valid_lengths):
            raise ValueError(
                f"strides={max(self.strides)} is over every window: give at most the longest of "
                f"valid_lengths={','.join(map(str, self.valid_lengths))}"
            )
        asked = [task for task in self.tasks if task in RETRIEVAL_TASKS]
        if self.cases is not None and len(asked) != 1:
            raise ValueError(f"cases={self.cases!r} with {len(asked)} retrieval tasks: give tasks the one it is for")
        if ("qmsum" in self.tasks) != (self.meetings is not None):
            raise ValueError(f"meetings={self.meetings!r}: give the file of meetings together with tasks=qmsum")

    def idle(self) -> dict[str, str]:
        """Name of a field that nothing heeds beside the others -> why."""
        fields = {
            name: f"it is for {' or '.join(tasks)}, and tasks={','.join(self.tasks)}"
            for name, tasks in HEEDED_BY.items()
            if not set(tasks) & set(self.tasks)
        }
        if self.cases is not None:
            fields |= dict.fromkeys(("cases_per_depth", "cases_seed"), f"no case is made where cases={self.cases}")
        elif set(self.tasks) & set(RETRIEVAL_TASKS) == {"topics"}:
            fields["num_depths"] = "topics asks for the first topic alone"
        return fields

    def longest_window(self, train_length: int) -> int:
        """The longest window of text, in tokens, that the tasks score; 0 where they score none."""
        lengths = [0]
        if "perplexity" in self.tasks or "positions" in self.tasks:
            lengths += self.resolved(train_length).valid_lengths
        if "positions" in self.tasks or "probes" in self.tasks:
            lengths.append(train_length)
        return max(lengths)

    def resolved(self, train_length: int) -> "EvaluateConfig":
        """With what follows from the training length, where it is not given.

        Raises:
            ValueError: that is too long for it.
        """
        if train_length > MOST["valid_lengths"]:
            raise ValueError(f"train_length={train_length}: give at most {MOST['valid_lengths']}")
        return replace(
            self,
            valid_lengths=self.valid_lengths or tuple(multiple * train_length for multiple in (1, 2, 4, 8, 16)),
            capped_stride=self.capped_stride or max(1, train_length // 8),
            offsets=self.offsets or tuple(dict.fromkeys(int(multiple * train_length) for multiple in OFFSETS)),
        )


def planned(model: Model, config: EvaluateConfig, num_targets: int) -> tuple[Cell, ...]:
    """The pieces of work that a configuration asks of a model, in the order in which they are done.

    Args:
        model: which.
        config: resolved for its training length.
        num_targets: how many tokens of text are scored.
    """
    text = {"perplexity": _perplexity_cells, "positions": _positions_cells, "probes": _probes_cells}
    of_text = (cell for task in config.tasks if task in text for cell in text[task](model, config, num_targets))
    others = (Cell(task, model, length) for task in config.tasks if task not in text for length in config.valid_lengths)
    return tuple(dict.fromkeys((*of_text, *others)))


def _perplexity_cells(model: Model, config: EvaluateConfig, num_targets: int) -> Iterator[Cell]:
    for length in config.valid_lengths:
        for protocol in config.protocols:
            if protocol != "cached-unbounded":
                stride = length if protocol == "nonoverlapping" else 1
                yield Cell("perplexity", model, length, stride, protocol)
        for stride in config.strides:
            if stride != length:  # which is nonoverlapping
                yield Cell("perplexity", model, length, stride, "sliding-window")
    if "cached-unbounded" in config.protocols:
        yield Cell("perplexity", model, num_targets, 1, "cached-unbounded")


def _positions_cells(model: Model, config: EvaluateConfig, num_targets: int) -> Iterator[Cell]:
    for length in config.valid_lengths:
        yield Cell("positions", model, length)
        if length > model.train_length:
            yield Cell("decomposition", model, length)


def _probes_cells(model: Model, config: EvaluateConfig, num_targets: int) -> Iterator[Cell]:
    length = model.train_length
    yield Cell("offsets", model, length)
    yield Cell("perplexity", model, length, config.capped_stride, "sliding-window")
    for protocol in ("cached", "cached-shifted"):
        yield Cell("perplexity", model, length, 1, protocol)
