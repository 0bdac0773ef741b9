"""Which files a source of text stands for."""

import codecs
import glob
import os
from collections.abc import Collection
from pathlib import Path

from longreach.data.content import HEAD_BYTES, BadText, foreign
from longreach.data.unpack import unpacked_blocks
from longreach.files import expanded


def find_files(source: str) -> list[Path]:
    """The files that a file's name, a folder or a glob stands for, as `longreach.data.corpora.open_corpus` has it.

    Raises:
        ValueError: there are none.
    """
    path = expanded(source)
    if source and path.is_file():
        return [path]
    if source and path.is_dir():
        files = [file for file in walk(path) if not _is_binary(file)]
        if not files:
            raise ValueError(f"{source!r} is a folder without any text file; name one that holds some")
        return files
    if glob.has_magic(source):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ValueError(f"the pattern {source!r} matches no file; quote it and check it with ls")
        return files
    if source and path.exists():
        raise ValueError(f"{source!r} is neither a file nor a folder, but a device, pipe or socket; give a file")
    if not source.strip():
        raise ValueError("it is empty: give a file, a folder, a glob or hf:NAME")
    raise ValueError(f"{source!r} does not exist; give a file, a folder, a glob or hf:NAME")


def walk(folder: Path, left_out: Collection[str] = ()) -> list[Path]:
    """All files below `folder` that are not hidden, ordered by path, without the folders named `left_out`."""
    files: list[Path] = []
    for parent, subfolders, names in os.walk(folder, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in left_out]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _raise(error: OSError) -> None:
    raise error


def _is_binary(path: Path) -> bool:
    try:
        head = head_of(path)
    except BadText:
        return False  # to be refused where it is read
    # UTF-16 is text: it is refused with a mend rather than passed over. So are archives.
    return b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not foreign(head)


def head_of(path: Path) -> bytes:
    """The first bytes of a file, unpacked."""
    head = b""
    for block in unpacked_blocks(path):
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return head[:HEAD_BYTES]
