"""Tokens on disk: one memory-mapped array, read as if documents were one sequence."""

import errno
import functools
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longreach.data.cache import cached
from longreach.data.corpora import Corpus, Document, ReadProgress, Scan, reread
from longreach.data.encoding import Encoded, Encoder, token_dtype
from longreach.data.tokenizer import Tokenizer

STORE_VERSION = 1
BYTES_OF_A_TOKEN = 8  # of text, seldom more on average


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
        if shutil.disk_usage(folder).free < token_dtype(tokenizer).itemsize * scan.sizes.sum() // BYTES_OF_A_TOKEN:
            raise OSError(errno.ENOSPC, "too little room for its tokens")  # before hours of work, not after them
        with open(folder / "tokens.bin", "wb") as file, closing(Encoder(tokenizer)) as encoder:
            documents = reread(corpus, scan, progress)
            offsets = _write_to(lambda tokens: file.write(tokens.tobytes()), encoder.encode(documents))
        np.save(folder / "offsets.npy", offsets)
        (folder / "meta.json").write_text(json.dumps(meta))

    return cached(_entry(scan, tokenizer, cache), functools.partial(_open_store, meta=meta), build)


def find_tokens(scan: Scan, tokenizer: Tokenizer, cache: Path) -> TokenStore | None:
    """What `tokenize` gives, if the folder `cache` has it."""
    return _open_store(_entry(scan, tokenizer, cache), _meta(scan, tokenizer))


def tokenize_in_memory(documents: Iterable[Document], encoder: Encoder) -> TokenStore:
    """The tokens of some documents."""
    parts: list[np.ndarray] = []
    offsets = _write_to(parts.append, encoder.encode(documents))
    return TokenStore(np.concatenate(parts), offsets)


def _entry(scan: Scan, tokenizer: Tokenizer, cache: Path) -> Path:
    return cache / f"tokens-{scan.fingerprint[:16]}-{tokenizer.fingerprint[:16]}"


def _meta(scan: Scan, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that an entry must agree with."""
    return {
        "version": STORE_VERSION,
        "corpus": scan.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "dtype": token_dtype(tokenizer).name,
        "documents": len(scan.sizes),
    }


def _write_to(write: Callable[[np.ndarray], object], encoded: Iterable[Encoded]) -> np.ndarray:
    """Hand on the tokens of all documents, batch by batch; returns the documents' offsets."""
    offsets = array("q", [0])
    written = 0
    for tokens, ends in encoded:
        write(tokens)
        offsets.extend((written + ends).tolist())
        written += len(tokens)
    return np.array(offsets, dtype=np.int64)


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
