import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import stream_of

from longreach.data.batches import Batches
from longreach.data.sequences import IGNORED, Blocks, PackedDocuments

EOS = 0


def blocks_of(num_tokens: int, length: int) -> Blocks:
    tokens = list(range(num_tokens))  # every token names its place
    return Blocks(stream_of(tokens[: num_tokens // 3], tokens[num_tokens // 3 :]), length)


class Whole:
    """Batches, each as every sequence and the token after it, [B, T + 1]."""

    def __init__(self, num_tokens: int, length: int, batch_size: int, seed: int = 0):
        self.batches, self.batch_size = Batches(blocks_of(num_tokens, length), batch_size, seed), batch_size

    def __getitem__(self, step):
        tokens, targets, places = self.batches.rows(step, range(self.batch_size))
        assert places is None
        assert (tokens[:, 1:] == targets[:, :-1]).all()
        return np.concatenate([tokens, targets[:, -1:]], axis=1)


@settings(deadline=None)
@given(num_tokens=st.integers(12, 300), length=st.integers(1, 9), batch_size=st.integers(1, 7), seed=st.integers(0, 99))
def test_each_block_is_seen_once_per_epoch(num_tokens, length, batch_size, seed):
    batches = Whole(num_tokens, length, batch_size, seed)
    num_blocks = (num_tokens - 1) // length
    assert batches.batches.steps_per_epoch == num_blocks / batch_size
    sequences = np.concatenate([batches[step] for step in range(-(-3 * num_blocks // batch_size))])
    assert sequences.dtype == np.int64
    assert (np.diff(sequences, axis=1) == 1).all()  # consecutive tokens, so targets are inputs one further
    assert sequences.shape[1] == length + 1
    for epoch in range(3):
        starts = sequences[epoch * num_blocks : (epoch + 1) * num_blocks, 0]
        assert sorted(starts) == [block * length for block in range(num_blocks)]


def test_batches_are_a_pure_function_of_seed_and_step():
    forwards = Whole(1000, 10, 8)
    expected = {step: forwards[step].tolist() for step in range(60)}
    for step in (59, 3, 30, 13, 12, 3, 0, 45):  # any order, over epochs
        assert Whole(1000, 10, 8)[step].tolist() == expected[step]
        assert forwards[step].tolist() == expected[step]


def test_epochs_and_seeds_are_ordered_differently():
    first, second = (Whole(1001, 10, 100)[epoch].tolist() for epoch in (0, 1))
    other_seed = Whole(1001, 10, 100, seed=1)[0].tolist()
    assert first != second
    assert first != other_seed
    assert sorted(first) == sorted(second) == sorted(other_seed)


def test_a_batch_may_be_larger_than_an_epoch():
    batch = Whole(7, 2, 7)[0]
    assert sorted(batch[:3, 0]) == sorted(batch[3:6, 0]) == [0, 2, 4]


def test_too_little_text_is_refused():
    assert Whole(9, 8, 1)[0].tolist() == [list(range(9))]
    with pytest.raises(
        ValueError, match=r"^train_length=9 needs 10 tokens, the training text has 9; give more text, or fewer$"
    ):
        blocks_of(9, 9)
    with pytest.raises(ValueError, match="the training text has no token; give some text"):
        PackedDocuments(stream_of([EOS], [EOS]), 4, EOS)


def texts(lengths):
    """Documents of so many tokens and eos, all tokens different."""
    start = 1
    for length in lengths:
        yield [*range(start, start + length), EOS]
        start += length


def pieces_of(packed):
    """All documents that the sequences hold, (row, tokens, targets) each, without what predicts nothing."""
    tokens, targets, places = packed.read(np.arange(len(packed)))
    for row in range(len(packed)):
        starts = np.flatnonzero(places[row] == 0)
        for part in np.split(np.arange(packed._length), starts[1:]):
            assert (places[row, part] == np.arange(len(part))).all()
            counted = targets[row, part] != IGNORED
            assert counted.all() or not counted.any()
            if counted.any():
                yield row, tokens[row, part].tolist(), targets[row, part].tolist()
            else:
                assert part[-1] == packed._length - 1  # what is left of a sequence is at its end


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 25), min_size=1, max_size=30), length=st.integers(1, 12))
def test_every_token_of_every_document_is_predicted_once_from_its_own_text(lengths, length):
    lengths = [*lengths, 3]
    packed = PackedDocuments(stream_of(*texts(lengths)), length, EOS)
    found = sorted((targets, tokens) for _, tokens, targets in pieces_of(packed))
    expected = []
    for text in texts(lengths):
        before = [EOS, *text]
        expected += [
            (text[start : start + length], before[start : min(start + length, len(text))])
            for start in range(0, len(text), length)
            if len(text) > 1
        ]
    assert found == sorted(expected)
    assert packed.cut_documents == sum(n + 1 > length for n in lengths if n)


def test_documents_go_where_the_least_room_is_left():
    packed = PackedDocuments(stream_of(*texts([5, 1, 2, 7, 1, 3, 18])), 10, EOS)
    rows = {}
    for row, _, targets in pieces_of(packed):
        rows.setdefault(row, []).append(len(targets))
    # 18 and its eos are 10 and 9; then 8, 6, 4, 3, 2, 2 follow: 8 opens a row, as 6 does, 4 fills it up, 3 opens one.
    assert sorted(map(sorted, rows.values())) == [[2, 3], [2, 8], [4, 6], [9], [10]]
    assert packed.description == (
        "packed 7 documents into 5 sequences of 10 tokens, 88.0% filled; 1 longer than that cut into pieces"
    )


def test_packed_batches_are_a_function_of_seed_and_step_and_hold_every_sequence_once():
    packed = PackedDocuments(stream_of(*texts(range(1, 60))), 16, EOS)
    batches = Batches(packed, 4, seed=3)
    rows = [batches.rows(step, range(4)) for step in range(-(-len(packed) // 4))]
    again = Batches(packed, 4, seed=3).rows(5, range(2, 4))
    assert all((one == other[2:4]).all() for one, other in zip(again, rows[5], strict=True))
    seen = np.concatenate([batch.targets for batch in rows])[: len(packed)]
    assert sorted(seen.tolist()) == sorted(packed.read(np.arange(len(packed))).targets.tolist())
