"""Query-based meeting summaries: QMSum (Zhong et al., 2021, arXiv 2104.05938), scored with ROUGE."""

import re
import time
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longreach.data.corpora import checked_text, read_json_lines
from longreach.data.tokenizer import Tokenizer
from longreach.measure.bootstrap import intervals
from longreach.measure.subject import Unsupported
from longreach.results import Model, SummaryRecord

PROMPT = "{transcript}\n\nQuery: {query}\nSummary:"
"""What a model is given. All that it then writes, up to eos or max_new_tokens, is its summary."""

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""A character of Thai, Lao, Burmese, Khmer, Japanese or Chinese, which put no spaces between words."""

Generate = Callable[[list[int], int], Iterable[int]]
"""Continues a prompt of token ids by at most so many tokens, without eos; see `stream_tokens`."""


@dataclass(frozen=True)
class MeetingCase:
    """One query about one meeting, with the summary that people wrote."""

    name: str
    """Where it stands: path, line and query."""
    transcript: str
    """A line "speaker: content" for each turn."""
    query: str
    summary: str


def read_meetings(path: Path) -> list[MeetingCase]:
    """The cases of a QMSum file in its order: one for each query of each meeting.

    The file is .jsonl, plain or compressed, one meeting a line as QMSum has them: `general_query_list` and
    `specific_query_list`, lists of objects with `query` and `answer`, and `meeting_transcripts`, a list of objects
    with `speaker` and `content`. Where a meeting has the text in one field, `transcript_text`, that is taken.

    Raises:
        ValueError: a field is missing or of the wrong type, and the message names the line and the field; or there is
            no case at all.
        OSError: the file cannot be read.
    """
    cases = []
    for place, meeting in read_json_lines(path):
        transcript = _transcript(meeting, place)
        for field in ("general_query_list", "specific_query_list"):
            for number, entry in enumerate(_objects(meeting, field, place)):
                name = f"{place}, {field}[{number}]"
                cases.append(MeetingCase(name, transcript, _text(entry, "query", name), _text(entry, "answer", name)))
    if not cases:
        raise ValueError(f"{str(path)!r} holds no query: give a .jsonl file of QMSum meetings")
    return cases


def prompt_tokens(tokenizer: Tokenizer, case: MeetingCase, max_tokens: int) -> tuple[list[int], bool]:
    """The prompt in at most max_tokens tokens, and whether the transcript had to be cut for that.

    What is cut is the transcript's end, at a white space, no more than needed: the query always stays whole.

    Raises:
        Unsupported: not even the query and the first word of the transcript fit.
    """

    def encoded(transcript: str) -> list[int]:
        return tokenizer.encode(PROMPT.format(transcript=transcript, query=case.query))

    whole = encoded(case.transcript)
    if len(whole) <= max_tokens:
        return whole, False
    ends = [0, *(word.end() for word in re.finditer(r"\S+", case.transcript))]
    # How many of its beginnings fit. The last of them was tried, even if some longer one should have fewer tokens.
    fitting = bisect_right(ends, max_tokens, key=lambda end: len(encoded(case.transcript[:end])))
    if fitting < 2:
        raise Unsupported(
            f"{case.name}: its query and the first word of its transcript take more than the {max_tokens} tokens that "
            "there are for a prompt; give a longer length or a smaller summary_tokens"
        )
    return encoded(case.transcript[: ends[fitting - 1]]), True


def measure_summaries(
    generate: Generate,
    tokenizer: Tokenizer,
    cases: Sequence[MeetingCase],
    *,
    model: Model,
    valid_length: int,
    max_new_tokens: int,
    on_case: Callable[[int], None] = lambda done: None,
) -> SummaryRecord:
    """Have each case summarized from a prompt that leaves room for max_new_tokens within valid_length, and score it.

    ROUGE-1, ROUGE-2 and ROUGE-L F-measures (Lin, 2004) of `rouge-score` with its stemmer, averaged over the cases, of
    `WordsOfAnyScript`; each with the percentile bootstrap interval over them.

    Args:
        generate: continues a prompt; greedy decoding by convention.
        tokenizer: the model's.
        cases: at least one.
        model: whose summaries they are.
        valid_length: the most tokens of prompt and summary together.
        max_new_tokens: the most tokens of a summary, below valid_length.
        on_case: called after each case with how many are done.

    Raises:
        ValueError: `rouge-score` is not installed.
        Unsupported: a case does not fit.
    """
    scorer = _rouge_scorer()
    start = time.perf_counter()
    scores = np.empty((len(cases), len(ROUGE_TYPES)))
    truncated = 0
    for number, case in enumerate(cases):
        prompt, cut = prompt_tokens(tokenizer, case, valid_length - max_new_tokens)
        truncated += cut
        summary = tokenizer.decode(list(generate(prompt, max_new_tokens)))
        rouge = scorer.score(case.summary, summary)
        scores[number] = [rouge[kind].fmeasure for kind in ROUGE_TYPES]
        on_case(number + 1)
    return SummaryRecord(
        model=model,
        valid_length=valid_length,
        cases=len(cases),
        truncated=truncated,
        **_figures(scores),
        seconds=time.perf_counter() - start,
    )


class WordsOfAnyScript:
    """Words as ROUGE counts them, of any script; those of ASCII text are the ones of `rouge-score` with its stemmer.

    A word is a run of letters, marks and digits, in lower case and Unicode's composed form. Where a script puts no
    spaces between words, each of its characters is one: figures of such languages are of characters.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._stemmed = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order."""
        composed = unicodedata.normalize("NFC", text).lower()
        kept = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in composed)
        words = UNSPACED.sub(r" \g<0> ", kept).split()
        return [token for word in words for token in (self._stemmed(word) if word.isascii() else [word])]


def _figures(scores: np.ndarray) -> dict[str, Any]:
    """Mean of each column of scores (cases, 3) with the ends of its interval, under the names of the record."""
    ends = intervals(scores, np.ones_like(scores))
    figures: dict[str, Any] = {}
    for kind, mean, (low, high) in zip(ROUGE_TYPES, scores.mean(axis=0), ends, strict=True):
        figures |= {kind: float(mean), f"{kind}_low": low, f"{kind}_high": high}
    return figures


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("qmsum needs rouge-score: pip install 'longreach[eval]'") from error
    return RougeScorer(ROUGE_TYPES, tokenizer=WordsOfAnyScript())


def _transcript(meeting: dict[str, Any], place: str) -> str:
    if "transcript_text" in meeting:
        return _text(meeting, "transcript_text", place)
    if "meeting_transcripts" not in meeting:
        raise ValueError(f"{place} has neither field 'transcript_text' nor 'meeting_transcripts'; give one of them")
    turns = _objects(meeting, "meeting_transcripts", place)
    names = [f"{place}, meeting_transcripts[{number}]" for number in range(len(turns))]
    return "\n".join(
        f"{_text(turn, 'speaker', name)}: {_text(turn, 'content', name)}"
        for turn, name in zip(turns, names, strict=True)
    )


def _objects(record: dict[str, Any], field: str, place: str) -> list[dict[str, Any]]:
    values = _field(record, field, place)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{place}, field {field!r} is no list of objects; mend or drop the line")
    return values


def _text(record: dict[str, Any], field: str, place: str) -> str:
    return checked_text(_field(record, field, place), f"{place}, field {field!r}")


def _field(record: dict[str, Any], field: str, place: str) -> Any:
    if field not in record:
        raise ValueError(f"{place} has no field {field!r}; its fields are {', '.join(map(repr, record)) or 'none'}")
    return record[field]
