"""Does a model find what stands in its prompt? Cases from files or made to length, scored by exact matching."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from longreach.data.corpora import checked_text, read_json_lines
from longreach.data.tokenizer import Tokenizer
from longreach.measure.prompts import (
    Case,
    TooFewNames,
    kv_prompt,
    random_kv,
    random_lines,
    random_passkey,
    random_retrieval,
    random_topics,
)
from longreach.measure.subject import Unsupported
from longreach.results import Model, RetrievalRecord

PROMPTS_PER_BATCH = 16
"""How many prompts are tokenized at once: encodings take some hundred times the memory of their text."""
SPARE_TOKENS = 4
"""New tokens beyond those of an answering sentence, so that the end of its last word can be seen."""


def read_cases(task: str, path: Path) -> list[Case]:
    """Read the cases of a .jsonl file (also .gz, .xz, .zst), one a line, in the layout that the task was published in.

    - lines: `prompt`, `expected_number`, `correct_line`.
    - topics: `prompt`, `topics`, of which the first is asked for.
    - kv: `ordered_kv_records` as [key, value] pairs, `key`, `value`; the prompt is built from them.
    - passkey and retrieval: `prompt`, `answer`.

    The depth of a case is the number of characters before the answer (lines: before its line) over those of the
    prompt.

    Raises:
        ValueError: no case, or a line that lacks a field or whose answer does not stand in its prompt;
            the file and the line are named.
        OSError: the file cannot be read.
    """
    read = _TASKS[task].read
    cases = [read(_Fields(record, name)) for name, record in read_json_lines(path)]
    if not cases:
        raise ValueError(f"{path} holds no case: give a file with at least one")
    return cases


def generate_cases(
    task: str, tokenizer: Tokenizer, length: int, depths: Sequence[float], cases_per_depth: int, seed: int
) -> list[Case]:
    """Make cases whose prompts have at most `length` tokens, and as many of them as whole records allow.

    A case depends on the seed, the task, the length, its depth and its number alone (and on the tokenizer, which says
    how many records fit).

    Args:
        task: one of TASKS.
        tokenizer: of the model.
        length: tokens of a prompt; the answer comes on top.
        depths: where among the records the answer stands, each from 0 (first) to 1 (last); see `possible_depths`.
        cases_per_depth: how many cases for each depth.
        seed: of all that is drawn.

    Raises:
        Unsupported: a length too short for one record, or too long for the words that keep records apart.
    """
    draw = _TASKS[task].draw

    def case(depth: float, number: int) -> Case:
        # Drawn anew for each number of records: what fits is then a beginning of one and the same sequence.
        source = f"{seed} {task} {length} {depth} {number}"
        return _longest(lambda num_records: draw(Random(source), num_records, depth), tokenizer, length)

    return [case(float(depth), number) for depth in depths for number in range(cases_per_depth)]


def possible_depths(task: str, depths: Sequence[float]) -> tuple[float, ...]:
    """Those of `depths` at which `generate_cases` can place the answer: topics asks for the first record, at 0."""
    return (0.0,) if task == "topics" else tuple(depths)


def bucket(
    cases: Iterable[Case], tokenizer: Tokenizer, lengths: Sequence[int], num_depths: int
) -> tuple[dict[int, list[Case]], int]:
    """Sort cases from a file into lengths and depths.

    Each goes to the smallest of `lengths` that holds its prompt, and its depth becomes the nearest of the centres
    of `num_depths` equal parts of the prompt.

    Returns:
        The cases by length, without lengths that got none, and how many cases are longer than all lengths.
    """
    cases = list(cases)
    buckets: dict[int, list[Case]] = {length: [] for length in sorted(lengths)}
    left_out = 0
    for start in range(0, len(cases), PROMPTS_PER_BATCH):
        batch = cases[start : start + PROMPTS_PER_BATCH]
        for case, ids in zip(batch, tokenizer.encode_batch([case.prompt for case in batch]), strict=True):
            length = next((length for length in buckets if length >= len(ids)), None)
            if length is None:
                left_out += 1
            else:
                part = min(int(case.depth * num_depths), num_depths - 1)
                buckets[length].append(replace(case, depth=(part + 0.5) / num_depths))
    return {length: cases for length, cases in buckets.items() if cases}, left_out


def is_correct(case: Case, output: str) -> bool:
    """Whether `output`, the text that a model wrote after the prompt, gives the answer.

    - lines: the last number of the first line that holds one. LongEval takes the last number of all, which is the same
      for models that stop after their answer; base models write on.
    - topics: the words of the topic in a row, without regard to case, punctuation and an article before them. LongEval
      lets a language model judge with that leniency.
    - kv: the value anywhere, as "Lost in the middle" has it, but not as part of something longer.
    - passkey: the first number, as published.
    - retrieval: the first word.

    Numbers are whole runs of digits: 1234 is not found in 12345.
    """
    return _TASKS[case.task].matches(case.answer, output)


def max_new_tokens(cases: Iterable[Case], tokenizer: Tokenizer) -> int:
    """How many tokens a model may write for any of these cases: as many as a sentence takes that gives the answer."""
    sentences = [_TASKS[case.task].sentence.format(answer=case.answer) for case in cases]
    return max(map(len, tokenizer.encode_batch(sentences))) + SPARE_TOKENS


def measure_retrieval(
    generate: Callable[[list[int]], Iterable[int]],
    tokenizer: Tokenizer,
    cases: Sequence[Case],
    *,
    model: Model,
    valid_length: int,
    on_case: Callable[[int], None] = lambda done: None,
) -> list[RetrievalRecord]:
    """Ask a model for every answer; one record for each depth, in order.

    Args:
        generate: the new token ids that the model writes after those of a prompt.
        tokenizer: of the model.
        cases: of one task and length.
        model: whose answers they are.
        valid_length: tokens that the prompts were made for.
        on_case: called after each case with how many are done.
    """
    records = []
    done = 0
    by_depth = sorted(cases, key=lambda case: (case.task, case.depth))
    for (task, depth), group in groupby(by_depth, key=lambda case: (case.task, case.depth)):
        started = time.perf_counter()
        count = correct = tokens = 0
        for case in group:
            prompt = tokenizer.encode(case.prompt)
            correct += is_correct(case, tokenizer.decode(list(generate(prompt))))
            tokens += len(prompt)
            count += 1
            done += 1
            on_case(done)
        records.append(
            RetrievalRecord(
                task=task,
                model=model,
                valid_length=valid_length,
                depth=depth,
                cases=count,
                correct=correct,
                mean_tokens=tokens / count,
                seconds=time.perf_counter() - started,
            )
        )
    return records


def _longest(draw: Callable[[int], Case], tokenizer: Tokenizer, length: int) -> Case:
    """The case with the most records among those whose prompt has at most `length` tokens.

    Prompts grow nearly in proportion to their records, so a few tokenizations find it at any length.
    """
    case = draw(1)
    base = len(tokenizer.encode(case.prompt))
    if base > length:
        raise Unsupported(f"a {case.task} prompt of one record has {base} tokens, more than {length}")
    fits, too_many = 1, None  # numbers of records
    guess = 2
    while too_many is None or too_many - fits > 1:
        try:
            longer = draw(guess)
        except TooFewNames as error:
            if error.names == fits:
                raise
            guess = error.names  # the guess may be too high while as many as there are suffice
            continue
        size = len(tokenizer.encode(longer.prompt))
        if size <= length:
            case, fits = longer, guess
        else:
            too_many = guess
        per_record = max((size - base) / (guess - 1), 0.1)
        guess = max(guess + int((length - size) // per_record), fits + 1)
        if too_many is not None:
            guess = min(guess, too_many - 1)
    return case


class _Fields:
    """The fields of one case in a file, and the name of its place for errors."""

    def __init__(self, record: Mapping[str, Any], name: str) -> None:
        self._record = record
        self.name = name

    def value(self, field: str) -> Any:
        if field not in self._record:
            there = ", ".join(map(repr, self._record)) or "none"
            raise ValueError(
                f"{self.name} has no field {field!r}; its fields are {there}: add it, or name another task"
            )
        return self._record[field]

    def text(self, field: str) -> str:
        return checked_text(self.value(field), f"{self.name}, field {field!r}")

    def answer(self, field: str) -> str:
        """Text, or a whole number as text."""
        value = self.value(field)
        return str(value) if type(value) is int else self.text(field)

    def texts(self, field: str) -> list[str]:
        values = self.value(field)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{self.name}, field {field!r} must be a list of texts with at least one; mend or drop it")
        return [checked_text(value, f"{self.name}, field {field!r}") for value in values]

    def pairs(self, field: str) -> list[tuple[str, str]]:
        values = self.value(field)
        if not isinstance(values, list) or any(not isinstance(value, list) or len(value) != 2 for value in values):
            raise ValueError(f"{self.name}, field {field!r} must be a list of [key, value] pairs; mend or drop it")
        place = f"{self.name}, field {field!r}"
        return [(checked_text(key, place), checked_text(value, place)) for key, value in values]

    def case(self, task: str, prompt: str, answer: str, pattern: str) -> Case:
        """The case whose answer stands where `pattern` first matches its prompt."""
        for name, text in (("prompt", prompt), ("answer", answer)):
            if not text.strip():
                raise ValueError(f"{self.name}: the {name} is empty; fill it or drop the line")
        found = re.search(pattern, prompt, re.IGNORECASE)
        if found is None:
            raise ValueError(f"{self.name}: the answer {answer!r} does not stand in the prompt; mend or drop it")
        matches = _TASKS[task].matches
        if not matches(answer, answer) or matches(answer, ""):  # or all models would be wrong, or right
            raise ValueError(
                f"{self.name}: the answer {answer!r} is none that {task} can tell from others (lines and passkey have "
                "numbers in digits alone, retrieval one word, topics some words); mend it or drop the line"
            )
        return Case(task, prompt, answer, found.start() / len(prompt))


def _read_lines(fields: _Fields) -> Case:
    prompt, line = fields.text("prompt"), fields.text("correct_line")
    return fields.case("lines", prompt, fields.answer("expected_number"), re.escape(line))


def _read_topics(fields: _Fields) -> Case:
    prompt, topic = fields.text("prompt"), fields.texts("topics")[0]
    return fields.case("topics", prompt, topic, re.escape(topic))


def _read_kv(fields: _Fields) -> Case:
    records, key, value = fields.pairs("ordered_kv_records"), fields.text("key"), fields.text("value")
    return fields.case("kv", kv_prompt(records, key), value, re.escape(f'"{key}": "{value}"'))


def _read_hidden(task: str, fields: _Fields) -> Case:
    prompt, answer = fields.text("prompt"), fields.answer("answer")
    return fields.case(task, prompt, answer, rf"\b{re.escape(answer)}\b")


def _matches_lines(answer: str, output: str) -> bool:
    numbers = next(filter(None, (_numbers(line) for line in output.splitlines())), [""])
    return numbers[-1] == answer


def _matches_topics(answer: str, output: str) -> bool:
    topic, words = (re.findall(r"\w+", text.casefold()) for text in (answer, output))
    if topic[:1] == ["the"]:
        del topic[0]
    return f" {' '.join(topic)} " in f" {' '.join(words)} "


def _matches_kv(answer: str, output: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", output, re.IGNORECASE) is not None


def _matches_passkey(answer: str, output: str) -> bool:
    return _numbers(output)[:1] == [answer]


def _matches_retrieval(answer: str, output: str) -> bool:
    word = re.match(r"\s*(\w+)", output)
    return word is not None and word[1] == answer


def _numbers(text: str) -> list[str]:
    return re.findall(r"[0-9]+", text)


@dataclass(frozen=True)
class _Task:
    """What the tasks differ in."""

    read: Callable[[_Fields], Case]
    """A case from a line of a file."""
    draw: Callable[[Random, int, float], Case]
    """A random case with a number of records and the answer at a depth."""
    sentence: str
    """A wordy way to give the answer."""
    matches: Callable[[str, str], bool]
    """Whether an answer is given by an output."""


_TASKS = {
    "lines": _Task(
        _read_lines,
        random_lines,
        "The <REGISTER_CONTENT> in line interesting-mountain is <{answer}>.",
        _matches_lines,
    ),
    "topics": _Task(_read_topics, random_topics, 'The first topic we discussed was "{answer}".', _matches_topics),
    "kv": _Task(_read_kv, random_kv, 'The value corresponding to the key "{answer}" is "{answer}".', _matches_kv),
    "passkey": _Task(partial(_read_hidden, "passkey"), random_passkey, " The pass key is {answer}.", _matches_passkey),
    "retrieval": _Task(partial(_read_hidden, "retrieval"), random_retrieval, " {answer},", _matches_retrieval),
}
TASKS = tuple(_TASKS)
"""The retrieval tasks; see `longreach.measure.prompts`."""
