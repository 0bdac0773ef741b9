"""Which checkpoints a run has, and that no crash leaves it without: one is whole or absent, the older ones go last."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from longreach.files import remove_folder
from longreach.foreign import in_silence, refusing
from longreach.train.metrics import Log, having_room
from longreach.train.parallel import ALONE, Ranks, shard
from longreach.train.shards import Manifest, ShardReader, ShardWriter

NAME = "checkpoint-"
"""What the name of each begins with; the number of steps that were done follows."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last first.

    Raises:
        ValueError: there is one of an older version.
    """
    old = folder / "checkpoint.pt"
    if old.exists():
        raise ValueError(
            f"{old} is of an older version of longreach: finish the run with that one, or delete it to train this run "
            "from the start"
        )
    found = (path for path in folder.glob(f"{NAME}*") if path.name.removeprefix(NAME).isdecimal() and path.is_dir())
    return sorted(found, key=_step, reverse=True)


def last_step(folder: Path) -> int:
    """How many steps were done at the last checkpoint of a run, 0 where it has none. Raises as `checkpoints`."""
    return max(map(_step, checkpoints(folder)), default=0)


def remove_checkpoints(folder: Path, keep: int = 0) -> None:
    """Remove the checkpoints of a run but so many of the last. Raises as `checkpoints`."""
    for path in checkpoints(folder)[keep:]:
        remove_folder(path)


def damaged(path: Path) -> tuple[str, str]:
    """What is wrong with a checkpoint that no run can go on from, and the mend, as `refusing` takes them."""
    before = [other.name for other in checkpoints(path.parent) if _step(other) < _step(path)]
    instead = f"go on from {before[0]}" if before else "train this run from the start"
    return f"checkpoint {path} is damaged", f"delete it to {instead}"


def save_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    ready: Callable[[], None] = lambda: None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint, whole or not at all. All ranks of the group call it, and what it raises is raised on all.

    Args:
        path: the folder, which is not there yet.
        tensors: what this rank has to write: its parts of sharded tensors, and what no other rank writes.
        values: plain values; those of rank 0 count.
        ready: called on rank 0 first; nothing is written where it raises.
        group: the ranks, with a backend for the CPU; this process alone when None.

    Raises:
        OSError: the disk is full or the folder cannot be written. Nothing is left of it.
    """
    writer = ShardWriter(path, values, ready)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except BaseException as error:
        writer.give_up()
        raise _cause(error) if isinstance(error, dcp.CheckpointException) else error from None


def load_tensors(
    path: Path, manifest: Manifest, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Read tensors of a checkpoint into those given, of which each rank may have parts. All ranks of the group call it.

    Raises:
        ValueError: it is damaged, or holds others.
    """
    for tensor in tensors.values():
        if tensor.is_floating_point():
            shard(tensor).fill_(torch.nan)  # where no piece has anything for it
    reader = ShardReader(path, manifest, tensors)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with in_silence():
            dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        with refusing(*damaged(path)):
            raise _cause(error) from None


def _cause(error: dcp.CheckpointException) -> BaseException:
    """What went wrong on the first rank on which anything did."""
    return error.failures[min(error.failures)][0]


def _step(path: Path) -> int:
    return int(path.name.removeprefix(NAME))


class Writer:
    """Saves checkpoints at once, or in a thread while training goes on, one at a time; done when the block ends.

    Args:
        folder: of the run.
        keep: how many stay.
        behind: whether in a thread, from a copy of the tensors.
        log: of the steps, without which a checkpoint is worth nothing: it is on disk before that is.
        on_full_disk: told what could not be written because a disk is full; that is an error when None.
        ranks: all of which have such a writer and save together.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        behind: bool,
        log: Log,
        on_full_disk: Callable[[str], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._folder, self._keep = folder, keep
        self._log, self._on_full_disk, self._ranks = log, on_full_disk, ranks
        self._threads = ThreadPoolExecutor(1) if behind else None
        self._saving: Future[None] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Writer":
        self._stack.enter_context(in_silence(warning="torch.distributed is disabled"))  # the thread cannot
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._threads is not None:
                self._threads.shutdown()
                if error is None or not isinstance(error, Exception):  # a signal leaves a checkpoint, or says why not
                    with having_room(self._on_full_disk):
                        self._wait()

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Save what there is after so many steps, as `save_checkpoint`, whose errors come at the next time behind."""
        with having_room(self._on_full_disk):
            self._wait()
        with having_room(self._on_full_disk):
            if self._threads is None:
                self._save(step, tensors, values)
            else:
                copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
                self._saving = self._threads.submit(self._save, step, copied, values)

    def _save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        save_checkpoint(self._folder / f"{NAME}{step}", tensors, values, self._log.sync, self._ranks.beside)
        if self._ranks.is_first:
            remove_checkpoints(self._folder, self._keep)

    def _wait(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()
