"""All that is asked of one model, as pieces of work that are each done, skipped for a reason, or found done already."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np

from longreach.cost import is_out_of_memory
from longreach.measure.generation import stream_tokens
from longreach.measure.material import Material
from longreach.measure.plan import RETRIEVAL_TASKS, EvaluateConfig, planned
from longreach.measure.retrieval import Case, bucket, generate_cases, max_new_tokens, measure_retrieval, possible_depths
from longreach.measure.subject import Subject, Unsupported
from longreach.measure.summaries import measure_summaries
from longreach.measure.text_tasks import Progress, TextTasks
from longreach.results import Cell, Entry, Model, Skipped

Share = Callable[[Callable[[Cell], Sequence[Entry]], Sequence[Cell]], Iterable[Sequence[Entry]]]


def evaluate(
    subject: Subject,
    material: Material,
    config: EvaluateConfig,
    done: Collection[Cell],
    progress: Progress,
    share: Share = map,
) -> Iterator[Sequence[Entry]]:
    """Measure what a configuration asks of a subject, but for the cells that are done; yields as each is finished.

    What a model cannot do (positions past its table, a stride over the window, more memory than there is, an nll that
    is no number) becomes a `Skipped` with the reason, and the rest goes on.

    Args:
        subject: the model.
        material: what the tasks are measured on, its text at least as long as the longest window.
        config: resolved for the subject's training length.
        done: cells that are measured or skipped already.
        progress: told of each stage as it goes on.
        share: applies what measures a cell to those that are left; processes that work together share them out.
    """
    sweep = _Sweep(subject, material, config, progress)
    cells = planned(subject.identity, config, material.num_targets)
    yield from share(sweep.entries, [cell for cell in cells if cell not in done])


def failures(
    model: Model, config: EvaluateConfig, material: Material, done: Collection[Cell], error: Exception
) -> list[Skipped]:
    """What an error left undone of all that a configuration asks of a model.

    Args:
        model: which.
        config: as it was given.
        material: what the tasks are measured on.
        done: cells that are measured or skipped already.
        error: what ended the work on the model; its first line becomes the reason.
    """
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    cells = planned(model, config.resolved(model.train_length), material.num_targets)
    return [_skipped(cell, reason, failed=True) for cell in cells if cell not in done]


class _Sweep:
    """One subject, and what each piece of work gives."""

    def __init__(self, subject: Subject, material: Material, config: EvaluateConfig, progress: Progress):
        self._subject, self._material, self._config, self._progress = subject, material, config, progress
        if material.text is not None:
            self._text_tasks = TextTasks(subject, material.text, config.tokens_per_batch, progress)

    def entries(self, cell: Cell) -> Sequence[Entry]:
        """What was measured, or why it was not."""
        hindrance = self._hindrance(cell)
        if hindrance is not None:
            return [_skipped(cell, hindrance)]
        try:
            return self._measure(cell)
        except Unsupported as error:
            return [_skipped(cell, str(error))]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return [_skipped(cell, "out of memory")]

    def _hindrance(self, cell: Cell) -> str | None:
        """Why it cannot be done, where that is known beforehand."""
        config, length = self._config, cell.valid_length
        if cell.task == "offsets":
            return None  # those that the table holds are measured
        if cell.task in RETRIEVAL_TASKS and self._material.cases is not None:
            return self._without_cases(length)
        if cell.task == "qmsum" and config.summary_tokens >= length:
            return f"a summary of {config.summary_tokens} tokens leaves no room for a meeting"
        if cell.stride is not None and cell.stride > length:
            return f"a stride of {cell.stride} leaves gaps between windows of {length}"
        reached = self._material.num_targets if cell.protocol in ("cached", "cached-unbounded") else length
        past_table = self._past_table(reached)
        if past_table is None and cell.task == "decomposition" and self._capped_stride > self._subject.train_length:
            return f"capped_stride={self._capped_stride} leaves gaps between windows of L={self._subject.train_length}"
        return past_table

    def _without_cases(self, length: int) -> str | None:
        """As `_hindrance`, for the cases of a file."""
        buckets, too_long = self._buckets
        hindrance = self._past_table(length) if length in buckets else "no case of the file is of this length"
        if hindrance is None or too_long is None or length < max(self._config.valid_lengths):
            return hindrance
        return f"{hindrance}; {too_long}"

    def _past_table(self, length: int) -> str | None:
        longest = self._subject.max_length
        return None if longest is None or length <= longest else f"its table holds {longest} positions"

    def _measure(self, cell: Cell) -> Sequence[Entry]:
        if cell.task in RETRIEVAL_TASKS:
            return self._retrieve(cell)
        if cell.task == "qmsum":
            return [self._summarize(cell.valid_length)]
        if cell.task == "offsets":
            return self._at_offsets(cell)
        if cell.task == "positions":
            return self._text_tasks.by_context(cell.valid_length)
        if cell.task == "decomposition":
            return self._text_tasks.decomposition(cell.valid_length, self._capped_stride)
        assert cell.stride is not None  # a perplexity has both
        assert cell.protocol is not None
        return self._text_tasks.perplexity(cell.valid_length, cell.stride, cell.protocol)

    @property
    def _capped_stride(self) -> int:
        assert self._config.capped_stride is not None  # it is resolved
        return self._config.capped_stride

    def _at_offsets(self, cell: Cell) -> Sequence[Entry]:
        """Loss at the offsets that the model's table has room for, and which it has none for."""
        length, longest = cell.valid_length, self._subject.max_length
        fitting = [offset for offset in self._config.offsets if longest is None or offset + length <= longest]
        beyond = [str(offset) for offset in self._config.offsets if offset not in fitting]
        entries: list[Entry] = [*self._text_tasks.at_offsets(length, fitting)]
        if beyond:
            reason = f"its table holds {longest} positions, too few for windows from {', '.join(beyond)}"
            entries.append(_skipped(cell, reason))
        return entries

    @cached_property
    def _buckets(self) -> tuple[dict[int, list[Case]], str | None]:
        """The cases of a file by length, and that some are too long for every length, where they are."""
        cases, config = self._material.cases or (), self._config
        buckets, left_out = bucket(cases, self._subject.tokenizer, config.valid_lengths, config.num_depths)
        too_long = f"{left_out} of {len(cases)} cases of the file are too long for every length" if left_out else None
        return buckets, too_long

    def _retrieve(self, cell: Cell) -> Sequence[Entry]:
        if self._material.cases is None:
            return self._ask(cell, self._generated(cell))
        buckets, too_long = self._buckets
        entries = self._ask(cell, buckets[cell.valid_length])
        if too_long is None or cell.valid_length < max(self._config.valid_lengths):
            return entries
        return [*entries, _skipped(cell, too_long)]

    def _generated(self, cell: Cell) -> list[Case]:
        config = self._config
        wanted = np.linspace(0, 1, config.num_depths).tolist() if config.num_depths > 1 else [0.5]
        depths = possible_depths(cell.task, wanted)
        tokenizer = self._subject.tokenizer
        return generate_cases(
            cell.task, tokenizer, cell.valid_length, depths, config.cases_per_depth, config.cases_seed
        )

    def _ask(self, cell: Cell, cases: Sequence[Case]) -> Sequence[Entry]:
        subject, length = self._subject, cell.valid_length
        new_tokens = max_new_tokens(cases, subject.tokenizer)
        needed = length + new_tokens - 1  # the last token is not read
        if subject.max_length is not None and needed > subject.max_length:
            raise Unsupported(f"its table holds {subject.max_length} positions, prompt and answer need {needed}")
        stage = f"asking {subject.name} {cell.task} at {length}"
        return measure_retrieval(
            lambda prompt: stream_tokens(subject, prompt, new_tokens),
            subject.tokenizer,
            cases,
            model=subject.identity,
            valid_length=length,
            on_case=lambda done: self._progress(stage, done, len(cases)),
        )

    def _summarize(self, length: int) -> Entry:
        subject, meetings = self._subject, self._material.meetings
        return measure_summaries(
            partial(stream_tokens, subject),
            subject.tokenizer,
            meetings,
            model=subject.identity,
            valid_length=length,
            max_new_tokens=self._config.summary_tokens,
            on_case=lambda done: self._progress(f"summaries by {subject.name} at {length}", done, len(meetings)),
        )


def _skipped(cell: Cell, reason: str, failed: bool = False) -> Skipped:
    return Skipped(**cell._asdict(), reason=reason, failed=failed)
