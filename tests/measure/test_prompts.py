import re
from random import Random
from uuid import UUID

import pytest

from longreach.measure import prompts
from longreach.measure.prompts import (
    ADJECTIVES,
    NOUNS,
    kv_prompt,
    lines_prompt,
    passkey_prompt,
    random_kv,
    random_lines,
    random_passkey,
    random_retrieval,
    random_topics,
    topics_prompt,
)


def test_lines_have_the_published_format():
    expected = (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n"
        "\n"
        "line torpid-kid: REGISTER_CONTENT is <2416>\n"
        "line brave-owl: REGISTER_CONTENT is <7>\n"
        "\n"
        "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line brave-owl? I need the number."
    )
    assert lines_prompt([("torpid-kid", 2416), ("brave-owl", 7)], "brave-owl") == expected


def test_topics_have_the_published_format():
    expected = (
        "Below is a record of our previous conversation on 2 different topics. You are the ASSISTANT, and I am the "
        "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. "
        "Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record "
        "start. USER: One.USER: Two. Now the record ends. What is the first topic we discussed? Only give me the "
        "topic name. Do not summarize yourself."
    )
    assert topics_prompt(["USER: One.", "USER: Two."]) == expected


def test_kv_has_the_published_format():
    # The example in the tests of the "Lost in the middle" repository.
    expected = (
        "Extract the value corresponding to the specified key in the JSON object below.\n"
        "\n"
        "JSON data:\n"
        '{"test key1": "test value1",\n'
        ' "test key2": "test value2",\n'
        ' "test key3": "test value3"}\n'
        "\n"
        'Key: "test key2"\n'
        "Corresponding value:"
    )
    records = [(f"test key{number}", f"test value{number}") for number in (1, 2, 3)]
    assert kv_prompt(records, "test key2") == expected


def test_passkey_has_the_published_format():
    expected = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n"
        "The grass is green.\n"
        "The pass key is 471. Remember it. 471 is the pass key.\n"
        "The grass is green. The sky is blue.\n"
        "What is the pass key? The pass key is"
    )
    assert passkey_prompt(471, "The grass is green.", "The grass is green. The sky is blue.") == expected


def test_a_random_prompt_of_fewer_records_is_the_beginning_of_a_longer_one():
    for draw in (random_lines, random_kv, random_topics):
        short, long = (draw(Random(1), count, 0.0).prompt for count in (5, 9))
        beginning = short[: int(len(short) * 0.6)].replace("on 5 different", "on 9 different")
        assert long.startswith(beginning), draw
    assert random_retrieval(Random(1), 5, 0.0).answer == random_retrieval(Random(1), 9, 0.0).answer


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (0.3, 3), (0.5, 5), (0.99, 10), (1, 10)])
def test_random_records_stand_at_their_depth(depth, place):
    case = random_lines(Random(0), 11, depth)
    lines = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", case.prompt, re.MULTILINE)
    assert len(set(dict(lines))) == 11
    assert lines[place] == (re.search(r"in line (\S+)\?", case.prompt)[1], case.answer)
    assert all(1 <= int(number) <= 50000 for _, number in lines)

    case = random_kv(Random(0), 11, depth)
    records = re.findall(r'"(\S{36})": "(\S{36})"', case.prompt)
    assert len(records) == 11
    assert records[place] == (re.search(r'Key: "(\S+)"', case.prompt)[1], case.answer)
    assert all(UUID(text).version == 4 for record in records for text in record)

    case = random_retrieval(Random(0), 11, depth)
    sentences = re.findall(r"[^ ][^.?]*[.?]", case.prompt)
    assert len(sentences) == 11
    assert [index for index, sentence in enumerate(sentences) if "The word" in sentence] == [place]
    assert sentences[place] == f"The word is {case.answer}."
    assert case.prompt.endswith((". The word is", "? The word is"))
    assert case.prompt.count(case.answer) == 1

    case = random_passkey(Random(0), 10, depth)
    before, after = case.prompt.split(f"\nThe pass key is {case.answer}. Remember it. {case.answer} is the pass key.\n")
    filler = re.findall(r"[^.\n]+\.", before.split("\n")[1])
    assert len(filler) == round(10 * depth)
    assert len(re.findall(r"[^.\n]+\.", after.split("\n")[0])) == 10 - len(filler)
    assert {case.task, case.depth} == {"passkey", depth}


def test_random_topics_ask_for_the_first_of_different_ones():
    case = random_topics(Random(0), 40, 0.0)
    topics = re.findall(r"USER: I would like to discuss the topic of ([^<\n]+)\. \n ", case.prompt)
    assert len(set(topics)) == 40
    assert case.answer.lower() == topics[0]
    assert not any(topics[0] in other or other in topics[0] for other in topics[1:])
    assert case.prompt.count("this is the end of our discussion on the topic The ") == 40
    assert "on 40 different topics" in case.prompt


def test_more_records_than_names_are_refused(monkeypatch):
    monkeypatch.setattr(prompts, "NOUNS", NOUNS[:2])
    monkeypatch.setattr(prompts, "ADJECTIVES", ADJECTIVES[:2])
    assert random_lines(Random(0), 4, 1.0).prompt.count("REGISTER_CONTENT is <") == 4
    with pytest.raises(ValueError, match=r"^more than 4 records are needed and there are 4 names: give a shorter"):
        random_lines(Random(0), 5, 1.0)
