"""What is measured: one frozen dataclass for each kind of entry in `results.json`.

An entry holds the sums that it was made of (nll in nats, tokens, bytes, seconds); what follows from them, perplexity
and the like, is a property. `low` and `high` are the ends of a 95% bootstrap interval over what was scored; what was
resampled is said by `resampled`, as in "35 documents", and both ends are None where there were too few units to
resample. Every entry is of one model of one seed: what is said over seeds is derived by `longreach.results.seeds`.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field
from typing import Any, NamedTuple

from longreach.reading import below, check_fields, read_values
from longreach.results.checks import require_not_negative, require_positive
from longreach.results.exchanged import Exchanged
from longreach.results.model import Model
from longreach.results.start import Start

PROTOCOLS = ("nonoverlapping", "sliding-window", "cached", "cached-unbounded", "cached-shifted")
"""How a corpus is cut for perplexity; see `longreach.measure.plan.EvaluateConfig.protocols`."""


class Cell(NamedTuple):
    """A piece of work of the evaluation."""

    task: str
    """What is measured."""
    model: Model
    """Of which model."""
    valid_length: int
    """At which length."""
    stride: int | None = None
    """Of perplexity alone."""
    protocol: str | None = None
    """Of perplexity alone."""


class OfModel:
    """What an entry of results says of its model."""

    model: Model

    @property
    def method(self) -> str:
        """As `Model.name`: its method, and its shape where there are several."""
        return self.model.name

    @property
    def train_length(self) -> int:
        """As `Model.train_length`."""
        return self.model.train_length

    @property
    def seed(self) -> int | None:
        """As `Model.seed`."""
        return self.model.seed


@dataclass(frozen=True, kw_only=True)
class Entry(OfModel):
    """What every entry of the evaluation has in common: a model and the length at which it was tested."""

    task: str
    """What was measured. Classes that serve one task alone have it as their default."""
    model: Model
    """What was tested."""
    valid_length: int
    """Tokens per evaluation window or prompt, the paper's L_valid."""

    def __post_init__(self) -> None:
        check_fields(self)
        own_task = type(self).__dataclass_fields__["task"].default
        if own_task not in (MISSING, self.task):
            raise ValueError(f"task is {self.task!r}, a {type(self).__name__} measures {own_task!r}: leave it out")
        require_positive(self, "valid_length")

    @property
    def cell(self) -> Cell:
        """The piece of work that this entry came from; one piece may give several entries."""
        return Cell(self.task, self.model, self.valid_length)

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the entry."""
        return self.cell


@dataclass(frozen=True, kw_only=True)
class Scored(Entry):
    """An entry that is made of the nll of tokens."""

    tokens: int
    """Scored tokens."""
    nll: float
    """Negative log likelihood summed over them, in nats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "tokens")
        require_not_negative(self, "nll")

    @property
    def loss(self) -> float:
        """nll / tokens, in nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens): per token. `math.inf` from e^709 on."""
        return exponentiated(self.loss)


@dataclass(frozen=True, kw_only=True)
class Record(Scored):
    """Perplexity of one cell of the grid: a model, trained at one length, scored at another."""

    task: str = "perplexity"
    stride: int
    """Tokens newly scored in each window."""
    protocol: str
    """How the windows were laid, one of PROTOCOLS: `nonoverlapping` has stride = valid_length."""
    bytes: int
    """UTF-8 bytes that the scored tokens stand for."""
    words: int | None
    """Words that they stand for, one end of line for each line included (WikiText-103's convention); None where the
    text is not split into words."""
    mean_context: float
    """Tokens that a scored token could see before it, averaged over the scored tokens."""
    seconds: float
    """Wall-clock time of this cell's evaluation."""
    peak_memory: int | None
    """Peak memory of the evaluation in bytes: on CUDA what PyTorch's allocator held, on the CPU all that the process
    held, the interpreter, PyTorch and the data included, but nothing that earlier work had freed. None where it could
    not be measured."""
    attention: str
    """The attention implementation that ran."""
    exchanged: Exchanged | None = None
    """What processes that shared each window sent to each other for it; None where one had all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}: give one of {', '.join(PROTOCOLS)}")
        require_positive(self, "stride", "bytes", "seconds")
        require_not_negative(self, "words", "mean_context", "peak_memory")
        if self.protocol == "nonoverlapping" and self.stride != self.valid_length:
            raise ValueError(
                f"stride={self.stride} with valid_length={self.valid_length}: give nonoverlapping windows the same"
            )

    @property
    def cell(self) -> Cell:
        """As `Entry.cell`, with stride and protocol."""
        return Cell(self.task, self.model, self.valid_length, self.stride, self.protocol)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nll / words), what papers give for WikiText-103; None where there are no words to count."""
        return exponentiated(self.nll / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float:
        """nll / (ln 2 * bytes): comparable between tokenizers, which perplexity is not."""
        return self.nll / (math.log(2) * self.bytes)

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second of evaluation."""
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class ContextRecord(Scored):
    """Loss of the tokens that were scored with `first_context` to `last_context` tokens of context.

    Nonoverlapping windows of valid_length; the bins of one length together hold every scored token.
    """

    task: str = "positions"
    first_context: int
    """Fewest tokens of context in this bin: 1 is a token predicted from one token."""
    last_context: int
    """Most tokens of context in this bin."""
    low: float | None
    """Lower end of the interval of nll / tokens."""
    high: float | None
    """Upper end of the interval of nll / tokens."""
    resampled: str
    """What the bootstrap drew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "first_context", "last_context")
        require_not_negative(self, "low", "high")
        if not self.first_context <= self.last_context <= self.valid_length:
            raise ValueError(
                f"first_context={self.first_context} and last_context={self.last_context} in windows of "
                f"{self.valid_length}: a bin lies within the window"
            )

    @property
    def key(self) -> tuple[Any, ...]:
        """As `Entry.key`, with the bin."""
        return *self.cell, self.first_context


@dataclass(frozen=True, kw_only=True)
class DecompositionRecord(Entry):
    """The gain from train_length to valid_length, split: docs/evaluation.md has the algebra.

    gain = relief + beyond. Relief is what remains of the gain when no token may see more than train_length tokens of
    context; beyond is what the context past train_length adds. Either may be negative. All in nats per token.
    """

    task: str = "decomposition"
    stride: int
    """Stride of the sliding window of train_length that scored the capped tokens: exact at 1, else `beyond` also holds
    what they lacked of train_length tokens of context."""
    capped_context: float
    """Mean context of those tokens: train_length at stride 1."""
    tokens: int
    """Scored tokens, the same in all three sums."""
    base_nll: float
    """nll in nonoverlapping windows of train_length, summed."""
    capped_nll: float
    """nll with the context of valid_length, but at most train_length tokens of it, summed."""
    long_nll: float
    """nll in nonoverlapping windows of valid_length, summed."""
    relief_low: float | None
    """Lower end of the interval of `relief`."""
    relief_high: float | None
    """Upper end of the interval of `relief`."""
    beyond_low: float | None
    """Lower end of the interval of `beyond`."""
    beyond_high: float | None
    """Upper end of the interval of `beyond`."""
    resampled: str
    """What the bootstrap drew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "stride", "capped_context", "tokens")
        if self.capped_context > self.train_length:
            raise ValueError(
                f"capped_context is {self.capped_context!r} with train_length={self.train_length}: it is at most that"
            )
        require_not_negative(self, "base_nll", "capped_nll", "long_nll")

    @property
    def gain(self) -> float:
        """(base_nll - long_nll) / tokens."""
        return (self.base_nll - self.long_nll) / self.tokens

    @property
    def relief(self) -> float:
        """(base_nll - capped_nll) / tokens: relief from the early token curse."""
        return (self.base_nll - self.capped_nll) / self.tokens

    @property
    def beyond(self) -> float:
        """(capped_nll - long_nll) / tokens: use of context beyond train_length."""
        return (self.capped_nll - self.long_nll) / self.tokens


@dataclass(frozen=True, kw_only=True)
class OffsetRecord(Scored):
    """Loss of the same tokens, in the same nonoverlapping windows, with all positions raised by `offset`."""

    task: str = "offsets"
    offset: int
    """Position of each window's first token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "offset")

    @property
    def key(self) -> tuple[Any, ...]:
        """As `Entry.key`, with the offset."""
        return *self.cell, self.offset


@dataclass(frozen=True, kw_only=True)
class RetrievalRecord(Entry):
    """How many answers a model found in prompts of about valid_length tokens, at one depth."""

    task: str
    """`lines`, `topics`, `kv`, `passkey` or `retrieval`; see `longreach.measure.retrieval.TASKS`."""
    depth: float
    """Where in the prompt the answer stood: 0 at its start, 1 at its end."""
    cases: int
    """Prompts."""
    correct: int
    """Exact matches among their answers."""
    mean_tokens: float
    """Mean length of the prompts, in tokens."""
    seconds: float
    """Wall-clock time of these cases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "cases", "mean_tokens")
        require_not_negative(self, "depth", "correct", "seconds")
        if self.depth > 1 or self.correct > self.cases:
            raise ValueError(
                f"depth={self.depth!r} and {self.correct} of {self.cases} correct: neither may exceed the whole"
            )

    @property
    def key(self) -> tuple[Any, ...]:
        """As `Entry.key`, with the depth."""
        return *self.cell, self.depth

    @property
    def accuracy(self) -> float:
        """correct / cases."""
        return self.correct / self.cases


@dataclass(frozen=True, kw_only=True)
class SummaryRecord(Entry):
    """ROUGE of query-based meeting summaries (QMSum), F-measures from 0 to 1, averaged over the cases."""

    task: str = "qmsum"
    cases: int
    """Pairs of query and summary."""
    truncated: int
    """Cases whose transcript did not fit valid_length and was cut."""
    rouge1: float
    """Unigram overlap."""
    rouge1_low: float | None
    rouge1_high: float | None
    rouge2: float
    """Bigram overlap."""
    rouge2_low: float | None
    rouge2_high: float | None
    rougeL: float
    """Longest common subsequence."""
    rougeL_low: float | None
    rougeL_high: float | None
    seconds: float
    """Wall-clock time of these cases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "cases")
        require_not_negative(self, "truncated", "rouge1", "rouge2", "rougeL", "seconds")
        if self.truncated > self.cases or max(self.rouge1, self.rouge2, self.rougeL) > 1:
            raise ValueError(
                f"truncated={self.truncated} of {self.cases} cases, rouge1={self.rouge1}, rouge2={self.rouge2}, "
                f"rougeL={self.rougeL}: none may exceed the whole"
            )


@dataclass(frozen=True, kw_only=True)
class Skipped(Entry):
    """A piece of work that was asked for and could not be done."""

    task: str
    """What was to be measured."""
    stride: int | None = None
    """Of the perplexity that was asked for; None for other tasks."""
    protocol: str | None = None
    """Of the perplexity that was asked for; None for other tasks."""
    reason: str
    """Why, in one sentence for the reader of the report."""
    failed: bool = False
    """Whether work on the model broke off with an error, and will be tried again; else there is no doing it."""

    @property
    def cell(self) -> Cell:
        """As `Entry.cell`, with stride and protocol."""
        return Cell(self.task, self.model, self.valid_length, self.stride, self.protocol)


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(OfModel):
    """What training one model took and where it arrived."""

    model: Model
    """What was trained."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens seen, repeats counted."""
    parameters: int
    """Trainable parameters."""
    final_loss: float
    """Mean training nll over the last logged steps, in nats per token."""
    seconds: float
    """Wall-clock time of the training steps, evaluation and checkpoints left out."""
    peak_memory: int | None
    """Of training, in bytes, as in `Record`."""
    attention: str
    """As in `Record`."""
    cut_documents: int | None = None
    """Documents longer than a training sequence, which were cut into pieces, where documents were packed."""
    exchanged: Exchanged | None = None
    """Of the last step, as in `Record`."""
    tokenizer_sha256: str | None = None
    """Of the tokenizer.json that the model was trained with."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "steps", "tokens", "parameters", "seconds")
        require_not_negative(self, "final_loss", "peak_memory", "cut_documents")

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the training."""
        return (self.model,)

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What it takes to run the comparison again and to trust that it is the same one."""

    starts: tuple[Start, ...]
    """Every start of the work that these results came from, the first one first."""
    split_seed: int | None
    """Seed of the text's split into training and validation, None where no text was scored; those of models stand with
    them."""
    corpus: str
    """The corpus as the user named it."""
    corpus_hash: str
    """Hash of the corpus' content."""
    tokenizer_hash: str
    """Hash of the tokenizer."""
    vocab_size: int
    """Size of the tokenizer's vocabulary."""
    sources: dict[str, str] = field(default_factory=dict)
    """What was measured and what it was asked, as the user named it: the weights of models, the files of cases and of
    meetings. Each with the sha256 of what was read, of a model on the Hugging Face hub with its commit."""
    config: dict[str, Any]
    """The resolved configuration, in values that JSON knows; tuples become lists."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "vocab_size")
        config: dict[str, Any] = read_values(dict, self.config, below("config"))
        object.__setattr__(self, "config", config)
        if not self.starts:
            raise ValueError("starts is empty: results came from one start at least")


def exponentiated(nats: float) -> float:
    """e^nats, and `math.inf` from e^709 on, near where a double overflows."""
    # The limit is put on the quotient, which is the same double on every machine; where exp overflows is not.
    return math.exp(nats) if nats < 709 else math.inf
