import io
import itertools
import threading
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch

from longreach.data.sequences import IGNORED
from longreach.data.stream import READER, StreamBatches, TextStream

LENGTH, BATCH_SIZE = 16, 4


class Numbers:
    """A tokenizer of numbers."""

    eos_id, vocab_size = 0, 50_000

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


class Alone:
    rank, size, processes_here = 0, 1, 1


class Ranks:
    """Some processes, as threads."""

    def __init__(self, size):
        self.size, self._barrier, self._given = size, threading.Barrier(size), {}

    def __getitem__(self, rank):
        one = Alone()
        one.rank, one.size, one.processes_here = rank, self.size, self.size

        def collected(numbers):
            self._barrier.wait(60)
            self._given[rank] = numbers
            self._barrier.wait(60)
            return [self._given[other] for other in range(self.size)]

        one.collected = collected
        return one


def documents(count):
    """Documents of 1 to 40 numbers, all of them different."""
    start = 1
    for number in range(count):
        size = 1 + number * 7 % 40
        yield " ".join(map(str, range(start, start + size)))
        start += size


@pytest.fixture(scope="module")
def stream():
    rows = datasets.Dataset.from_list([{"text": text} for text in [*documents(60), ""]])
    return TextStream("hf:numbers", "fingerprint", lambda: rows.to_iterable_dataset(num_shards=3), "text", 13, None)


MADE = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while MADE:
        MADE.pop().close()
    assert not readers()


def readers():
    return [thread for thread in threading.enumerate() if thread.name == READER]


def batches_of(stream, packing="blocks", seed=0, ranks=None):
    MADE.append(StreamBatches(stream, Numbers(), LENGTH, BATCH_SIZE, seed, packing, ranks or Alone()))
    return MADE[-1]


def listed(sequences):
    return [None if part is None else part.tolist() for part in sequences]


def read(batches, steps, rows=range(BATCH_SIZE)):
    return [listed(batches.rows(step, rows)) for step in steps]


def test_blocks_leave_out_nothing_and_come_in_another_order(stream):
    words = " ".join(documents(60)).split()
    num_sequences = (len(words) + 60 - 1) // LENGTH
    steps = num_sequences // BATCH_SIZE
    read_once = read(batches_of(stream), range(steps))
    targets = np.concatenate([batch[1] for batch in read_once]).ravel()
    numbers = targets[targets > 0]
    assert len(set(numbers)) == len(numbers) > 0.9 * len(words)
    assert targets.size == steps * BATCH_SIZE * LENGTH
    for tokens, following, places in read_once:
        assert places is None
        assert [row[1:] for row in tokens] == [row[:-1] for row in following]
    assert read(batches_of(stream), range(steps)) == read_once
    assert read(batches_of(stream, seed=1), range(steps)) != read_once
    assert numbers.tolist() != sorted(numbers)


def test_packed_documents_of_an_epoch_are_all_documents(stream):
    batches, counts = batches_of(stream, "documents"), {}
    for step in range(60):
        _, targets, places = batches.rows(step, range(BATCH_SIZE))
        assert ((targets != IGNORED) | (targets == IGNORED)).all()
        assert (places[:, 0] == 0).all()
        for number in targets[targets > 0]:
            counts[int(number)] = counts.get(int(number), 0) + 1
    assert set(counts) == set(map(int, " ".join(documents(60)).split()))
    assert max(counts.values()) - min(counts.values()) <= 1  # within one epoch
    assert batches.cut_documents > 0


@pytest.mark.parametrize("packing", ["blocks", "documents"])
@pytest.mark.parametrize("step", [0, 1, 2, 7, 8, 19, 30, 31])
def test_a_stream_goes_on_in_its_midst_to_the_bit(stream, packing, step):
    whole = batches_of(stream, packing)
    expected = read(whole, range(40))
    first = batches_of(stream, packing)
    read(first, range(step))
    file = io.BytesIO()
    torch.save(first.state(step), file)
    file.seek(0)
    again = batches_of(stream, packing)
    again.restore(torch.load(file, weights_only=True))
    assert read(again, range(step, 40)) == expected[step:]
    assert again.cut_documents == whole.cut_documents


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_processes_read_their_rows_of_the_same_batches_and_share_the_work(stream, packing, monkeypatch):
    expected = read(batches_of(stream, packing), range(25))
    ranks, found, tokenized = Ranks(2), {}, []
    encode = Numbers.encode_batch
    monkeypatch.setattr(Numbers, "encode_batch", lambda self, texts: tokenized.extend(texts) or encode(self, texts))

    def work(rank):
        batches = batches_of(stream, packing, ranks=ranks[rank])
        found[rank] = read(batches, range(25), range(2 * rank, 2 * rank + 2)), batches.state(25)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step, parts in enumerate(zip(found[0][0], found[1][0], strict=True)):
        joined = [None if parts[0][n] is None else parts[0][n] + parts[1][n] for n in range(3)]
        assert joined == expected[step]
    assert found[0][1] == found[1][1]
    assert len(set(tokenized)) == 60
    assert tokenized.count(next(documents(1))) <= 3  # once an epoch, not for each process


def test_a_window_with_less_than_a_sequence_waits_for_more(stream):
    targets = np.concatenate([batch[1] for batch in read(batches_of(replace(stream, shuffle_buffer=1)), range(15))])
    numbers = targets[targets > 0]
    assert numbers.size > 0.9 * 15 * BATCH_SIZE * LENGTH
    assert len(set(numbers)) == numbers.size


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": ""}], r"^'hf:numbers' holds no text; name a source with text in it$"),
        ([{"text": "1 2"}, {"text": None}], r"^hf:numbers, row 1 holds NoneType, not text; mend or drop it$"),
        ([{"body": "1 2"}], r"^hf:numbers, row 0 has no text_field='text'; its columns are 'body'"),
    ],
)
def test_what_is_no_text_is_named(stream, rows, message):
    with pytest.raises(ValueError, match=message):
        batches_of(replace(stream, open=datasets.Dataset.from_list(rows).to_iterable_dataset)).rows(
            0, range(BATCH_SIZE)
        )


def test_closed_it_reads_its_window_no_further(stream):
    read_rows = []

    def slow():
        for number in itertools.count(1):
            read_rows.append(number)
            time.sleep(0.05 if number > 200 else 0)
            yield {"text": f"{number} " * 50}

    text = replace(stream, shuffle_buffer=200, open=lambda: datasets.IterableDataset.from_generator(slow))
    batches = batches_of(text)
    batches.rows(0, range(BATCH_SIZE))
    assert readers()
    batches.close()
    count = len(read_rows)
    assert count < 400
    assert not readers()
    time.sleep(0.2)
    assert len(read_rows) == count


def test_a_source_that_breaks_off_is_named(stream):
    def broken():
        yield {"text": "1 2 3"}
        raise ConnectionError("reset by peer\nmore")

    text = replace(stream, open=lambda: datasets.IterableDataset.from_generator(broken))
    with pytest.raises(
        ValueError, match=r"^'hf:numbers' cannot be read on from row 1 \(.*\); run the same command again"
    ):
        batches_of(text).rows(0, range(BATCH_SIZE))


def test_the_state_of_something_else_is_refused(stream):
    with pytest.raises(ValueError, match="it is not the state of a stream"):
        batches_of(stream).restore({})
