"""Text that is larger than memory and disk: read, shuffled and tokenized while training goes on, from where it was."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from longreach.data.batches import BatchSource
from longreach.data.corpora import Corpus, Document, cut_text, find_hugging_face, rows_of, text_of_row
from longreach.data.encoding import Encoder
from longreach.data.sequences import Blocks, PackedDocuments, Packing, Sequences
from longreach.data.tokenizer import Tokenizer
from longreach.data.tokens import TokenStore, TokenStream, tokenize_in_memory
from longreach.files import digest_of
from longreach.foreign import first_line

WINDOW_CHARS = 64_000_000
"""Text of a window that no further document is added to: some hundred MB of memory."""


SILENCE = 10.0
"""Seconds that a reader's end waits for a server that says nothing."""

READER = "reader of a stream"
"""The name of its thread."""

Item = TypeVar("Item")


class Sharing(Protocol):
    """The processes that read a text together."""

    rank: int
    """The number of this one."""
    size: int
    """How many there are."""

    @property
    def processes_here(self) -> int:
        """How many of them are on this machine."""

    def collected(self, numbers: np.ndarray) -> list[np.ndarray]:
        """What each process has, int64 [...], by rank; all of them must call it."""
        ...


class Place(NamedTuple):
    """Where reading stands."""

    epoch: int
    row: int
    """Of the data set, within the epoch."""
    state: Any
    """Of the data set, as it says itself where it stands; None at its beginning."""


BEGINNING = Place(0, 0, None)


@dataclass(frozen=True)
class TextStream:
    """The training text of a Hugging Face data set, of which nothing is kept."""

    source: str
    """As the user named it."""
    fingerprint: str
    """Of the data set's name, files and their revision, not of its text; and of how it is read."""
    open: Callable[[], Any]
    """Gives the data set, an IterableDataset, at its beginning."""
    text_field: str
    shuffle_buffer: int
    """Documents of a window."""
    validation: Corpus | None
    """The validation split that comes with it."""

    def texts(self, place: Place = BEGINNING) -> Iterator[tuple[str, Place]]:
        """The documents from a place on, without an end, each with the place behind it.

        Raises:
            ValueError: the data set cannot be read, or a row of it has no text, or none has any.
        """
        epoch, number, state = place
        while True:
            rows = self.open()
            if state is not None:
                rows.load_state_dict(state)
            empty = state is None
            reading = iter(rows)
            while (row := self._next(reading, number)) is not None:
                text = text_of_row(row, f"{self.source}, row {number}", self.text_field)
                number += 1
                if text:
                    empty = False
                    yield text, Place(epoch, number, rows.state_dict())
            if empty:
                raise ValueError(f"{self.source!r} holds no text; name a source with text in it")
            epoch, number, state = epoch + 1, 0, None

    def _next(self, reading: Iterator[dict[str, Any]], number: int) -> dict[str, Any] | None:
        try:
            return next(reading, None)
        except Exception as error:  # whatever a network and others' files lead to
            reason = f"{self.source!r} cannot be read on from row {number} ({first_line(error)})"
            raise ValueError(f"{reason}; run the same command again to go on") from error


def open_stream(source: str, text_field: str, shuffle_buffer: int) -> TextStream:
    """The stream that `hf:NAME[:CONFIG]` names.

    Raises:
        ValueError: there is no such data set, or `datasets` is not installed.
    """
    found = find_hugging_face(source, streaming=True)
    splits, validation = found.splits(), None
    if "validation" in splits:
        validation = rows_of(splits["validation"], f"{source} (validation)", text_field)
    fingerprint = digest_of(found.fingerprint, text_field)
    return TextStream(source, fingerprint, lambda: found.splits()["train"], text_field, shuffle_buffer, validation)


class _Window(NamedTuple):
    """Some documents of a stream as training reads them."""

    before: dict[str, Any]
    """What `StreamBatches` went on from to read it, plain values."""
    text: Blocks | PackedDocuments
    order: np.ndarray
    """Numbers of its sequences, in the order in which they are read."""

    @property
    def first(self) -> int:
        """Number of its first sequence in the whole run."""
        return int(self.before["first"])

    @property
    def end(self) -> int:
        """Number of the sequence behind its last."""
        return self.first + len(self.order)


class StreamBatches(BatchSource):
    """Batches of a stream: a function of the seed and the step, but to be read in order, or on from a `state`.

    The stream is read in windows of `shuffle_buffer` documents. Within a window the documents are shuffled, and the
    sequences that they are cut into or packed into are shuffled once more; a batch takes the next sequences. What is
    left over of a window in blocks begins the next one, so that nothing is left out. While one window is trained on,
    a thread reads the next, and processes of its own tokenize this one's share of it.

    Args:
        text: the stream.
        tokenizer: makes the tokens.
        length: tokens that a sequence predicts, T.
        batch_size: sequences in a batch, B.
        seed: of the orders.
        packing: what sequences are.
        ranks: the processes that train together, all of which take the same steps.
    """

    def __init__(
        self,
        text: TextStream,
        tokenizer: Tokenizer,
        length: int,
        batch_size: int,
        seed: int,
        packing: Packing,
        ranks: Sharing,
    ) -> None:
        self.description = f"streaming {text.source}, shuffled among {text.shuffle_buffer:,} documents"
        self._text, self._tokenizer, self._length = text, tokenizer, length
        self._batch_size, self._seed, self._packing, self._ranks = batch_size, seed, packing, ranks
        self._windows: deque[_Window] = deque()
        self._next: dict[str, Any] = {
            "window": 0,
            "first": 0,
            "rest": [],
            "cut": 0,
            "epoch": 0,
            "row": 0,
            "place": None,
        }
        self._reader: _Reader | None = None

    def rows(self, step: int, rows: range) -> Sequences:
        """The sequences in these places of the batch of training step `step`, none before the last one asked for."""
        first = step * self._batch_size
        while self._next["first"] < first + self._batch_size:  # the same on all processes, whatever rows they want
            self._append()
        while self._windows[0].end <= first:
            self._windows.popleft()
        numbers = first + np.array(rows)
        parts = [
            window.text.read(window.order[numbers[(numbers >= window.first) & (numbers < window.end)] - window.first])
            for window in self._windows
            if window.first <= numbers[-1] and window.end > numbers[0]
        ]
        places = [part.places for part in parts if part.places is not None]
        return Sequences(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.targets for part in parts]),
            np.concatenate(places) if places else None,
        )

    def state(self, step: int) -> dict[str, Any]:
        """What it takes to go on with step `step`, which is the next."""
        first = step * self._batch_size
        return next((window.before for window in self._windows if window.end > first), self._next)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, before any rows were read."""
        if set(state) != set(self._next):
            raise ValueError("it is not the state of a stream")
        self._next = dict(state)

    def close(self) -> None:
        """End what reads ahead, within `SILENCE` seconds."""
        if self._reader is not None:
            self._reader.close()

    def _append(self) -> None:
        """Take the window that was read meanwhile; the one behind it is then begun."""
        before = self._next
        if self._reader is None:
            place = Place(before["epoch"], before["row"], before["place"])
            self._reader = _Reader(self._text, place, self._tokenizer, self._ranks)
        share, count, behind = self._reader.next()
        store = self._put_together(share, count)
        after = {**before, "window": before["window"] + 1}
        after |= {"epoch": behind.epoch, "row": behind.row, "place": behind.state}
        random = np.random.default_rng([self._seed, before["window"]])
        documents = random.permutation(count)
        text: Blocks | PackedDocuments
        if self._packing == "documents":
            text = PackedDocuments(TokenStream(store, documents), self._length, self._tokenizer.eos_id)
            after["cut"] += text.cut_documents
        else:
            stream = TokenStream(_behind(before["rest"], store), [0, *(documents + 1)])
            if len(stream) <= self._length:  # all of it waits for more
                self._next = after | {"rest": stream.read(0, len(stream)).tolist()}
                return
            text = Blocks(stream, self._length)
            after["rest"] = stream.read(len(text) * self._length, len(stream)).tolist()
        self._windows.append(_Window(before, text, random.permutation(len(text))))
        self._next = after | {"first": self._windows[-1].end}

    @property
    def cut_documents(self) -> int | None:
        """As `BatchSource` has it, of what was read until now."""
        return int(self._next["cut"]) if self._packing == "documents" else None

    def _put_together(self, share: TokenStore, count: int) -> TokenStore:
        """All so many documents of a window, in their order, of those that each process has tokenized."""
        if self._ranks.size == 1:
            return share
        sizes = self._ranks.collected(np.diff(share.offsets))
        tokens = self._ranks.collected(share.tokens.astype(np.int64))
        parts = [np.split(one, np.cumsum(of_one)[:-1]) for one, of_one in zip(tokens, sizes, strict=True)]
        documents = [parts[number % self._ranks.size][number // self._ranks.size] for number in range(count)]
        return TokenStore(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))


class _Reader:
    """The windows of a stream, one read ahead in a thread, and this process's share of each as tokens."""

    def __init__(self, text: TextStream, place: Place, tokenizer: Tokenizer, ranks: Sharing) -> None:
        self._ranks, self._encoder = ranks, Encoder(tokenizer, ranks.processes_here)
        self._closed = threading.Event()
        self._windows = _windows(self._wanted(text.texts(place)), place, text.shuffle_buffer)
        self._ahead = self._begin()

    def next(self) -> tuple[TokenStore, int, Place]:
        """The share of the next window, how many documents that has in all, and the place behind it."""
        window = self._ahead.result()
        self._ahead = self._begin()
        return window

    def close(self) -> None:
        """End the thread, which Python at its own end would stop within others' code, and that ends in an abort."""
        self._closed.set()
        wait([self._ahead], SILENCE)
        self._encoder.close()

    def _begin(self) -> Future[tuple[TokenStore, int, Place]]:
        ahead: Future[tuple[TokenStore, int, Place]] = Future()

        def read() -> None:
            try:
                texts, behind = next(self._windows)
                share = self._wanted(texts[self._ranks.rank :: self._ranks.size])
                store = tokenize_in_memory((Document("", cut_text(text)) for text in share), self._encoder)
                ahead.set_result((store, len(texts), behind))
            except BaseException as error:
                ahead.set_exception(error)

        threading.Thread(target=read, name=READER, daemon=True).start()  # daemon: a silent server is not waited for
        return ahead

    def _wanted(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            if self._closed.is_set():
                raise RuntimeError("nobody reads on")
            yield item


def _windows(texts: Iterator[tuple[str, Place]], place: Place, size: int) -> Iterator[tuple[list[str], Place]]:
    """Documents from a place on in windows of at most `size`, each of one epoch, with the place behind it."""
    window: list[str] = []
    chars = 0
    for text, behind in texts:
        if window and behind.epoch != place.epoch:
            yield window, Place(behind.epoch, 0, None)
            window, chars = [], 0
        place = behind
        window.append(text)
        chars += len(text)
        if len(window) == size or chars >= WINDOW_CHARS:
            yield window, behind
            window, chars = [], 0


def _behind(rest: list[int], store: TokenStore) -> TokenStore:
    """A store with one more document, of these tokens, before all others."""
    tokens = np.concatenate([np.array(rest, dtype=store.tokens.dtype), store.tokens])
    return replace(store, tokens=tokens, offsets=np.concatenate([[0], store.offsets + len(rest)]))
