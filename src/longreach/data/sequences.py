"""The sequences of T tokens that training reads a text as: blocks of all its tokens, or whole documents packed."""

from bisect import bisect_left, insort
from typing import Literal, NamedTuple

import numpy as np

from longreach.data.tokens import TokenStream

Packing = Literal["blocks", "documents"]

IGNORED = -100
"""The target of what predicts nothing, as PyTorch's cross-entropy has it."""


class Sequences(NamedTuple):
    """Some training sequences of T tokens."""

    tokens: np.ndarray
    """int64 [rows, T]."""
    targets: np.ndarray
    """The token after each, int64 [rows, T]; `IGNORED` where there is none."""
    places: np.ndarray | None = None
    """The place of each token in its document, int64 [rows, T], where several are packed, none of which may see
    another: one begins at each 0. None where a sequence is one text."""

    @classmethod
    def of_blocks(cls, blocks: np.ndarray) -> "Sequences":
        """Consecutive tokens [rows, T + 1] as sequences that each are one text."""
        return cls(blocks[:, :-1], blocks[:, 1:])


class Blocks:
    """Every T tokens of a text, whatever documents they are of; those left over at its end are not used.

    Args:
        stream: the text.
        length: T.

    Raises:
        ValueError: the text holds less than one block and the token after it.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        if len(stream) < length + 1:
            raise ValueError(
                f"train_length={length} needs {length + 1} tokens, the training text has {len(stream)}; "
                "give more text, or fewer"
            )
        self._stream = stream
        self._length = length

    description = ""
    cut_documents = None

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._length  # each target block needs the token after its last

    def read(self, numbers: np.ndarray) -> Sequences:
        """The blocks of these numbers, in their order."""
        starts = numbers * self._length
        return Sequences.of_blocks(np.stack([self._stream.read(start, start + self._length + 1) for start in starts]))


class PackedDocuments:
    """Whole documents packed into sequences of T tokens, none of which sees another.

    Each is preceded by the eos that ends documents, from which alone its first token is predicted; so all of its tokens
    are predicted once, its own eos too. A document that is longer than T is cut into pieces of T predicted tokens and
    a rest, each preceded by the token before it, but without the context before that: no text is left out. What is
    shorter than T goes, the longest first, where the least room is left that it fits in (best fit decreasing). The room
    that is left in the end predicts nothing.

    Args:
        stream: the text, whose documents are packed.
        length: T.
        eos_id: the token that ends documents.

    Raises:
        ValueError: no document has any token.
    """

    def __init__(self, stream: TokenStream, length: int, eos_id: int) -> None:
        self._stream, self._length, self._eos_id = stream, length, eos_id
        starts, sizes = stream.starts[:-1], np.diff(stream.starts)
        starts, sizes = starts[sizes > 1], sizes[sizes > 1]  # of nothing but its eos there is nothing to learn
        if not len(sizes):
            raise ValueError("the training text has no token; give some text")
        self._num_documents, self._num_targets = len(sizes), int(sizes.sum())
        self.cut_documents = int((sizes > length).sum())
        counts = -(-sizes // length)
        document = np.repeat(np.arange(len(sizes)), counts)  # [pieces]
        done = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
        self._starts = starts[document] + done  # of the predicted tokens of each piece
        self._is_first = done == 0
        self._sizes = np.minimum(sizes[document] - done, length)
        row = _best_fit(self._sizes, length)
        self._pieces = np.argsort(row, kind="stable")  # row by row
        self._borders = np.searchsorted(row[self._pieces], np.arange(row.max() + 2))  # [rows + 1]

    def __len__(self) -> int:
        return len(self._borders) - 1

    @property
    def description(self) -> str:
        """What became of the documents."""
        filled = self._num_targets / (len(self) * self._length)
        return (
            f"packed {self._num_documents:,} documents into {len(self):,} sequences of {self._length:,} tokens, "
            f"{100 * filled:.1f}% filled; {self.cut_documents:,} longer than that cut into pieces"
        )

    def read(self, numbers: np.ndarray) -> Sequences:
        """The sequences of these numbers, in their order."""
        shape = len(numbers), self._length
        tokens, targets = np.full(shape, self._eos_id), np.full(shape, IGNORED)
        places = np.empty(shape, dtype=np.int64)
        for row, number in enumerate(numbers):
            self._fill(number, tokens[row], targets[row], places[row])
        return Sequences(tokens, targets, places)

    def _fill(self, number: int, tokens: np.ndarray, targets: np.ndarray, places: np.ndarray) -> None:
        end = 0
        for piece in self._pieces[self._borders[number] : self._borders[number + 1]]:
            begin, end = end, end + int(self._sizes[piece])
            start = int(self._starts[piece])
            targets[begin:end] = self._stream.read(start, start + end - begin)
            tokens[begin + 1 : end] = targets[begin : end - 1]
            if not self._is_first[piece]:
                tokens[begin] = self._stream.read(start - 1, start)[0]
            places[begin:end] = np.arange(end - begin)
        places[end:] = np.arange(len(places) - end)


def _best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """The row that each piece goes to, int64 [pieces], best fit decreasing, in rows of so much room."""
    rows = np.empty(len(sizes), dtype=np.int64)
    by_room: dict[int, list[int]] = {}  # room that is left -> the rows that have it
    rooms: list[int] = []  # its keys in order
    count = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, left = count, room - size
            count += 1
        else:
            left = rooms[at] - size
            row = by_room[rooms[at]].pop()
            if not by_room[rooms[at]]:
                del by_room[rooms.pop(at)]
        rows[piece] = row
        if left:
            if left not in by_room:
                insort(rooms, left)
                by_room[left] = []
            by_room[left].append(row)
    return rows
