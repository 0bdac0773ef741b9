"""What a file holds, unpacked and decoded, in blocks of bounded size."""

import codecs
import itertools
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from longreach.data.content import BadText, compression_of

BLOCK_BYTES = 1 << 18
COMPRESSED_BLOCK_BYTES = 1 << 14  # a block may unpack to a thousand times its size


def lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends, the last one too where nothing ends it."""
    unfinished: list[bytes] = []
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield b"".join([*unfinished, end])
            unfinished = []
        unfinished.append(rest)
    yield b"".join(unfinished)


def unpacked_blocks(path: Path) -> Iterator[bytes]:
    """A file's content, unpacked, in blocks of which none is empty.

    Raises:
        BadText: it is no whole file of its compression.
        OSError: it cannot be read.
    """
    with open(path, "rb") as packed:
        compression = compression_of(packed.read(8))
        packed.seek(0)
        if compression is None:
            while block := packed.read(BLOCK_BYTES):
                yield block
            return
        name, opener = compression
        try:
            if opener is None:
                yield from _zstd_blocks(packed)
                return
            with opener(path) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise BadText(f"{str(path)!r} is no whole {name} file ({error}); make or fetch it again") from error


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
