"""Where and with what one start of a piece of work ran."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from longreach.reading import below, check_fields, read_values
from longreach.results.checks import require_positive


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a command: work that was interrupted has several, which may have run under different conditions."""

    time: str
    """When it began: ISO 8601, UTC."""
    longreach: str
    """Version of this package."""
    torch: str
    """Version of PyTorch."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and machine, as `platform.platform()` gives it."""
    device: str
    """The device that computed: `cpu`, `cuda:0`."""
    num_threads: int
    """Threads that PyTorch computed with."""
    git_commit: str | None = None
    """Commit of the longreach checkout; None when it was installed as a package."""
    host: str
    """Name of the machine."""
    pid: int
    """Of the process."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the configuration has that does not change results, and may thus differ from start to start."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "num_threads", "pid")
        options: dict[str, Any] = read_values(dict, self.options, below("options"))
        object.__setattr__(self, "options", options)
        try:
            offset = datetime.fromisoformat(self.time).utcoffset()
        except ValueError:
            offset = None
        if offset != timedelta(0):
            raise ValueError(f"time must be UTC in ISO 8601, got {self.time!r}: write it as 2026-01-31T12:00:00+00:00")
