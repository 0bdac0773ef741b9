"""All that is asked of one model, as pieces of work that are each done, skipped for a reason, or found done already."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from longreach.measure.generation import generate_greedily
from longreach.measure.perplexity import Progress, Scorer, Text
from longreach.measure.plan import RETRIEVAL_TASKS, EvaluateConfig
from longreach.measure.retrieval import Case, bucket, generate_cases, max_new_tokens, measure_retrieval, possible_depths
from longreach.measure.score import Unsupported
from longreach.measure.subject import Subject
from longreach.measure.summaries import MeetingCase, measure_summaries
from longreach.results import Cell, Entry, Skipped


@dataclass(frozen=True)
class Material:
    """What the tasks of a configuration are measured on."""

    text: Text | None = None
    """For perplexity, positions and probes."""
    cases: Sequence[Case] | None = None
    """For a retrieval task; None to generate them."""
    meetings: Sequence[MeetingCase] = ()
    """For qmsum."""


@dataclass(frozen=True)
class _Work:
    """A piece of work."""

    cell: Cell
    measure: Callable[[], Sequence[Entry]]
    hindrance: str | None = None
    """Why it cannot be done, where that is known beforehand."""


def evaluate(
    subject: Subject,
    material: Material,
    config: EvaluateConfig,
    done: Collection[Cell],
    progress: Progress,
) -> Iterator[Sequence[Entry]]:
    """Measure what a configuration asks of a subject, but for the cells that are done; yields as each is finished.

    What a model cannot do (positions past its table, a stride over the window, more memory than there is, an nll that
    is no number) becomes a `Skipped` with the reason, and the rest goes on.

    Args:
        subject: the model.
        material: what the tasks are measured on.
        config: resolved for the subject's training length.
        done: cells that are measured or skipped already.
        progress: told of each stage as it goes on.

    Raises:
        ValueError: what is wrong with the material, as a text of too few tokens.
    """
    finished = set(done)
    for work in _plan(subject, material, config, progress):
        if work.cell in finished:
            continue
        finished.add(work.cell)
        if work.hindrance is not None:
            yield [_skipped(work.cell, work.hindrance)]
            continue
        try:
            yield work.measure()
        except Unsupported as error:
            yield [_skipped(work.cell, str(error))]
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            yield [_skipped(work.cell, "out of memory")]


def _plan(subject: Subject, material: Material, config: EvaluateConfig, progress: Progress) -> Iterator[_Work]:
    longest = config.longest_window(subject.train_length)
    if longest:
        text = material.text
        if text is None:
            raise ValueError(f"tasks={','.join(config.tasks)} without a text: give one in the material")
        if text.num_targets < longest:
            raise ValueError(f"a length of {longest} with {text.num_targets} tokens to score: give more text")
        scorer = Scorer(subject, text, config.tokens_per_batch, progress)
        for task in config.tasks:
            if task in _TEXT_WORK:
                yield from _TEXT_WORK[task](subject, scorer, config)
    for task in config.tasks:
        if task in RETRIEVAL_TASKS:
            yield from _retrieval_work(task, subject, material.cases, config, progress)
        elif task == "qmsum":
            yield from _summary_work(subject, material.meetings, config, progress)


def _perplexity_work(subject: Subject, scorer: Scorer, config: EvaluateConfig) -> Iterator[_Work]:
    for length in config.valid_lengths:
        for protocol in config.protocols:
            if protocol != "cached-unbounded":
                stride = length if protocol == "nonoverlapping" else 1
                yield _perplexity_cell(subject, scorer, length, stride, protocol)
        for stride in config.strides:
            if stride != length:  # which is nonoverlapping
                yield _perplexity_cell(subject, scorer, length, stride, "sliding-window")
    if "cached-unbounded" in config.protocols:
        yield _perplexity_cell(subject, scorer, scorer.num_targets, 1, "cached-unbounded")


def _perplexity_cell(subject: Subject, scorer: Scorer, length: int, stride: int, protocol: str) -> _Work:
    reached = scorer.num_targets if protocol in ("cached", "cached-unbounded") else length
    hindrance = _past_table(subject, reached)
    if stride > length:
        hindrance = f"a stride of {stride} leaves gaps between windows of {length}"
    cell = Cell("perplexity", subject.identity, length, stride, protocol)
    return _Work(cell, partial(scorer.perplexity, length, stride, protocol), hindrance)


def _positions_work(subject: Subject, scorer: Scorer, config: EvaluateConfig) -> Iterator[_Work]:
    assert config.capped_stride is not None  # it is resolved
    gaps = None
    if config.capped_stride > subject.train_length:
        gaps = f"capped_stride={config.capped_stride} leaves gaps between windows of L={subject.train_length}"
    for length in config.valid_lengths:
        hindrance = _past_table(subject, length)
        yield _Work(_cell("positions", subject, length), partial(scorer.by_context, length), hindrance)
        if length > subject.train_length:
            split = partial(scorer.decomposition, length, config.capped_stride)
            yield _Work(_cell("decomposition", subject, length), split, hindrance or gaps)


def _probes_work(subject: Subject, scorer: Scorer, config: EvaluateConfig) -> Iterator[_Work]:
    assert config.capped_stride is not None  # it is resolved
    length = subject.train_length
    yield _Work(_cell("offsets", subject, length), partial(_at_offsets, subject, scorer, config))
    yield _perplexity_cell(subject, scorer, length, config.capped_stride, "sliding-window")
    for protocol in ("cached", "cached-shifted"):
        yield _perplexity_cell(subject, scorer, length, 1, protocol)


def _at_offsets(subject: Subject, scorer: Scorer, config: EvaluateConfig) -> Sequence[Entry]:
    """Loss at the offsets that the model's table has room for, and which it has none for."""
    length, longest = subject.train_length, subject.max_length
    fitting = [offset for offset in config.offsets if longest is None or offset + length <= longest]
    beyond = [str(offset) for offset in config.offsets if offset not in fitting]
    entries: list[Entry] = [*scorer.at_offsets(length, fitting)]
    if beyond:
        reason = f"its table holds {longest} positions, too few for windows from {', '.join(beyond)}"
        entries.append(_skipped(_cell("offsets", subject, length), reason))
    return entries


def _retrieval_work(
    task: str, subject: Subject, cases: Sequence[Case] | None, config: EvaluateConfig, progress: Progress
) -> Iterator[_Work]:
    by_length: dict[int, list[Case]] = {}
    too_long = None
    if cases is not None:
        by_length, left_out = bucket(cases, subject.tokenizer, config.valid_lengths, config.num_depths)
        if left_out:
            too_long = f"{left_out} of {len(cases)} cases of the file are too long for every length"
    for length in config.valid_lengths:
        hindrance = _past_table(subject, length)
        if cases is not None and length not in by_length:
            hindrance = "no case of the file is of this length"
        measure = partial(_retrieve, task, subject, length, by_length.get(length), config, progress)
        if too_long is not None and length == max(config.valid_lengths):
            note = _skipped(_cell(task, subject, length), too_long)
            measure = partial(_with_note, measure, note)
            hindrance = f"{hindrance}; {too_long}" if hindrance else None
        yield _Work(_cell(task, subject, length), measure, hindrance)


def _with_note(measure: Callable[[], Sequence[Entry]], note: Skipped) -> Sequence[Entry]:
    """What was measured, and what was left out of it."""
    return [*measure(), note]


def _retrieve(
    task: str, subject: Subject, length: int, cases: list[Case] | None, config: EvaluateConfig, progress: Progress
) -> Sequence[Entry]:
    if cases is None:
        depths = possible_depths(
            task, np.linspace(0, 1, config.num_depths).tolist() if config.num_depths > 1 else [0.5]
        )
        cases = generate_cases(task, subject.tokenizer, length, depths, config.cases_per_depth, config.cases_seed)
    new_tokens = max_new_tokens(cases, subject.tokenizer)
    if subject.max_length is not None and length + new_tokens > subject.max_length:
        raise Unsupported(
            f"its table holds {subject.max_length} positions, prompt and answer need {length + new_tokens}"
        )
    return measure_retrieval(
        lambda prompt: generate_greedily(subject, prompt, new_tokens),
        subject.tokenizer,
        cases,
        model=subject.identity,
        valid_length=length,
        on_case=lambda done: progress(f"asking {subject.name} {task} at {length}", done, len(cases)),
    )


def _summary_work(
    subject: Subject, meetings: Sequence[MeetingCase], config: EvaluateConfig, progress: Progress
) -> Iterator[_Work]:
    for length in config.valid_lengths:
        hindrance = _past_table(subject, length)
        if config.summary_tokens >= length:
            hindrance = f"a summary of {config.summary_tokens} tokens leaves no room for a meeting"
        measure = partial(_summarize, subject, length, meetings, config, progress)
        yield _Work(_cell("qmsum", subject, length), measure, hindrance)


def _summarize(
    subject: Subject, length: int, meetings: Sequence[MeetingCase], config: EvaluateConfig, progress: Progress
) -> Sequence[Entry]:
    record = measure_summaries(
        partial(generate_greedily, subject),
        subject.tokenizer,
        meetings,
        model=subject.identity,
        valid_length=length,
        max_new_tokens=config.summary_tokens,
        on_case=lambda done: progress(f"summaries by {subject.name} at {length}", done, len(meetings)),
    )
    return [record]


_TEXT_WORK = {"perplexity": _perplexity_work, "positions": _positions_work, "probes": _probes_work}


def _past_table(subject: Subject, length: int) -> str | None:
    """Why a length cannot be measured, if it cannot."""
    if subject.max_length is None or length <= subject.max_length:
        return None
    return f"its table holds {subject.max_length} positions"


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator raises a bare RuntimeError, and its name is what stays the same between systems.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _cell(task: str, subject: Subject, length: int) -> Cell:
    return Cell(task, subject.identity, length)


def _skipped(cell: Cell, reason: str) -> Skipped:
    return Skipped(**cell._asdict(), reason=reason)
