"""Text to tokens: documents in batches of pieces, which several processes share where there are many."""

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from longreach.data.corpora import Document
from longreach.data.tokenizer import Tokenizer

# An encoding takes some hundred times the memory of its text, so this bounds it to some hundred MB in each process.
BATCH_CHARS = 1 << 20
PIECE_OVERHEAD_CHARS = 256  # what even the shortest piece costs
FEW = 16  # batches that are sooner encoded here, by the library's threads, than processes have started
MOST_PROCESSES = 32  # reading one text feeds no more

Batch = list[tuple[str, bool]]
"""Pieces of text in order, each with whether it ends its document."""


class Encoded(NamedTuple):
    """The tokens of a batch."""

    tokens: np.ndarray
    """`token_dtype`, [tokens]; behind each document's end stands eos."""
    ends: np.ndarray
    """How many tokens there are up to the end of each document that ends here, eos included, int64 [ends]."""


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 where the vocabulary allows, else uint32."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")


class Encoder:
    """Makes tokens of documents: here, and by processes of its own as soon as there is enough to be worth their start.

    The library has threads too, but what Python adds to its work, tokens as lists, is done by one thread at a time, and
    by that of training at none. What a text becomes does not depend on who encodes it. Whoever has made an
    encoder closes it.

    Args:
        tokenizer: makes the tokens.
        processes_here: how many processes of this machine encode at the same time, which share its cores.
    """

    def __init__(self, tokenizer: Tokenizer, processes_here: int = 1) -> None:
        self._tokenizer = tokenizer
        self._count = max(1, min(_cores() // processes_here, MOST_PROCESSES))
        self._encoded_here = 0
        self._workers: list[_Worker] = []

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """The tokens of all documents in their order, batch by batch, one at least.

        Raises:
            ValueError: the tokenizer fails at a text, or a process is gone.
        """
        batches = _batches_of_pieces(documents)
        for batch in itertools.islice(batches, FEW - self._encoded_here):
            self._encoded_here += 1
            yield _encode(batch, self._tokenizer)
        yield from self._shared_out(batches)

    def _shared_out(self, batches: Iterator[Batch]) -> Iterator[Encoded]:
        """The tokens of each batch in order, made by the processes; each has one batch at a time."""
        idle, at_work = deque(self._workers), deque[_Worker]()
        try:
            for batch in batches:
                if not self._workers:
                    self._workers = _start_workers(self._count, self._tokenizer)
                    idle.extend(self._workers)
                if not idle:
                    idle.append(at_work.popleft())
                    yield idle[0].result()
                at_work.append(idle.popleft())
                at_work[-1].send(batch)
            while at_work:
                yield at_work.popleft().result()
        except BaseException:  # theirs or the reader's: what is under way is nobody's any more
            self.close()
            raise

    def close(self) -> None:
        """End its processes."""
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Worker:
    """A process that encodes, one batch after another, as long as somebody may ask it to."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have the locks of this process's threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # else it would not be seen that the process is gone

    def send(self, given: Tokenizer | Batch) -> None:
        with self._reached():
            self._connection.send(given)

    def result(self) -> Encoded:
        """Of the batch that it was sent."""
        with self._reached():
            found = self._connection.recv()
        if isinstance(found, ValueError):
            raise found
        assert isinstance(found, Encoded)
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise ValueError(
                f"a process that makes tokens ended with status {self._process.exitcode}, as for want of memory; run "
                "the same command again to go on"
            ) from error


def _start_workers(count: int, tokenizer: Tokenizer) -> list[_Worker]:
    """So many processes, which start side by side: what they need is sent when all are under way."""
    resource_tracker.ensure_running()  # which lets signals through again when it has started
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for good in them: Ctrl-C is for this process
    try:
        workers = [_Worker() for _ in range(count)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for worker in workers:
        worker.send(tokenizer)
    return workers


def _work(connection: Connection) -> None:
    """What a process does until nobody is there to ask it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes have the cores
    with contextlib.suppress(EOFError, ConnectionError):
        tokenizer = connection.recv()
        while True:
            batch = connection.recv()
            try:
                found: Encoded | ValueError = _encode(batch, tokenizer)
            except ValueError as error:
                found = error
            connection.send(found)


def _encode(batch: Batch, tokenizer: Tokenizer) -> Encoded:
    tokens: list[int] = []
    ends: list[int] = []
    for ids, (_, ends_document) in zip(tokenizer.encode_batch([piece for piece, _ in batch]), batch, strict=True):
        tokens += ids
        if ends_document:
            tokens.append(tokenizer.eos_id)
            ends.append(len(tokens))
    return Encoded(np.array(tokens, dtype=token_dtype(tokenizer)), np.array(ends, dtype=np.int64))


def _batches_of_pieces(documents: Iterable[Document]) -> Iterator[Batch]:
    """All pieces in batches of bounded size, one at least."""
    batch: Batch = []
    size = 0
    for document in documents:
        for piece in document.pieces:
            cost = len(piece) + PIECE_OVERHEAD_CHARS
            if size + cost > BATCH_CHARS:
                yield batch
                batch, size = [], 0
            batch.append((piece, False))
            size += cost
        batch[-1] = (batch[-1][0], True)  # a document has at least one piece
    yield batch


def _cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
