"""Cache entries that are either whole or absent, however many processes build them at once."""

import errno
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from longreach.files import lock, sync

T = TypeVar("T")

STALE_SECONDS = 24 * 3600

LOCK = ".publishing"
"""Name of a file that is locked while an entry takes its place. Not that of `longreach.folder`: one folder may be both
the cache and what a process keeps for its output, and would be waited for without end."""


def cached(entry: Path, load: Callable[[Path], T | None], build: Callable[[Path], None]) -> T:
    """What `load` makes of the folder `entry`, which `build` fills first where it is absent or damaged.

    The folder is built beside its place under a name of its own, forced to disk, and renamed. A build that is
    killed therefore leaves nothing that could be taken for an entry, and of two processes that build the same
    entry the later one drops its copy and uses the earlier one's.

    Args:
        entry: the folder; its parent is made if need be.
        load: returns None for a folder that is absent or damaged.
        build: fills the empty folder that it is given.

    Raises:
        OSError: the cache cannot be written or its disk is full.
        RuntimeError: `load` refuses what `build` has just written.
    """
    loaded = load(entry)
    if loaded is not None:
        return loaded
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(entry)
        temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        message = f"cache={str(entry.parent)!r} cannot be written ({error.strerror}); name another folder"
        raise OSError(error.errno, message) from error
    try:
        build(temporary)
        _force_to_disk(temporary)
        _publish(temporary, entry, load)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"cache={str(entry.parent)!r}: its disk is full; free some room or name another folder"
            raise OSError(error.errno, message) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where it was published
    loaded = load(entry)
    if loaded is None:
        raise RuntimeError(f"the cache entry {str(entry)!r} is damaged though it was just built")
    return loaded


def _publish(temporary: Path, entry: Path, load: Callable[[Path], object | None]) -> None:
    """Rename `temporary` to `entry`, unless another process has put a good one there meanwhile."""
    with open(entry.parent / LOCK, "wb") as file:
        lock(file, wait=True)
        if load(entry) is not None:
            return
        if entry.exists():  # damaged: moved aside whole, so that no one opens it half-deleted
            aside = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
            entry.rename(aside / "damaged")
            shutil.rmtree(aside)
        temporary.rename(entry)
        sync(entry.parent)


def _remove_stale(entry: Path) -> None:
    """Delete what killed builds of this entry left; a live build has written within the last day."""
    for leftover in entry.parent.glob(f".{entry.name}.*"):
        try:
            newest = max(path.stat().st_mtime for path in [leftover, *leftover.rglob("*")])
        except FileNotFoundError:
            continue  # its owner has just renamed or removed it
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _force_to_disk(folder: Path) -> None:
    for path in folder.iterdir():
        sync(path)
    sync(folder)
