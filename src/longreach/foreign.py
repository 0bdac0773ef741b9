"""Other libraries at work on what strangers made: in silence, and what they fail at is a ValueError of one line."""

import contextlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

NATIVE_ERRORS = 2
"""The descriptor that code in other languages writes its complaints to, past everything that Python can redirect."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""NAME or OWNER/NAME."""


@contextlib.contextmanager
def refusing(subject: str, mend: str) -> Iterator[None]:
    """Make a ValueError of whatever is raised inside, a panic of Rust too; warnings are not shown.

    Args:
        subject: what was read, and that it does not serve; the library's own reason follows in brackets.
        mend: what to do.
    """
    try:
        with in_silence():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{subject} ({first_line(error)}); {mend}") from error


def require_transformers(model: str) -> None:
    """Refuse a model for which transformers is needed, and missing or given what it cannot find: a ValueError."""
    if not Path(model).is_dir():
        if Path(model).exists():
            raise ValueError(f"model {model!r} is a file: give its folder")
        if _HUB_NAME.fullmatch(model) is None:
            raise ValueError(f"model {model!r} is no folder here, nor a name on the Hugging Face hub: give one of them")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"model {model!r} is no run here; one of Hugging Face needs transformers: pip install 'longreach[hf]'"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, and the next after a colon; what it is where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


@contextlib.contextmanager
def in_silence(*loggers: str, warning: str = "") -> Iterator[None]:
    """Keep warnings that begin so, and what these loggers of libraries have to say, off standard error.

    Warnings only in the main thread, for what is done about them is done to all.
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings() if _is_main_thread() else contextlib.nullcontext():
            if _is_main_thread():
                warnings.filterwarnings("ignore", warning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def in_native_silence() -> Iterator[None]:
    """Keep what is written past Python, as the report of a panic is, off standard error, in the main thread.

    It is that of the whole process: a thread would take it from what the main one has to say.
    """
    if not _is_main_thread():
        yield
        return
    kept = os.dup(NATIVE_ERRORS)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), NATIVE_ERRORS)
        yield
    finally:
        os.dup2(kept, NATIVE_ERRORS)
        os.close(kept)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
