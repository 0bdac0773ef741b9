"""Text in: the documents of a corpus, each as pieces of bounded size, whatever they are stored in."""

import hashlib
import itertools
import platform
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longreach.data.content import BadText, kind_of
from longreach.data.found import find_files, head_of, walk
from longreach.data.unpack import decoded, lines_of, table_rows, unpacked_blocks
from longreach.files import digest_of
from longreach.foreign import first_line, in_silence
from longreach.reading import parse_json

PIECE_CHARS = 1 << 16
NAMED = 3  # of what is left out
LONGEST_WORD = 100  # characters within which a place between two words is looked for

ReadProgress = Callable[[int], None]
"""Told how many bytes of text have been read."""

STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text, read once, before the corpus moves on to the next."""

    name: str
    """Where it stands: a path, a path and a line, a data set and a row."""
    pieces: Iterator[str]
    """Its text in order, in pieces of at most PIECE_CHARS characters, none of them empty."""


@dataclass
class Skipped:
    """What the last pass over a corpus left out because it is no text."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Where the first few stand."""

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        kind = "bad file or line" if self.count == 1 else "bad files or lines"
        return f"{self.count:,} {kind}: {', '.join(self.first)}{more}"

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(name)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. Every iteration reads them anew; documents without text are left out.

    Raises (on iteration):
        ValueError: no document has any text, or one cannot be read as text; the line names the place.
    """

    name: str
    """What the user called it."""
    read: Callable[[], Iterator[Document]]
    """Opens the source and yields its documents, empty ones included."""
    validation: "Corpus | None" = None
    """The validation split that came with it, if any."""
    skipped: Skipped | None = None
    """What the last iteration left out; None where what is no text is refused."""

    def __iter__(self) -> Iterator[Document]:
        if self.skipped is not None:
            self.skipped.count = 0
            self.skipped.first.clear()
        empty = True
        for document in self.read():
            first = next(document.pieces, None)
            if first is not None:
                empty = False
                yield Document(document.name, itertools.chain([first], document.pieces))
        if empty:
            without = f" without {self.skipped}" if self.skipped and self.skipped.count else ""
            raise ValueError(f"{self.name!r} holds no text{without}; name a source with text in it")


@dataclass(frozen=True)
class Scan:
    """What a pass over a corpus finds out about it."""

    fingerprint: str
    """SHA-256 (hex) over the documents' texts in order. Their names do not count, their borders do."""
    sizes: np.ndarray
    """UTF-8 bytes of each document, int64 [documents]."""


def open_corpus(source: str | None, *, text_field: str = "text", skip_bad: bool = False) -> Corpus:
    """A corpus from wherever its text lies.

    - None: the source code of the running Python's standard library, without its tests and its editor; the few
      files there that are no UTF-8 are left out.
    - A file. What it holds is told by its content, whatever its name: JSON lines, one document a line in the field
      `text_field`; a table separated by commas or tabs, one document a row in that column; else UTF-8 text, one
      document, a leading byte order mark dropped and line ends kept as they are. Each may be compressed by gzip,
      bzip2, xz or zstd. Archives, HTML, XML, PDF, parquet and other JSON are refused.
    - A folder: all files below it, ordered by path. Hidden ones and binary ones (a zero byte among their first
      8192) are passed over, so that a source tree can be given as it is.
    - A glob, `**` included: the files that it matches. What is matched is read or refused, never passed over.
    - `hf:NAME[:CONFIG]`: a Hugging Face data set by name or a local folder of data files; every row of its split
      `train` is a document, and the split `validation`, where there is one, becomes `Corpus.validation`.

    Args:
        source: as above.
        text_field: the field of a .jsonl line or the column of a data set that holds the text.
        skip_bad: leave out files, lines and rows that are no text, and count them in `Corpus.skipped`.

    Raises:
        ValueError: nothing is found there, or `datasets` is needed and not installed.
    """
    if source is None:
        return Corpus(f"Python {platform.python_version()} standard library", _read_standard_library)
    if source.startswith("hf:"):
        splits = find_hugging_face(source, streaming=False).splits()
        held_out = None
        if "validation" in splits:
            held_out = rows_of(splits["validation"], f"{source} (validation)", text_field, skip_bad)
        return replace(rows_of(splits["train"], source, text_field, skip_bad), validation=held_out)
    skipped = Skipped() if skip_bad else None
    return Corpus(source, partial(_read_files, find_files(source), text_field, skipped), skipped=skipped)


def idle_field(text_field: str | None, *sources: str | None) -> dict[str, str]:
    """text_field, and why nothing heeds it, where all text is plain, as a look at the beginning of each file tells."""
    if text_field in (None, "text"):
        return {}
    try:
        for source in sources:
            if source is None:
                continue
            paths = [] if source.startswith("hf:") else find_files(source)
            if not paths or any(kind_of(head_of(path), str(path), text_field) != "text" for path in paths):
                return {}
    except (ValueError, OSError):  # whoever reads it says what is wrong
        return {}
    return {"text_field": "it is for JSON lines and tables, and all of this is plain text"}


class _Scanner:
    """Fingerprints a corpus in bounded memory while someone else reads it."""

    def __init__(self, progress: ReadProgress) -> None:
        self._progress = progress
        self._bytes_read = 0
        self._sizes = array("q")
        self._hash = hashlib.sha256()

    def watch(self, corpus: Corpus) -> Iterator[Document]:
        for document in corpus:
            start = self._bytes_read
            document_hash = hashlib.sha256()
            pieces = self._watch_pieces(document.pieces, document_hash.update)
            yield Document(document.name, pieces)
            for _ in pieces:
                pass  # what the reader left counts too
            self._hash.update(document_hash.digest())
            self._sizes.append(self._bytes_read - start)

    def _watch_pieces(self, pieces: Iterator[str], update: Callable[[bytes], None]) -> Iterator[str]:
        for piece in pieces:
            encoded = piece.encode()
            update(encoded)
            self._bytes_read += len(encoded)
            self._progress(self._bytes_read)
            yield piece

    def result(self) -> Scan:
        return Scan(self._hash.hexdigest(), np.array(self._sizes, dtype=np.int64))


def scan(corpus: Corpus, progress: ReadProgress = lambda bytes_read: None) -> Scan:
    """Read `corpus` once for its fingerprint and its document sizes, in bounded memory."""
    scanner = _Scanner(progress)
    for _ in scanner.watch(corpus):
        pass
    return scanner.result()


def reread(corpus: Corpus, expected: Scan, progress: ReadProgress = lambda bytes_read: None) -> Iterator[Document]:
    """The documents of `corpus` once more, for what is built from them under the fingerprint of a scan.

    Raises:
        ValueError: in the end, if the text is not the one that was scanned.
    """
    scanner = _Scanner(progress)
    yield from scanner.watch(corpus)
    if scanner.result().fingerprint != expected.fingerprint:
        raise ValueError(f"the text of {corpus.name!r} changed while it was read; run again once it rests")


def beginning(corpus: Corpus, num_bytes: int) -> Corpus:
    """The first documents of `corpus`, the last one cut off, up to about `num_bytes` of text. No more is read."""

    def read() -> Iterator[Document]:
        left = num_bytes
        for document in corpus.read():
            kept = first_pieces(document.pieces, left)
            left -= sum(len(piece.encode()) for piece in kept)
            yield Document(document.name, iter(kept))
            if left <= 0:
                return

    return replace(corpus, read=read)


def in_two(corpus: Corpus, head_bytes: int, name: str) -> Corpus:
    """The one document of `corpus` as two: about its first `head_bytes` bytes, up to a word's end, and its tail."""

    def read() -> Iterator[Document]:
        for document in corpus.read():
            tail: list[str] = []
            yield Document(f"{document.name}, head", _head_pieces(document.pieces, head_bytes, tail))
            yield Document(f"{document.name}, tail", itertools.chain(tail, document.pieces))

    return replace(corpus, name=name, read=read)


def _head_pieces(pieces: Iterator[str], num_bytes: int, rest: list[str]) -> Iterator[str]:
    """The pieces up to about `num_bytes` of text; what is left of the one that is cut goes to `rest`."""
    for piece in pieces:
        encoded = piece.encode()
        if num_bytes < len(encoded):
            end = len(encoded[:num_bytes].decode(errors="ignore"))
            near = max(0, end - LONGEST_WORD)
            end = near + _last_cut(piece[near:], end - near)
            rest.append(piece[end:])
            if end:
                yield piece[:end]
            return
        num_bytes -= len(encoded)
        yield piece


def first_pieces(pieces: Iterator[str], num_bytes: int) -> list[str]:
    """The pieces up to the one that reaches `num_bytes` of text, at least one where there is one."""
    kept = []
    for piece in pieces:
        kept.append(piece)
        num_bytes -= len(piece.encode())
        if num_bytes <= 0:
            break
    return kept


def cut_pieces(texts: Iterable[str], limit: int = PIECE_CHARS) -> Iterator[str]:
    """Regroup a text into pieces of at most `limit` characters that tokenize as the whole does.

    A piece ends after a letter or digit that white space follows. The pre-tokenizers of GPT-2 and of its
    successors (cl100k, Llama 3, Qwen) always end a token there, whatever comes before and after, so byte-level
    BPE gives the pieces the very tokens of the whole. Where no such place exists among `limit` characters, the
    cut falls at the limit: all text is kept, and at most the tokens next to that cut differ. Tokenizers that put
    a space before every text do so before every piece.
    """
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > limit:
            end = _last_cut(rest, limit)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _last_cut(text: str, limit: int) -> int:
    for end in range(limit, 0, -1):
        if text[end].isspace() and text[end - 1].isalnum():
            return end
    return limit


def cut_text(text: str) -> Iterator[str]:
    """A whole text in pieces, as `cut_pieces` makes them."""
    # In slices, because cutting small pieces off one huge string would copy its rest each time.
    return cut_pieces(text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))


def _read_standard_library() -> Iterator[Document]:
    for path in walk(Path(sysconfig.get_path("stdlib")), STDLIB_LEFT_OUT):
        if path.suffix == ".py":
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            yield Document(str(path), cut_text(text))


@contextmanager
def _skipping(skipped: Skipped | None, name: str) -> Iterator[None]:
    """Leave out the file or line of this name if it turns out to be no text, where that is wanted."""
    try:
        yield
    except BadText:
        if skipped is None:
            raise
        skipped.add(name)


def _read_files(paths: list[Path], text_field: str, skipped: Skipped | None) -> Iterator[Document]:
    for path in paths:
        with _skipping(skipped, str(path)):
            kind = kind_of(head_of(path), str(path), text_field)
            if kind == "json-lines":
                yield from _read_json_documents(path, text_field, skipped)
            elif kind == "table":
                yield from _read_table(path, text_field, skipped)
            else:
                if skipped is not None:
                    for _ in decoded(path):
                        pass  # to its end, before any of it counts
                yield Document(str(path), cut_pieces(decoded(path)))


def _read_table(path: Path, text_field: str, skipped: Skipped | None) -> Iterator[Document]:
    rows = table_rows(path)
    _, header = next(rows)
    names = [name.strip() for name in header]
    if text_field not in names:
        columns = ", ".join(map(repr, names))
        raise ValueError(f"{str(path)!r} has no text_field={text_field!r}; its columns are {columns}: name one of them")
    column = names.index(text_field)
    for place, row in rows:
        if row:
            with _skipping(skipped, place):
                if len(row) != len(names):
                    raise BadText(f"{place} has {len(row)} cells, the first row {len(names)}; mend or drop it")
                yield Document(place, cut_text(row[column]))


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, compressed or not, each with the name of its place: the path and the line.

    Raises:
        ValueError: the file holds something else, or a line is no JSON object, or it is no whole file of its
            compression.
        OSError: the file cannot be read.
    """
    if (kind := kind_of(head_of(path), str(path), "")) != "json-lines":
        raise BadText(f"{str(path)!r} holds {kind}, not JSON lines: write one object a line")
    for name, line in _numbered_lines(path):
        yield name, _json_object(name, line)


def _numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines_of(unpacked_blocks(path), str(path)), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _json_object(name: str, line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise BadText(f"{name} is not JSON ({error}); every line must be one JSON object") from error
    if not isinstance(record, dict):
        raise BadText(f"{name} holds {type(record).__name__}; every line must be one JSON object")
    return record


def _read_json_documents(path: Path, text_field: str, skipped: Skipped | None) -> Iterator[Document]:
    for name, line in _numbered_lines(path):
        with _skipping(skipped, name):
            record = _json_object(name, line)
            if text_field not in record:
                fields = ", ".join(map(repr, record)) or "none"
                raise BadText(f"{name} has no text_field={text_field!r}; its fields are {fields}: name one of them")
            yield Document(name, cut_text(checked_text(record[text_field], f"{name}, field {text_field!r}")))


def checked_text(text: Any, name: str) -> str:
    """`text`, if it is text that can be encoded.

    Raises:
        ValueError: it is not; the line names its place.
    """
    if not isinstance(text, str):
        raise BadText(f"{name} holds {type(text).__name__}, not text; mend or drop it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadText(f"{name} holds half a surrogate pair at character {error.start}; mend or drop it") from error
    return text


@dataclass(frozen=True)
class HuggingFace:
    """A data set that was found, and not read yet."""

    fingerprint: str
    """SHA-256 (hex) of its name, its files, and their revision on the hub or when each was changed here."""
    splits: Callable[[], Mapping[str, Any]]
    """Opens its splits at their beginning, for training among them."""


def find_hugging_face(source: str, streaming: bool) -> HuggingFace:
    """The data set that `hf:NAME[:CONFIG]` names, downloaded whole or streamed from its server.

    Raises:
        ValueError: it cannot be loaded, or has no split for training.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source!r} needs Hugging Face datasets: pip install 'longreach[hf]'") from error
    name, *rest = source.removeprefix("hf:").split(":")
    if not name.strip() or len(rest) > 1 or (rest and not rest[0].strip()):
        raise ValueError(f"{source!r} names no data set: give hf:NAME, or hf:NAME:CONFIG")
    had_no_bars = datasets.utils.are_progress_bars_disabled()
    if Path(name).exists():  # else a download is under way
        datasets.utils.disable_progress_bars()
    try:
        with in_silence("datasets"):
            builder = datasets.load_dataset_builder(name, rest[0] if rest else None)
            if not streaming:
                builder.download_and_prepare()
            splits = builder.as_streaming_dataset if streaming else builder.as_dataset
            names = list(splits())
    except Exception as error:  # whatever a name leads others' code to
        raise ValueError(
            f"{source!r} cannot be loaded ({first_line(error.__cause__ or error)}); check the name, the config and the "
            "network"
        ) from error
    finally:
        if not had_no_bars:
            datasets.utils.enable_progress_bars()
    if "train" not in names:
        raise ValueError(f"{source!r} has no split 'train', only {', '.join(names)}; name a data set that has one")
    files = (builder.config.data_files or {}).items()
    return HuggingFace(
        digest_of(source, *(f"{split} {names} {names.origin_metadata}" for split, names in sorted(files))), splits
    )


def rows_of(rows: Iterable[dict[str, Any]], source: str, text_field: str, skip_bad: bool = False) -> Corpus:
    """A split of a Hugging Face data set as a corpus."""
    skipped = Skipped() if skip_bad else None
    return Corpus(source, partial(_read_rows, rows, source, text_field, skipped), skipped=skipped)


def _read_rows(
    rows: Iterable[dict[str, Any]], source: str, text_field: str, skipped: Skipped | None
) -> Iterator[Document]:
    for number, row in enumerate(rows):
        name = f"{source}, row {number}"
        with _skipping(skipped, name):
            yield Document(name, cut_text(text_of_row(row, name, text_field)))


def text_of_row(row: dict[str, Any], name: str, text_field: str) -> str:
    """The text of a row of a Hugging Face data set.

    Raises:
        ValueError: it has none; the line names its place.
    """
    if text_field not in row:
        columns = ", ".join(map(repr, row))
        raise ValueError(f"{name} has no text_field={text_field!r}; its columns are {columns}: name one of them")
    return checked_text(row[text_field], name)
