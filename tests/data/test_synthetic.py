import re
from random import Random

import pytest

from longreach.data.synthetic import FILLER, QUESTION, WORDS, RetrievalSequences, telling


def told(text: str) -> list[str]:
    return re.findall(rf"\b{QUESTION} (\w+)\.", text)


def test_the_words_stand_nowhere_else():
    around = re.findall(r"\w+", " ".join([*FILLER, QUESTION]).lower())
    assert not set(WORDS) & set(around)
    assert len(set(WORDS)) == len(WORDS)
    assert all(re.fullmatch("[a-z]+", word) for word in WORDS)


@pytest.mark.parametrize("length", [60, 129, 700])
def test_a_sequence_tells_one_word_now_and_then(tokenizer, length):
    sequences = RetrievalSequences(tokenizer, length)
    counts, words = [], set()
    for seed in range(60):
        tokens = sequences.draw(Random(seed))
        assert len(tokens) == length
        text = tokenizer.decode(tokens)
        sentences = re.findall(r"[^ ][^.?]*[.?]", text)
        assert set(sentences) - set(FILLER) <= {telling(word) for word in WORDS}
        assert len(set(told(text))) <= 1
        counts.append(len(told(text)))
        words |= set(told(text))
    assert len(words) > 20
    assert len(set(counts)) >= 4
    assert sum(count >= 2 for count in counts) > 30  # there is something to be asked for


def test_sequences_follow_from_the_random_state_alone(tokenizer):
    one, other = RetrievalSequences(tokenizer, 129), RetrievalSequences(tokenizer, 129)
    first = one.draw(Random("a"))
    assert one.draw(Random("b")) != first
    assert other.draw(Random("a")) == first


def test_a_length_without_room_is_refused_and_the_least_is_named(tokenizer):
    with pytest.raises(
        ValueError,
        match=r"^sequences of 5 tokens \(train_length and one\) do not hold a word twice: give at least \d+$",
    ) as error:
        RetrievalSequences(tokenizer, 5)
    least = int(str(error.value).split()[-1])
    assert len(RetrievalSequences(tokenizer, least).draw(Random(0))) == least
    with pytest.raises(ValueError, match=f"sequences of {least - 1} tokens"):
        RetrievalSequences(tokenizer, least - 1)
