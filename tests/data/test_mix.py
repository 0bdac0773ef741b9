import numpy as np
import pytest

from longreach.data.mix import MixedBatches, parse_mix
from longreach.data.synthetic import FILLER, QUESTION
from longreach.data.tokens import Batches, TokenStore, TokenStream

LENGTH, BATCH_SIZE = 90, 50


@pytest.fixture(scope="module")
def text(tokenizer):
    """Batches of text that has no capital, with which retrieval sequences begin."""
    tokens = np.array(tokenizer.encode("it was the best of times, it was the worst of times; " * 400), dtype=np.uint16)
    return Batches(TokenStream(TokenStore(tokens, np.array([0, len(tokens)])), [0]), LENGTH, BATCH_SIZE, seed=0)


def synthetic_rows(batch, tokenizer):
    return np.array([tokenizer.decode(row).startswith((*FILLER, QUESTION)) for row in batch])


def test_a_share_of_the_sequences_gives_way_and_the_others_stay(text, tokenizer):
    mixed = MixedBatches(text, ["retrieval=0.2"], tokenizer, seed=0)
    count = 0
    for step in range(40):
        batch = mixed[step]
        assert batch.shape == (BATCH_SIZE, LENGTH + 1)
        assert batch.dtype == np.int64
        synthetic = synthetic_rows(batch, tokenizer)
        assert (batch[~synthetic] == text[step][~synthetic]).all()
        count += synthetic.sum()
    assert 0.16 < count / (40 * BATCH_SIZE) < 0.24  # 0.2 within 4.5 standard deviations


def test_all_may_give_way(text, tokenizer):
    assert synthetic_rows(MixedBatches(text, ["retrieval=1"], tokenizer, seed=0)[3], tokenizer).all()


def test_batches_are_a_pure_function_of_seed_and_step(text, tokenizer):
    mixed = MixedBatches(text, ["retrieval=0.5"], tokenizer, seed=0)
    expected = {step: mixed[step].tolist() for step in range(6)}
    again = MixedBatches(text, ["retrieval=0.5"], tokenizer, seed=0)
    for step in (5, 0, 3, 3):
        assert again[step].tolist() == expected[step]
    assert MixedBatches(text, ["retrieval=0.5"], tokenizer, seed=1)[3].tolist() != expected[3]


def test_sequences_of_all_steps_and_places_differ(text, tokenizer):
    mixed = MixedBatches(text, ["retrieval=1"], tokenizer, seed=0)
    rows = {tuple(row) for step in range(20) for row in mixed[step].tolist()}
    assert len(rows) > 0.99 * 20 * BATCH_SIZE  # those that hardly tell anything else may come again


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (["recall=0.2"], r"^mix='recall=0.2': give NAME=SHARE, as in retrieval=0.2; names are retrieval$"),
        (["retrieval"], r"^mix='retrieval': give a share"),
        (["retrieval=a fifth"], r"^mix='retrieval=a fifth': give a share"),
        (["retrieval=0"], "more than 0 and at most 1"),
        (["retrieval=1.01"], "more than 0 and at most 1"),
        (["retrieval=nan"], "more than 0 and at most 1"),
        (["retrieval=0.1", "retrieval=0.2"], r"^mix=retrieval=0.1,retrieval=0.2: give retrieval once$"),
    ],
)
def test_mistakes_are_named(mix, message):
    with pytest.raises(ValueError, match=message):
        parse_mix(mix)


def test_shares_are_read():
    assert parse_mix([]) == {}
    assert parse_mix(("retrieval=0.25",)) == {"retrieval": 0.25}


def test_sequences_too_short_for_what_is_mixed_in_are_refused(tokenizer):
    store = TokenStore(np.arange(100, dtype=np.uint16), np.array([0, 100]))
    batches = Batches(TokenStream(store, [0]), 4, 2, seed=0)
    with pytest.raises(ValueError, match=r"^mix=retrieval=0.2: sequences of 5 tokens"):
        MixedBatches(batches, ["retrieval=0.2"], tokenizer, seed=0)
