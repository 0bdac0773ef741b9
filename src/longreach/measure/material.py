"""What the tasks of a configuration are measured on, and the files that it names for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from longreach.data.prepare import ValidationData
from longreach.files import digest, open_file
from longreach.measure.bootstrap import units
from longreach.measure.plan import RETRIEVAL_TASKS, EvaluateConfig
from longreach.measure.retrieval import Case, read_cases
from longreach.measure.summaries import MeetingCase, read_meetings
from longreach.measure.text_tasks import Text
from longreach.measure.words import count_words

Read = TypeVar("Read")


@dataclass(frozen=True)
class Material:
    """What the tasks of a configuration are measured on."""

    text: Text | None = None
    """For perplexity, positions and probes."""
    cases: Sequence[Case] | None = None
    """For a retrieval task; None to generate them."""
    meetings: Sequence[MeetingCase] = ()
    """For qmsum."""
    sources: dict[str, str] = field(default_factory=dict)
    """The files that these were read from and their digests, as `Provenance.sources` has them."""

    @property
    def num_targets(self) -> int:
        """How many tokens of text are scored."""
        return 0 if self.text is None else self.text.num_targets


def read_material(config: EvaluateConfig, text: Text | None) -> Material:
    """The text, and what the files of a configuration hold.

    Raises:
        ValueError: a file cannot be read, or lacks a field; the line is named.
        FileNotFoundError: there is no such file.
    """
    cases = None
    if config.cases is not None:
        (task,) = (task for task in config.tasks if task in RETRIEVAL_TASKS)
        cases = _read("cases", config.cases, partial(read_cases, task))
    meetings = () if config.meetings is None else _read("meetings", config.meetings, read_meetings)
    named = {"cases": config.cases, "meetings": config.meetings}
    sources = {f"{name} {path}": digest(Path(path)) for name, path in named.items() if path is not None}
    return Material(text, cases, meetings, sources)


def _read(argument: str, path: str, read: Callable[[Path], Read]) -> Read:
    """What the file of an argument holds."""
    try:
        open_file(Path(path)).close()
        return read(Path(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}={path}: no such file; give a .jsonl file of {argument}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{argument}: {error}") from error


def num_read(config: EvaluateConfig, longest: int) -> int:
    """How many tokens of a text are read if it has them: those that are scored, and one before them to start from."""
    return 1 + max(config.valid_tokens, longest)


def text_of(prepared: ValidationData, config: EvaluateConfig, longest: int) -> Text:
    """The tokens that are scored, the same for every method and length, with one before them to start from.

    Args:
        prepared: its validation text is scored.
        config: how much of it, at least.
        longest: the longest window in tokens that will be scored.

    Raises:
        ValueError: it is shorter than that, or empty; or its tokens are not the tokenizer's.
    """
    available = len(prepared.valid) - 1
    if available < max(longest, 1):
        asked, mend = f"valid_lengths={longest}", "shorter ones"
        if config.valid_lengths and longest > max(config.valid_lengths):
            asked, mend = f"tasks={','.join(config.tasks)} take a window of the training length, {longest}", "others"
        raise ValueError(
            f"{asked}: the validation text has {available} tokens to score; give {mend}, more text, or hold more of it "
            "out"
        )
    tokens = prepared.valid.read(0, min(len(prepared.valid), num_read(config, longest)))
    tokenizer = prepared.tokenizer
    if (largest := int(tokens.max())) >= tokenizer.vocab_size:
        raise ValueError(
            f"the validation text has the token {largest} of vocab_size={tokenizer.vocab_size}: the cache of its "
            "tokens is damaged, remove that"
        )
    words = None
    if config.word_level:  # document by document, for decoding drops the eos that keeps their words apart
        documents = np.split(tokens[1:], np.flatnonzero(tokens[1:] == tokenizer.eos_id) + 1)
        words = sum(count_words(tokenizer.decode(document)) for document in documents)
    return Text(
        tokens=tokens,
        num_bytes=tokenizer.count_bytes(tokens[1:]),
        num_words=words,
        units=units(tokens, tokenizer.eos_id, max(longest, 1)),
    )
