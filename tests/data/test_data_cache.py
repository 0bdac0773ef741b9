import errno
import os
import time
from pathlib import Path

import pytest

from longreach.data import cache
from longreach.data.cache import LOCK, cached


def load(folder: Path) -> str | None:
    try:
        text = (folder / "value").read_text()
    except OSError:
        return None
    return None if text == "damaged" else text


def build(folder: Path) -> None:
    (folder / "value").write_text("built")


def fail(folder: Path) -> None:
    pytest.fail("there was nothing to build")


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


def test_builds_once(tmp_path):
    entry = tmp_path / "new" / "folder" / "entry"
    assert cached(entry, load, build) == "built"
    assert cached(entry, load, fail) == "built"
    assert visible(entry.parent) == ["entry"]


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_a_damaged_entry_is_rebuilt(tmp_path, kind):
    entry = tmp_path / "entry"
    if kind == "file":
        entry.write_text("damaged")
    else:
        entry.mkdir()
        if kind == "folder":
            (entry / "value").write_text("damaged")
    assert cached(entry, load, build) == "built"
    assert visible(tmp_path) == ["entry"]


def test_the_later_of_two_builders_uses_the_earlier_ones_entry(tmp_path):
    entry = tmp_path / "entry"

    def build_late(folder: Path) -> None:
        (folder / "value").write_text("late")
        cached(entry, load, build)

    assert cached(entry, load, build_late) == "built"
    assert visible(tmp_path) == ["entry"]


@pytest.mark.parametrize("error", [ValueError("bad text"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing(tmp_path, error):
    def interrupted(folder: Path) -> None:
        build(folder)
        raise error

    with pytest.raises(type(error)):
        cached(tmp_path / "entry", load, interrupted)
    assert visible(tmp_path) == []


def test_a_full_disk_is_told_with_a_mend_and_leaves_nothing(tmp_path):
    def fill(folder: Path) -> None:
        build(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=rf"cache='{tmp_path}': its disk is full; free some room or name another"):
        cached(tmp_path / "entry", load, fill)
    assert visible(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache='.*/file/sub' cannot be written \(.*\); name another folder"):
        cached(tmp_path / "file" / "sub" / "entry", load, build)


def test_leftovers_of_killed_builds_go_after_a_day_and_those_of_live_ones_stay(tmp_path):
    for name in (".entry.dead", ".entry.live", ".other.dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_text("half")
    long_ago = time.time() - cache.STALE_SECONDS - 60
    for path in (".entry.dead/tokens.bin", ".entry.dead", ".entry.live", ".other.dead/tokens.bin", ".other.dead"):
        os.utime(tmp_path / path, (long_ago, long_ago))  # the live one's folder is old, its file is not
    cached(tmp_path / "entry", load, build)
    assert visible(tmp_path) == [".entry.live", ".other.dead", "entry"]


def test_everything_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    real_sync, real_rename = cache.sync, Path.rename
    monkeypatch.setattr(cache, "sync", lambda path: (order.append(path), real_sync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (order.append("rename"), real_rename(self, target)))
    cached(tmp_path / "entry", load, build)
    built = order[1]
    assert order == [built / "value", built, "rename", tmp_path]
