import gzip
import json
import lzma
import re
from collections import Counter
from random import Random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from longreach.data.tokenizer import train_tokenizer
from longreach.measure.prompts import (
    Case,
    kv_prompt,
    lines_prompt,
    passkey_prompt,
    random_retrieval,
    topics_prompt,
)
from longreach.measure.retrieval import (
    TASKS,
    bucket,
    generate_cases,
    is_correct,
    max_new_tokens,
    measure_retrieval,
    possible_depths,
    read_cases,
)
from longreach.results import Model

LINES = [("torpid-kid", 2416), ("brave-owl", 241), ("old-hill", 41)]
FIELDS = {
    "lines": {
        "prompt": lines_prompt(LINES, "brave-owl"),
        "expected_number": 241,
        "correct_line": "line brave-owl: REGISTER_CONTENT is <241>\n",
        "num_lines": 3,
    },
    "topics": {
        "prompt": topics_prompt(["USER: I would like to discuss the topic of the role of UFOs.", "USER: the sea."]),
        "topics": ["The role of UFOs", "The sea"],
    },
    "kv": {"ordered_kv_records": [["a1", "b1"], ["a2", "b1"], ["a3", "b3"]], "key": "a2", "value": "b1"},
    "passkey": {"prompt": passkey_prompt(12, "The 123.", "12 and on."), "answer": 12},
    "retrieval": {"prompt": "So it was. The word is day. The word is name. The word is", "answer": "day"},
}


@pytest.fixture(scope="module")
def tokenizer():
    """One with few merges, for which every word is many tokens."""
    return train_tokenizer([lines_prompt(LINES, "brave-owl")] * 3, vocab_size=320)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_files_of_every_task_are_read(tmp_path):
    for task in TASKS:
        (case,) = read_cases(task, write(tmp_path / f"{task}.jsonl", FIELDS[task]))
        assert case.task == task
        assert case.prompt == FIELDS[task].get("prompt", kv_prompt([("a1", "b1"), ("a2", "b1"), ("a3", "b3")], "a2"))
    answers = {task: read_cases(task, tmp_path / f"{task}.jsonl")[0].answer for task in TASKS}
    expected = {"lines": "241", "topics": "The role of UFOs", "kv": "b1", "passkey": "12", "retrieval": "day"}
    assert answers == expected


@pytest.mark.parametrize(
    ("task", "what_stands_there"),
    [
        ("lines", "line brave-owl: REGISTER"),
        ("topics", "the role of UFOs."),
        ("kv", '"a2": "b1"'),  # not the other key of that value, nor the question
        ("passkey", "12. Remember it."),  # not a part of 123
        ("retrieval", "day. The word is name"),
    ],
)
def test_the_depth_is_where_the_answer_stands(tmp_path, task, what_stands_there):
    (case,) = read_cases(task, write(tmp_path / "cases.jsonl", FIELDS[task]))
    place = case.depth * len(case.prompt)
    assert case.prompt[round(place) :].startswith(what_stands_there)
    assert place == pytest.approx(round(place))


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".xz", lzma.compress),
        (".gz", gzip.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_files_may_be_compressed(tmp_path, suffix, pack):
    path = tmp_path / f"cases.jsonl{suffix}"
    path.write_bytes(pack(json.dumps(FIELDS["kv"]).encode()))
    assert [case.answer for case in read_cases("kv", path)] == ["b1"]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("lines", {"correct_line": ...}, r"has no field 'correct_line'; its fields are 'prompt', 'expected_number'"),
        ("lines", {"correct_line": "line x"}, r"the answer '241' does not stand in the prompt"),
        ("lines", {"expected_number": 2.5}, r"field 'expected_number' holds float, not text"),
        ("lines", {"expected_number": True}, r"field 'expected_number' holds bool, not text"),
        ("topics", {"topics": ...}, r"has no field 'topics'"),
        ("topics", {"topics": []}, r"field 'topics' must be a list of texts with at least one"),
        ("topics", {"topics": "The sea"}, r"field 'topics' must be a list"),
        ("topics", {"topics": ["The role of bees"]}, r"'The role of bees' does not stand in the prompt"),
        ("kv", {"ordered_kv_records": [["a"]]}, r"field 'ordered_kv_records' must be a list of \[key, value\] pairs"),
        ("kv", {"ordered_kv_records": {"a": "b"}}, r"field 'ordered_kv_records' must be a list"),
        ("kv", {"ordered_kv_records": [["a2", 1]]}, r"field 'ordered_kv_records' holds int, not text"),
        ("kv", {"key": "a4"}, r"the answer 'b1' does not stand in the prompt"),
        ("passkey", {"prompt": ["x"]}, r"field 'prompt' holds list, not text"),
        ("passkey", {"answer": 1}, r"the answer '1' does not stand in the prompt"),
        ("retrieval", {"answer": "nam"}, r"the answer 'nam' does not stand in the prompt"),
        ("retrieval", {"prompt": ""}, r"the prompt is empty"),
        ("passkey", {"prompt": " \n"}, r"the prompt is empty"),
        ("passkey", {"prompt": "", "answer": ""}, r"the prompt is empty"),
        ("retrieval", {"answer": ""}, r"the answer is empty"),
        ("passkey", {"prompt": "It is ten. It is", "answer": "ten"}, r"the answer 'ten' is none that passkey can tell"),
        ("lines", {"expected_number": "2,41"}, r"the answer '2,41' is none that lines can tell"),
        ("retrieval", {"answer": "day. The"}, r"the answer 'day\. The' is none that retrieval can tell"),
        ("topics", {"topics": ["?"], "prompt": "What is it?"}, r"the answer '\?' is none that topics can tell"),
        ("kv", {"value": " "}, r"the answer is empty"),
        ("retrieval", {"prompt": "\ud800 x"}, r"half a surrogate pair"),
    ],
)
def test_a_case_that_lacks_something_is_named_with_its_line(tmp_path, task, change, message):
    fields = {key: value for key, value in {**FIELDS[task], **change}.items() if value is not ...}
    path = write(tmp_path / "cases.jsonl", FIELDS[task], FIELDS[task], fields)
    with pytest.raises(ValueError, match=rf"cases\.jsonl:3.*{message}"):
        read_cases(task, path)


def test_files_without_cases_and_unknown_tasks_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no case"):
        read_cases("kv", tmp_path / "empty.jsonl")
    (tmp_path / "torn.jsonl").write_text(json.dumps(FIELDS["kv"]) + '\n{"key": ')
    with pytest.raises(ValueError, match=r"torn\.jsonl:2 is not JSON"):
        read_cases("kv", tmp_path / "torn.jsonl")
    for name, content, part in (
        ("array.json", json.dumps([FIELDS["kv"]]), "is JSON but not JSON lines"),
        ("pretty.json", json.dumps(FIELDS["kv"], indent=1), "is JSON but not JSON lines"),
        ("array.jsonl", json.dumps([FIELDS["kv"]]), "holds list; every line"),
        ("table.csv", "prompt,answer\na 5,5\n", "holds table, not JSON lines"),
        ("prose.txt", "the key is 5", "holds text, not JSON lines"),
        ("page.jsonl", "<html>5</html>", "is HTML or XML"),
        ("twice.jsonl", '{"prompt": "a 5", "answer": "5", "answer": "a"}', "the key 'answer' comes twice"),
        ("nul.jsonl", "\0" * 50, "is not JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=part):
            read_cases("kv", tmp_path / name)
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        (tmp_path / "wide.jsonl").write_text("\ufeff" + json.dumps(FIELDS["kv"]), encoding=encoding)
        with pytest.raises(ValueError, match=r"wide\.jsonl' is UTF-16 or UTF-32"):
            read_cases("kv", tmp_path / "wide.jsonl")
    (tmp_path / "mark.jsonl").write_text(json.dumps(FIELDS["kv"]), encoding="utf-8-sig")
    assert len(read_cases("kv", tmp_path / "mark.jsonl")) == 1
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_cases("kv", tmp_path / "missing.jsonl")


def num_records(case: Case) -> int:
    """Counted in the text, by means of its own."""
    pattern = {
        "lines": r"REGISTER_CONTENT is <\d",
        "topics": r"topic of the \w+ of \w+s\. \n",
        "kv": r'": "',
        "passkey": r"(green|blue|yellow|go|again)\.",
        "retrieval": r"[.?] ",
    }[case.task]
    return len(re.findall(pattern, case.prompt))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [3000, 9000])
def test_generated_prompts_are_as_long_as_whole_records_allow(tokenizer, task, length):
    depths = possible_depths(task, (0, 0.5, 1))
    cases = generate_cases(task, tokenizer, length, depths, 2, seed=0)
    assert Counter(case.depth for case in cases) == dict.fromkeys(map(float, depths), 2)
    assert len({case.prompt for case in cases}) == len(cases)
    for case in cases:
        size = len(tokenizer.encode(case.prompt))
        longest_record = {"lines": 60, "topics": 1500, "kv": 130, "passkey": 25, "retrieval": 25}[task]
        assert length - longest_record < size <= length
        assert num_records(case) > 1


class Characters:
    """A tokenizer with a token for each character."""

    def encode(self, text):
        return list(text)


@given(length=st.integers(40, 900), depth=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 99))
def test_one_more_record_would_be_too_long(length, depth, seed):
    (case,) = generate_cases("retrieval", Characters(), length, [depth], 1, seed)
    assert len(case.prompt) <= length
    source = f"{seed} retrieval {length} {depth} 0"
    longer = random_retrieval(Random(source), num_records(case) + 1, depth)
    assert longer.answer == case.answer  # the same draws
    assert len(longer.prompt) > length


def test_cases_follow_from_seed_task_length_depth_and_number_alone(tokenizer):
    whole = generate_cases("kv", tokenizer, 2000, (0, 0.5, 1), 3, seed=7)
    assert generate_cases("kv", tokenizer, 2000, (0.5,), 2, seed=7) == whole[3:5]
    assert generate_cases("kv", tokenizer, 2000, (0.5,), 2, seed=8) != whole[3:5]
    assert generate_cases("kv", tokenizer, 2000, (1.0, 0.0), 3, seed=7) == whole[6:] + whole[:3]


def test_a_length_that_one_record_fills_holds_it(tokenizer):
    with pytest.raises(ValueError, match=r"^a kv prompt of one record has \d+ tokens, more than 9$"):
        generate_cases("kv", tokenizer, 9, [0], 1, seed=0)
    (case,) = generate_cases("kv", tokenizer, 400, [0], 1, seed=0)
    assert num_records(case) >= 1


def test_only_topics_has_no_choice_of_depth():
    assert {task: possible_depths(task, [0, 0.5]) for task in TASKS} == {
        "lines": (0, 0.5),
        "topics": (0.0,),
        "kv": (0, 0.5),
        "passkey": (0, 0.5),
        "retrieval": (0, 0.5),
    }


def test_cases_go_to_the_smallest_length_and_the_nearest_depth(tokenizer):
    prompts = ["x" * count for count in (1, 10, 11, 20, 21)]
    sizes = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert sizes == [1, 10, 11, 20, 21]
    depths = (0.0, 0.24, 0.26, 1.0, 0.5)
    cases = [Case("kv", prompt, "a", depth) for prompt, depth in zip(prompts, depths, strict=True)]
    buckets, left_out = bucket(cases, tokenizer, [40, 20, 10, 9000], num_depths=4)
    found = {length: [(len(case.prompt), case.depth) for case in some] for length, some in buckets.items()}
    assert found == {10: [(1, 0.125), (10, 0.125)], 20: [(11, 0.375), (20, 0.875)], 40: [(21, 0.625)]}
    assert left_out == 0
    buckets, left_out = bucket(cases * 20, tokenizer, [10], num_depths=1)
    assert ({length: len(some) for length, some in buckets.items()}, left_out) == ({10: 40}, 60)
    assert {case.depth for case in buckets[10]} == {0.5}


UUID = "bb3ba2a5-7de8-434b-a86e-a88bb9fa7289"


@pytest.mark.parametrize(
    ("task", "answer", "output", "correct"),
    [
        ("lines", "2416", "2416", True),
        ("lines", "2416", " <2416>", True),
        ("lines", "2416", "The <REGISTER_CONTENT> in line 7 is <2416>.", True),
        ("lines", "2416", "Sure! Here it is:\n\n2416.\n", True),
        ("lines", "2416", "2416\nline old-owl: REGISTER_CONTENT is <77>", True),  # as base models write on
        ("lines", "2416", "77\nline torpid-kid: REGISTER_CONTENT is <2416>", False),
        ("lines", "2416", "24160", False),
        ("lines", "2416", "12416", False),
        ("lines", "2416", "It is 2416 or 2417", False),
        ("lines", "2416", "2 416", False),
        ("lines", "416", "2,416", True),  # the last number, as published
        ("lines", "2416", "no idea", False),
        ("lines", "2416", "", False),
        ("lines", "2416", "9" * 5000, False),
        ("passkey", "471", " 471. Remember it.", True),
        ("passkey", "471", ":\n\n471", True),
        ("passkey", "471", "4711", False),
        ("passkey", "471", "1471", False),
        ("passkey", "471", "12 or 471", False),
        ("passkey", "471", "47 1", False),
        ("passkey", "471", "", False),
        ("topics", "The role of UFOs (and others)", "the role of ufos and others", True),
        ("topics", "The role of art", 'The first topic was "The Role of Art".', True),
        ("topics", "The role of art", "Role of art", True),
        ("topics", "The role of art", "the role of artists", False),
        ("topics", "The role of art", "the cameo role of art", True),
        ("topics", "The role of art", "the role of the art", False),
        ("topics", "The role of art", "", False),
        ("topics", "Therapy", "rapy", False),
        ("kv", UUID, f' "{UUID}"', True),
        ("kv", UUID, UUID.upper(), True),
        ("kv", UUID, f"{UUID}0", False),
        ("kv", UUID, f"f{UUID}", False),
        ("kv", UUID, f"{UUID}-11", False),
        ("kv", UUID, UUID[:-1], False),
        ("kv", "a.c", "abc", False),
        ("retrieval", "under", " under, hand", True),
        ("retrieval", "under", "under", True),
        ("retrieval", "under", "\n under\n", True),
        ("retrieval", "under", " underneath", False),
        ("retrieval", "under", " which, hand under", False),
        ("retrieval", "under", ", under", False),
        ("retrieval", "under", " Under", False),
        ("retrieval", "under", "", False),
    ],
)
def test_scoring(task, answer, output, correct):
    assert is_correct(Case(task, "", answer, 0.0), output) is correct


@pytest.mark.parametrize("task", TASKS)
def test_there_is_room_for_a_wordy_answer(tokenizer, task):
    cases = generate_cases(task, tokenizer, 2500, [0], 5, seed=0)
    wordy = {
        "lines": "The content of that line is {}",
        "topics": "The first topic was {}",
        "kv": ' "{}"',
        "passkey": " {}.",
        "retrieval": " {},",
    }[task]
    room = max_new_tokens(cases, tokenizer)
    assert all(len(tokenizer.encode(wordy.format(case.answer))) < room for case in cases)
    assert room < 250  # for a tokenizer with hardly a merge


def test_measuring_asks_every_case_and_counts_by_depth(tokenizer):
    depths, per_depth = (0.0, 0.5, 1.0), 4
    cases = generate_cases("kv", tokenizer, 1500, depths, per_depth, seed=0)
    answers = {tuple(tokenizer.encode(case.prompt)): case for case in cases}
    assert len(answers) == 12
    asked = []

    def generate(prompt):
        case = answers[tuple(prompt)]
        asked.append(case)
        # Finds all at the end, half of those in the middle, and none at the start.
        finds = case.depth == 1.0 or (case.depth == 0.5 and sum(other.depth == 0.5 for other in asked) % 2)
        return tokenizer.encode(f' "{case.answer}"' if finds else ' "nothing"')

    done = []
    records = measure_retrieval(
        generate, tokenizer, cases[::-1], model=Model("alibi", 64, seed=0), valid_length=1500, on_case=done.append
    )
    assert [(record.depth, record.cases, record.correct) for record in records] == [(0.0, 4, 0), (0.5, 4, 2), (1, 4, 4)]
    assert sorted(map(id, asked)) == sorted(map(id, cases))
    assert done == list(range(1, 13))
    for record in records:
        sizes = [len(tokenizer.encode(case.prompt)) for case in cases if case.depth == record.depth]
        assert record.mean_tokens == pytest.approx(sum(sizes) / per_depth)
        assert (record.task, record.model, record.valid_length) == ("kv", Model("alibi", 64, seed=0), 1500)
        assert record.seconds > 0
