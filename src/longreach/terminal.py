"""What stands in the terminal: tables, and progress."""

import re
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What a terminal takes for the end of a line, or a command: to move the cursor, to turn the direction of text."""


def printable(line: str) -> str:
    """A line that can do nothing but stand there, whatever names of files are in it: the rest as Python spells it."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), line)


class Screen(Console):
    """A console that some reader may leave, as `head` does: then nobody is told of progress, and what prints ends."""

    def on_broken_pipe(self) -> None:
        """In place of an exit with status 1, whatever is at work."""
        self.quiet = True
        if not self.stderr:
            raise BrokenPipeError


class TerminalProgress:
    """A bar on standard error for the stage at work: how much is done, how it goes, the time left.

    A stage ends when the next begins; then its bar becomes a line that says how long it took. Where standard error is
    no terminal there are only those lines.

    Args:
        visible: whether to show anything.
    """

    def __init__(self, visible: bool = True) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Screen(stderr=True, quiet=not visible),
        )
        self._stage: str | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "TerminalProgress":
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_stage()
        if self._bars.console.is_terminal:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` of `total` units of a stage are done."""
        stage, note = printable(stage), printable(note)
        if stage != self._stage:
            self._end_stage()
            self._stage, self._task = stage, self._bars.add_task(stage, note=note)
        self._bars.update(self._task, completed=done, total=total, note=note)

    def say(self, line: str) -> None:
        """Print a line that stays, after that of the stage at work, which ends."""
        self._end_stage()
        self._print(printable(line))

    def _end_stage(self) -> None:
        if self._stage is not None:
            (task,) = self._bars.tasks
            took = timedelta(seconds=round(task.elapsed or 0.0))
            self._print(f"{self._stage}: {took}  {task.fields['note']}".rstrip())
            self._bars.remove_task(self._task)
            self._stage = None

    def _print(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
