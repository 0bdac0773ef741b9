"""What a file holds, told by its first bytes: names lie, and syntax that is trained on as text shows in no loss."""

import bz2
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

HEAD_BYTES = 8192
"""How much of a file is looked at."""


class BadText(ValueError):
    """A file or a line is no text that can be read; among many it can be left out."""


Kind = Literal["text", "json-lines", "table"]
"""What can be read as documents. A table is comma- or tab-separated with the names of its columns in its first row."""

COMPRESSIONS: tuple[tuple[bytes, str, Callable[[Path], Any] | None], ...] = (
    (b"\x1f\x8b", "gzip", gzip.open),
    (b"\xfd7zXZ\0", "xz", lzma.open),
    (b"BZh", "bzip2", bz2.open),
    (b"\x28\xb5\x2f\xfd", "zstd", None),
)
"""First bytes, name and opener of compressions; zstandard's own files take one that was cut short for a whole one."""

_FOREIGN = (
    (0, b"PK\x03\x04", "a zip archive (as .docx, .xlsx, .npz and .pt are): unpack it, or save its text"),
    (0, b"PK\x05\x06", "an empty zip archive: give text"),
    (257, b"ustar", "a tar archive: unpack it and give the folder"),
    (0, b"PAR1", "a parquet file: give its folder as hf:FOLDER, which needs longreach[hf]"),
    (0, b"ARROW1", "an Arrow file: give its folder as hf:FOLDER, which needs longreach[hf]"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream: give its folder as hf:FOLDER, which needs longreach[hf]"),
    (0, b"%PDF-", "a PDF: extract its text first"),
    (0, b"{\\rtf", "RTF: save it as text first"),
    (0, b"SQLite format 3\0", "an SQLite database: export its text first"),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document: save it as text first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it and give the folder"),
    (0, b"Rar!", "a rar archive: unpack it and give the folder"),
    (0, b"\x89HDF", "an HDF5 file: export its text first"),
    (0, b"Obj\x01", "an Avro file: export its text first"),
)
"""Where bytes stand that tell what is no text, and what to do about it."""

_UNICODE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_MARKUP = re.compile(r"<(\?xml|!doctype|html|head|body|rss|svg|feed)\b", re.IGNORECASE)
_OBJECT = re.compile(r'\{\s*("(?:[^"\\\n]|\\.)*"\s*:|\}\s*$)')
_LIST = re.compile(r'\[\s*(\{\s*"|\[|"(?:[^"\\\n]|\\.)*"\s*[,\]]|-?\d+(\.\d+)?\s*,|\]\s*$)')
_NUMBER = re.compile(r"\s*[-+]?[\d.]+\s*")
_COLUMN = re.compile(r"[^\W\d][\w -]{0,30}")


def compression_of(start: bytes) -> tuple[str, Callable[[Path], Any] | None] | None:
    """Name and opener of the compression of a file that begins so; None where it is not compressed."""
    return next(((name, opener) for magic, name, opener in COMPRESSIONS if start.startswith(magic)), None)


def foreign(head: bytes) -> str | None:
    """What a file is and what to do about it, where its beginning, unpacked, is that of no text."""
    return next((told for at, magic, told in _FOREIGN if head[at:].startswith(magic)), None)


def kind_of(head: bytes, name: str, text_field: str) -> Kind:
    """What a file holds that begins so, unpacked.

    Args:
        head: its first HEAD_BYTES or less.
        name: that of the file, for errors and for what its ending promises.
        text_field: the column that holds the text, if it is a table.

    Raises:
        ValueError: it holds no documents that can be read; the line says what it is, and what to do.
    """
    if told := foreign(head):
        raise BadText(f"{name!r} is {told}")
    if packed := compression_of(head):
        raise BadText(f"{name!r} is packed by {packed[0]} within what it is packed by: unpack it once")
    if head.startswith(_UNICODE):
        raise BadText(f"{name!r} is UTF-16 or UTF-32, not UTF-8; convert it, for example with iconv")
    text = head.decode(errors="replace").lstrip("\ufeff \t\r\n")
    ending = Path(name).suffixes[-2:]
    if _MARKUP.match(text):
        raise BadText(f"{name!r} is HTML or XML: extract its text first")
    if any(suffix.lower() in (".jsonl", ".ndjson") for suffix in ending):
        return "json-lines"
    if _OBJECT.match(text):
        first, _, rest = text.partition("\n")
        if not rest or _is_object(first):
            return "json-lines"
    if _OBJECT.match(text) or _LIST.match(text):
        raise BadText(f"{name!r} is JSON but not JSON lines: write one object a line, for example with jq -c")
    if _is_table(text, text_field) or any(suffix.lower() in (".csv", ".tsv") for suffix in ending):
        return "table"
    return "text"


def dialect_of(head: str) -> str:
    """The separator of a table: a tab where its first line has one, else a comma."""
    return "\t" if "\t" in head.partition("\n")[0] else ","


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(text: str, text_field: str) -> bool:
    """Whether all rows have as many cells, two or more, below a row of names.

    A blank after every comma, and no column of numbers, is prose whose lines have as many commas each.
    """
    if "\n" not in text:
        return False
    whole, _, _ = text.rpartition("\n")
    try:
        rows = list(csv.reader(whole.splitlines(keepends=True), delimiter=dialect_of(text), strict=True))
    except csv.Error:
        return False
    header = [cell.strip() for cell in rows[0]]
    if len(header) < 2 or not all(_COLUMN.fullmatch(cell) for cell in header):
        return False
    if text_field in header:
        return True
    below = [row for row in rows[1:] if row]
    if len(below) < 2 or any(len(row) != len(header) for row in below):
        return False
    spaced = all(cell.startswith(" ") for row in rows for cell in row[1:])
    return not spaced or any(all(map(_NUMBER.fullmatch, column)) for column in zip(*below, strict=True))
