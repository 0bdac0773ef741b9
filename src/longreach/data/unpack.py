"""What a file holds, unpacked and decoded, in blocks, lines and rows of bounded size."""

import codecs
import csv
import itertools
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from longreach.data.content import BadText, compression_of, dialect_of
from longreach.files import blaming

LONGEST_LINE = 1 << 28
"""The most bytes of a line, or of a row of a table, which is in memory as a whole."""

LARGEST_RATIO = 500
"""The most times that a text is as large as what it is packed in: some files unpack without an end in sight."""

LEAST_BOUND = 1 << 26
"""Bytes that any file may unpack to."""

BLOCK_BYTES = 1 << 18
COMPRESSED_BLOCK_BYTES = 1 << 12  # four bytes of zstd may unpack to 128 KiB


def lines_of(blocks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Lines without their ends, the last one too where nothing ends it; name is what they are of.

    Raises:
        BadText: one is longer than `LONGEST_LINE`.
    """
    unfinished: list[bytes] = []
    size = 0
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield b"".join([*unfinished, end])
            unfinished, size = [], 0
        unfinished.append(rest)
        size += len(rest)
        if size > LONGEST_LINE:
            raise BadText(f"{name} has a line of over {LONGEST_LINE >> 20} MiB; cut or drop it")
    yield b"".join(unfinished)


def unpacked_blocks(path: Path) -> Iterator[bytes]:
    """A file's content, unpacked, in blocks of which none is empty.

    Raises:
        BadText: it is no whole file of its compression, or unpacks to `LARGEST_RATIO` times its size.
        OSError: it cannot be read.
    """
    with blaming(path), open(path, "rb") as packed:
        compression = compression_of(packed.read(8))
        packed.seek(0)
        if compression is None:
            while block := packed.read(BLOCK_BYTES):
                yield block
            return
        name, opener = compression
        most = max(LEAST_BOUND, LARGEST_RATIO * os.fstat(packed.fileno()).st_size)
        try:
            for block in _zstd_blocks(packed) if opener is None else _blocks(opener, path):
                most -= len(block)
                if most < 0:
                    break
                yield block
        except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise BadText(f"{str(path)!r} is no whole {name} file ({error}); make or fetch it again") from error
        if most < 0:
            raise BadText(f"{str(path)!r} unpacks to over {LARGEST_RATIO} times its size: that is no text; drop it")


def _blocks(opener: Callable[[Path], Any], path: Path) -> Iterator[bytes]:
    with opener(path) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    # zstandard's own file objects take a file that was cut short for a whole one.
    frame = None
    while block := file.read(COMPRESSED_BLOCK_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if unpacked := frame.decompress(block):
                yield unpacked
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


def decoded(path: Path) -> Iterator[str]:
    """A file's text, unpacked, without a leading byte order mark.

    Raises:
        BadText: it is not UTF-8, or holds a zero byte; or as `unpacked_blocks`.
        OSError: it cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    blocks_end = 0
    for block in itertools.chain(unpacked_blocks(path), [b""]):
        offset = blocks_end - len(decoder.getstate()[0])  # a block may end inside a character
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
            raise BadText(f"{str(path)!r} is not UTF-8: {wrong}; convert it, for example with iconv") from error
        if "\0" in text:
            place = offset + len(text[: text.index("\0")].encode())
            raise BadText(f"{str(path)!r} is binary: byte 0x00 at offset {place}; give text")
        yield text.removeprefix("\ufeff") if offset == 0 else text
        blocks_end += len(block)


def table_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table, each with the name of its place: the path and the line on which it ends.

    Raises:
        BadText: one is none, or longer than `LONGEST_LINE`: quotes that nothing closes could take the rest of the file
            into memory, as one cell or as many.
    """
    lines = lines_of((block.encode() for block in decoded(path)), str(path))
    first = next(lines)
    begin, size = 1, 0  # of the row at work: its first line, its bytes

    def bounded() -> Iterator[str]:
        nonlocal size
        for line in itertools.chain([first], lines):
            size += len(line) + 1
            if size > LONGEST_LINE:
                raise BadText(f"{path}:{begin} begins a row of over {LONGEST_LINE >> 20} MiB; mend or drop it")
            yield line.decode() + "\n"

    csv.field_size_limit(LONGEST_LINE)  # cells are bounded by their row
    rows = csv.reader(bounded(), delimiter=dialect_of(first.decode()), strict=True)
    try:
        for row in rows:
            yield f"{path}:{rows.line_num}", row
            begin, size = rows.line_num + 1, 0
    except csv.Error as error:
        raise BadText(f"{path}:{rows.line_num} is no row of a table ({error}); mend or drop it") from error
