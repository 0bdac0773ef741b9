"""The tasks on one text: perplexity under each protocol, loss by context, and where gains come from.

`score` says what each token cost; here that becomes entries of results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longreach.cost import Cost
from longreach.measure.bootstrap import Units
from longreach.measure.context import decompose, loss_by_context
from longreach.measure.score import CACHED_CHUNK, Scores, score, score_stream
from longreach.measure.subject import Subject, Unsupported
from longreach.results import ContextRecord, DecompositionRecord, OffsetRecord, Record

Progress = Callable[[str, int, int | None], None]
"""Called with a stage in words, how many tokens are scored, and how many will be."""


@dataclass(frozen=True)
class Text:
    """What is scored, the same tokens at every length."""

    tokens: np.ndarray
    """(N + 1,) int64: the first is only seen."""
    num_bytes: int
    """UTF-8 bytes of the N scored tokens."""
    num_words: int | None
    """Words of the N scored tokens; None where the text is not split into words."""
    units: Units
    """What a bootstrap draws: which document, or block, each scored token belongs to."""

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.tokens) - 1


class TextTasks:
    """Measures one subject on one text; each method gives the entries of one cell.

    Scores of windows are kept, for perplexity, loss by context and decomposition are made of the same. Scores that are
    no numbers are `Unsupported`: a model that overflows at one length may be sound at another.
    """

    def __init__(self, subject: Subject, text: Text, tokens_per_batch: int, progress: Progress):
        self._subject = subject
        self._text = text
        self._tokens_per_batch = tokens_per_batch
        self._progress = progress
        self._kept: dict[tuple[int, int], tuple[Scores, Cost]] = {}

    @property
    def num_targets(self) -> int:
        """How many tokens are scored."""
        return self._text.num_targets

    def perplexity(self, valid_length: int, stride: int, protocol: str) -> list[Record]:
        """Perplexity under a protocol."""
        subject, text = self._subject, self._text
        if protocol in ("nonoverlapping", "sliding-window"):
            scores, cost = self._windows(valid_length, stride)
            attention = subject.attention(valid_length, valid_length, False)
        else:
            max_context = None if protocol == "cached-unbounded" else valid_length
            scores, cost = self._stream(max_context, protocol)
            attention = subject.attention(min(CACHED_CHUNK, text.num_targets), valid_length, max_context is not None)
        record = Record(
            model=subject.identity,
            valid_length=valid_length,
            stride=stride,
            protocol=protocol,
            nll=float(scores.nll.sum()),
            tokens=text.num_targets,
            bytes=text.num_bytes,
            words=text.num_words,
            mean_context=float(scores.context.mean()),
            seconds=cost.seconds,
            peak_memory=cost.peak_memory,
            attention=attention,
            exchanged=scores.exchanged,
        )
        return [record]

    def by_context(self, valid_length: int) -> list[ContextRecord]:
        """Loss by context, in nonoverlapping windows of valid_length."""
        scores, _ = self._windows(valid_length, valid_length)
        return loss_by_context(scores, self._text.units, model=self._subject.identity, valid_length=valid_length)

    def decomposition(self, valid_length: int, stride: int) -> list[DecompositionRecord]:
        """Where the gain from train_length to valid_length comes from; stride is that of the capped windows."""
        length = self._subject.train_length
        base, sliding, long = (
            self._windows(window, step)[0]
            for window, step in ((length, length), (length, stride), (valid_length, valid_length))
        )
        return [
            decompose(
                base,
                sliding,
                long,
                self._text.units,
                model=self._subject.identity,
                valid_length=valid_length,
                stride=stride,
            )
        ]

    def at_offsets(self, valid_length: int, offsets: Sequence[int]) -> list[OffsetRecord]:
        """Loss of nonoverlapping windows of valid_length whose first token stands at each of these positions."""
        records = []
        for offset in offsets:
            stage = f"testing {self._subject.name} at {valid_length}, positions from {offset}"
            nll = self._score(valid_length, valid_length, offset, stage).nll
            records.append(
                OffsetRecord(
                    model=self._subject.identity,
                    valid_length=valid_length,
                    offset=offset,
                    tokens=len(nll),
                    nll=float(nll.sum()),
                )
            )
        return records

    def _windows(self, valid_length: int, stride: int) -> tuple[Scores, Cost]:
        key = (valid_length, stride)
        if key not in self._kept:
            strided = f", stride {stride}" if stride < valid_length else ""
            stage = f"testing {self._subject.name} at {valid_length}{strided}"
            with Cost(self._subject.device) as cost:
                scores = self._score(valid_length, stride, None, stage)
            self._kept[key] = (scores, cost)
        return self._kept[key]

    def _score(self, valid_length: int, stride: int, offset: int | None, stage: str) -> Scores:
        subject, text = self._subject, self._text
        scores = score(
            subject.model,
            text.tokens,
            valid_length=valid_length,
            stride=stride,
            vocab_size=subject.vocab_size,
            device=subject.device,
            tokens_per_batch=self._tokens_per_batch,
            offset=offset,
            nll=subject.nll,
            on_scored=lambda scored: self._progress(stage, scored, text.num_targets),
        )
        return _finite(scores)

    def _stream(self, max_context: int | None, protocol: str) -> tuple[Scores, Cost]:
        subject, text = self._subject, self._text
        at = "" if max_context is None else f" at {max_context}"
        stage = f"testing {subject.name}{at}, {protocol}"
        with Cost(subject.device) as cost:
            scores = score_stream(
                subject.model,
                text.tokens,
                max_context=max_context,
                vocab_size=subject.vocab_size,
                device=subject.device,
                shifted=protocol == "cached-shifted",
                on_scored=lambda scored: self._progress(stage, scored, text.num_targets),
            )
        return _finite(scores), cost


def _finite(scores: Scores) -> Scores:
    """The scores, if they are numbers."""
    failed = int(np.count_nonzero(~np.isfinite(scores.nll)))
    if failed:
        raise Unsupported(
            f"the nll of {failed} of {len(scores.nll)} tokens is nan or infinite, as where logits overflow in float16"
        )
    return scores
