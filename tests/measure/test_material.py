from types import SimpleNamespace

import numpy as np
import pytest
from tiny_subjects import tokenizer

from longreach.data.corpora import Document
from longreach.data.encoding import Encoder
from longreach.data.tokens import TokenStream, tokenize_in_memory
from longreach.measure.material import text_of
from longreach.measure.plan import EvaluateConfig

DOCUMENTS = ("the sum of 1\nand 2", "is 3,\n\nthe sum", "of 4")


def prepared():
    """The validation text of a run, as far as a text is made of it."""
    store = tokenize_in_memory([Document("", iter([text])) for text in DOCUMENTS], Encoder(tokenizer()))
    return SimpleNamespace(valid=TokenStream(store, range(len(DOCUMENTS))), tokenizer=tokenizer())


def test_bytes_and_words_are_those_of_the_scored_tokens():
    text = text_of(prepared(), EvaluateConfig(valid_tokens=1000, word_level=True), longest=4)
    first = tokenizer().decode(text.tokens[:1])
    assert DOCUMENTS[0].startswith(first)
    assert " " not in first
    assert text.num_targets == len(prepared().valid) - 1
    assert text.num_bytes == sum(map(len, DOCUMENTS)) - len(first)
    # the sum of 1 <eos> and 2, is 3, <eos> <eos> the sum, of 4: the end of a document ends its word, and is none itself
    begun = 0 if first == "the" else 1
    assert text.num_words == begun + 6 + 6 + 2
    assert text_of(prepared(), EvaluateConfig(), longest=4).num_words is None


def test_no_more_is_scored_than_asked_for_but_a_whole_window():
    for asked, longest, scored in ((6, 4, 6), (6, 9, 9), (6, 0, 6)):
        text = text_of(prepared(), EvaluateConfig(valid_tokens=asked), longest)
        assert np.array_equal(text.tokens, prepared().valid.read(0, scored + 1))


def test_a_text_that_is_shorter_than_a_window_is_refused():
    available = len(prepared().valid) - 1
    text_of(prepared(), EvaluateConfig(), longest=available)
    with pytest.raises(
        ValueError, match=rf"^valid_lengths={available + 1}: the validation text has {available} tokens"
    ):
        text_of(prepared(), EvaluateConfig(), longest=available + 1)
    asked = EvaluateConfig(tasks=("positions",), valid_lengths=(2,))
    with pytest.raises(ValueError, match=rf"^tasks=positions take a window of the training length, {available + 1}: "):
        text_of(prepared(), asked, longest=available + 1)
