"""Tokens on disk: one memory-mapped array, read as if documents were one sequence."""

import errno
import functools
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longreach.data.cache import cached
from longreach.data.corpora import Corpus, Document, ReadProgress, Scan, reread
from longreach.data.tokenizer import Tokenizer

STORE_VERSION = 1
BYTES_OF_A_TOKEN = 8  # of text, seldom more on average
# An encoding takes some hundred times the memory of its text, so this bounds tokenizing to some hundred MB.
BATCH_CHARS = 1 << 21
PIECE_OVERHEAD_CHARS = 256  # what even the shortest piece costs


@dataclass(frozen=True)
class TokenStore:
    """All documents of a corpus as tokens, each followed by eos, memory-mapped and read-only."""

    tokens: np.ndarray
    """uint16 where the vocabulary allows, else uint32, [tokens]."""
    offsets: np.ndarray
    """int64 [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]], its eos included."""

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document and its eos, without copying them."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def tokenize(
    corpus: Corpus,
    scan: Scan,
    tokenizer: Tokenizer,
    cache: Path,
    progress: ReadProgress = lambda bytes_read: None,
) -> TokenStore:
    """The tokens of `corpus` from the folder `cache`, computed first where they are not there.

    Entries are found by the content of the corpus and of the tokenizer. Memory use does not grow with the
    corpus, but for 16 bytes a document; several processes may do the same at once.

    Args:
        corpus: the documents.
        scan: what `corpora.scan(corpus)` found.
        tokenizer: the tokenizer.
        cache: a folder, made if need be.
        progress: told how many bytes of text have been read.

    Raises:
        ValueError: the text changed since it was scanned.
        OSError: `cache` cannot be written or its disk is full.
    """
    meta = _meta(scan, tokenizer)

    def build(folder: Path) -> None:
        if shutil.disk_usage(folder).free < _dtype(tokenizer).itemsize * scan.sizes.sum() // BYTES_OF_A_TOKEN:
            raise OSError(errno.ENOSPC, "too little room for its tokens")  # before hours of work, not after them
        documents = reread(corpus, scan, progress)
        with open(folder / "tokens.bin", "wb") as file:
            offsets = _tokens_to(
                lambda ids: file.write(np.array(ids, dtype=_dtype(tokenizer)).tobytes()), documents, tokenizer
            )
        np.save(folder / "offsets.npy", offsets)
        (folder / "meta.json").write_text(json.dumps(meta))

    return cached(_entry(scan, tokenizer, cache), functools.partial(_open_store, meta=meta), build)


def find_tokens(scan: Scan, tokenizer: Tokenizer, cache: Path) -> TokenStore | None:
    """What `tokenize` gives, if the folder `cache` has it."""
    return _open_store(_entry(scan, tokenizer, cache), _meta(scan, tokenizer))


def tokenize_in_memory(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
    """The tokens of a few documents."""
    tokens = array("q")
    offsets = _tokens_to(tokens.extend, documents, tokenizer)
    return TokenStore(np.array(tokens, dtype=_dtype(tokenizer)), offsets)


def _entry(scan: Scan, tokenizer: Tokenizer, cache: Path) -> Path:
    return cache / f"tokens-{scan.fingerprint[:16]}-{tokenizer.fingerprint[:16]}"


def _meta(scan: Scan, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that an entry must agree with."""
    return {
        "version": STORE_VERSION,
        "corpus": scan.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "dtype": _dtype(tokenizer).name,
        "documents": len(scan.sizes),
    }


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")


def _tokens_to(write: Callable[[list[int]], object], documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Hand on the tokens of all documents, piece by piece; returns the documents' offsets."""
    offsets = array("q", [0])
    written = 0
    for ids, ends_document in _encode(documents, tokenizer):
        write(ids)
        written += len(ids)
        if ends_document:
            offsets.append(written)
    return np.array(offsets, dtype=np.int64)


def _encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """The tokens of each piece, and whether it ends its document, which eos then follows."""
    for batch in _batches_of_pieces(documents):
        encoded = tokenizer.encode_batch([piece for piece, _ in batch])
        for ids, (_, ends_document) in zip(encoded, batch, strict=True):
            yield [*ids, tokenizer.eos_id] if ends_document else ids, ends_document


def _batches_of_pieces(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in order, each with whether it ends its document, in batches of bounded size."""
    batch: list[tuple[str, bool]] = []
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


def _open_store(folder: Path, meta: dict[str, Any]) -> TokenStore | None:
    """The store in `folder`, or None where it is absent, damaged, or not the one that `meta` describes."""
    try:
        if json.loads((folder / "meta.json").read_text()) != meta:
            return None
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if offsets.shape != (meta["documents"] + 1,) or offsets[0] != 0 or offsets[-1] != len(tokens):
        return None
    return TokenStore(tokens, offsets)


class TokenStream:
    """Documents one after another as one sequence of tokens, read piecewise from the store.

    Args:
        store: where they lie.
        document_ids: which, and in which order.
    """

    def __init__(self, store: TokenStore, document_ids: Sequence[int] | np.ndarray) -> None:
        self._store = store
        self._document_ids = np.asarray(document_ids, dtype=np.int64)  # [documents]
        lengths = np.diff(store.offsets)[self._document_ids]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)  # [documents + 1], in the stream

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins in the sequence, and where the last one ends, int64 [documents + 1]."""
        return self._starts

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` (exclusive) of the sequence, int64 [stop - start].

        Raises:
            ValueError: that range is not within the sequence.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start={start}, stop={stop}: outside of a stream of {len(self)} tokens")
        tokens = np.empty(stop - start, dtype=np.int64)
        position = start
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while position < stop:
            document = self._store.document(self._document_ids[index])
            part = document[position - self._starts[index] :][: stop - position]
            tokens[position - start : position - start + len(part)] = part
            position += len(part)
            index += 1
        return tokens


def split_documents(sizes: np.ndarray, valid_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which documents train and which validate: (train_ids, valid_ids), each int64 and in shuffled order.

    The documents are shuffled by `seed`. From the front, those no larger than the validation share of all bytes
    go to validation until it has that share; one document thus never takes most of the text from training, and
    validation gets less than twice its share. Where every document is larger than the share, the smallest
    validates. At least one document is left on each side.

    Args:
        sizes: bytes of each document, [documents].
        valid_fraction: the share of all bytes for validation, above 0 and below 1.
        seed: of the shuffle.

    Raises:
        ValueError: there are fewer than two documents.
    """
    if len(sizes) < 2:
        raise ValueError(
            f"{len(sizes)} document cannot be split into training and validation; "
            "give more documents, or text of its own for validation (--valid-data)"
        )
    order = np.random.default_rng([seed, 0]).permutation(len(sizes))
    share = valid_fraction * float(sizes.sum())
    valid_ids: list[int] = []
    taken = 0
    for document in order:
        if taken >= share or len(valid_ids) == len(sizes) - 1:
            break
        if sizes[document] <= share:
            valid_ids.append(int(document))
            taken += int(sizes[document])
    valid = np.array(valid_ids or [int(np.argmin(sizes))], dtype=np.int64)
    return order[~np.isin(order, valid)], valid
