import numpy as np
import pytest

from longreach.data.batches import Batches
from longreach.data.mix import MixedBatches, parse_mix
from longreach.data.sequences import Blocks, PackedDocuments
from longreach.data.synthetic import FILLER, QUESTION
from longreach.data.tokens import TokenStore, TokenStream

LENGTH, BATCH_SIZE = 90, 50


@pytest.fixture(scope="module")
def text(tokenizer):
    """Batches of text that has no capital, with which retrieval sequences begin."""
    tokens = np.array(tokenizer.encode("it was the best of times, it was the worst of times; " * 400), dtype=np.uint16)
    stream = TokenStream(TokenStore(tokens, np.array([0, len(tokens)])), [0])
    return Batches(Blocks(stream, LENGTH), BATCH_SIZE, seed=0)


def batch_of(batches, step):
    """Each sequence of a batch and the token after it, [B, T + 1]."""
    tokens, targets, _ = batches.rows(step, range(BATCH_SIZE))
    return np.concatenate([tokens, targets[:, -1:]], axis=1)


def mixed_of(text, mix, tokenizer, seed=0):
    return MixedBatches(text, LENGTH, mix, tokenizer, seed)


def synthetic_rows(batch, tokenizer):
    return np.array([tokenizer.decode(row).startswith((*FILLER, QUESTION)) for row in batch])


def test_a_share_of_the_sequences_gives_way_and_the_others_stay(text, tokenizer):
    mixed = mixed_of(text, ["retrieval=0.2"], tokenizer)
    count = 0
    for step in range(40):
        batch = batch_of(mixed, step)
        assert batch.shape == (BATCH_SIZE, LENGTH + 1)
        assert batch.dtype == np.int64
        synthetic = synthetic_rows(batch, tokenizer)
        assert (batch[~synthetic] == batch_of(text, step)[~synthetic]).all()
        count += synthetic.sum()
    assert 0.16 < count / (40 * BATCH_SIZE) < 0.24  # 0.2 within 4.5 standard deviations


def test_all_may_give_way(text, tokenizer):
    assert synthetic_rows(batch_of(mixed_of(text, ["retrieval=1"], tokenizer), 3), tokenizer).all()


def test_batches_are_a_pure_function_of_seed_and_step(text, tokenizer):
    mixed = mixed_of(text, ["retrieval=0.5"], tokenizer)
    expected = {step: batch_of(mixed, step).tolist() for step in range(6)}
    again = mixed_of(text, ["retrieval=0.5"], tokenizer)
    for step in (5, 0, 3, 3):
        assert batch_of(again, step).tolist() == expected[step]
    assert batch_of(mixed_of(text, ["retrieval=0.5"], tokenizer, seed=1), 3).tolist() != expected[3]


def test_sequences_of_all_steps_and_places_differ(text, tokenizer):
    mixed = mixed_of(text, ["retrieval=1"], tokenizer)
    rows = {tuple(row) for step in range(20) for row in batch_of(mixed, step).tolist()}
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
    batches = Batches(Blocks(TokenStream(store, [0]), 4), 2, seed=0)
    with pytest.raises(ValueError, match=r"^mix=retrieval=0.2: sequences of 5 tokens"):
        MixedBatches(batches, 4, ["retrieval=0.2"], tokenizer, seed=0)


def test_a_synthetic_sequence_among_packed_documents_is_one_document(tokenizer):
    tokens = np.array([*tokenizer.encode("it was the best of times, "), tokenizer.eos_id] * 300, dtype=np.uint16)
    ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    stream = TokenStream(TokenStore(tokens, np.array([0, *ends])), range(300))
    packed = Batches(PackedDocuments(stream, LENGTH, tokenizer.eos_id), BATCH_SIZE, seed=0)
    mixed = MixedBatches(packed, LENGTH, ["retrieval=0.5"], tokenizer, seed=0)
    synthetic = synthetic_rows(batch_of(mixed, 0), tokenizer)
    assert synthetic.any()
    batch, text = mixed.rows(0, range(BATCH_SIZE)), packed.rows(0, range(BATCH_SIZE))
    assert (batch.places[synthetic] == np.arange(LENGTH)).all()
    assert (batch.targets[synthetic] >= 0).all()
    assert all((one[~synthetic] == other[~synthetic]).all() for one, other in zip(batch, text, strict=True))
