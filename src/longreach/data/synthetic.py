"""Synthetic text for in-context retrieval: a word is told among sentences that say nothing, and told again later.

    It was not for us. The word is river. So it was. And so on and on. They had no more of it. The word is river. ...

From the second time on, the word can be known from the context alone, however far back it stands. Small models learn
that from a few thousand short sequences, and can then be asked for the word at any length with no instruction training.
It is the passkey task (Mohtashami & Jaggi, 2023, arXiv 2305.16300) in words of one token: nearly every byte-level BPE
of a few thousand tokens, trained on prose or on code, has each of WORDS with the space before it as one.
"""

import math
from random import Random

from longreach.data.tokenizer import Tokenizer

WORDS = tuple(
    str.split("""
    act action add back best body break build call case change char child class close command common count day
    end family field find first follow form full get hand help high host import keep key know last left length
    let line list long look low make man mark mean month name need new next number object old open order pair part
    pass place point port position present public put read real record regular report rest result return right
    round run second see send set short show sign single small start state step stop stream success take task
    time top try use visit want way week win work year
    """)
)
"""What is told. None of them is in the other sentences."""

FILLER = (
    "And so it was.",
    "It was not for us.",
    "They had no more of it.",
    "So we are here.",
    "You may do that too.",
    "And so on and on.",
    "He would not have it.",
    "What is it to them?",
)
"""The sentences that say nothing."""

QUESTION = "The word is"
"""What the word follows, whenever it is told."""


def telling(word: str) -> str:
    """The sentence that tells the word."""
    return f"{QUESTION} {word}."


class RetrievalSequences:
    """Training text of exactly `length` tokens: random sentences that say nothing, of which some tell one word.

    How often it is told is drawn from 2 to all sentences, evenly on a logarithmic scale: many tellings are easily
    learned from, and with few of them the word must be fetched from far away.

    Args:
        tokenizer: makes the tokens.
        length: T + 1, one more token than a sequence predicts.

    Raises:
        ValueError: `length` does not hold two tellings.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self._tokenizer = tokenizer
        self._length = length
        sizes = [len(ids) for ids in tokenizer.encode_batch([f" {sentence}" for sentence in FILLER])]
        needed = 2 * max(len(ids) for ids in tokenizer.encode_batch([f" {telling(word)}" for word in WORDS]))
        if length < needed:
            raise ValueError(
                f"sequences of {length} tokens (train_length and one) do not hold a word twice: give at least {needed}"
            )
        self._num_sentences = math.ceil(length * len(sizes) / sum(sizes))  # about as many as fit

    def draw(self, random: Random) -> list[int]:
        """One sequence."""
        sentence = telling(random.choice(WORDS))
        num_tellings = int(2 * (self._num_sentences / 2) ** random.random())
        tokens: list[int] = []
        sentences: list[str] = []
        while len(tokens) < self._length:
            part = [sentence] * num_tellings + random.choices(FILLER, k=max(self._num_sentences - num_tellings, 0))
            random.shuffle(part)
            sentences += part
            tokens = self._tokenizer.encode(" ".join(sentences))
        return tokens[: self._length]
