"""The ranks of a process group in the order of their pieces, and how tensors travel between them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Line:
    """Ranks side by side, each with a piece of one sequence, seen from one of them.

    Places count along the line. A line that is turned runs from the last piece to the first, and each piece with it: so
    whoever looks ahead looks back along the turned line.
    """

    group: dist.ProcessGroup | None
    """The process group; None for all processes."""
    lengths: tuple[int, ...]
    """Tokens of each piece."""
    place: int
    """Of this rank."""
    turned: bool = False
    """Whether the last rank of the group comes first."""
    gathered: int = 0
    """Bytes that `gather` had this rank send, so far."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.lengths)

    @property
    def borders(self) -> tuple[int, ...]:
        """Position of each piece's first token, and the length of the sequence."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def start(self) -> int:
        """Position of this rank's first token."""
        return self.borders[self.place]

    @property
    def stop(self) -> int:
        """One past this rank's last token."""
        return self.borders[self.place + 1]

    def turn(self) -> "Line":
        """The same ranks from the other end."""
        return Line(self.group, self.lengths[::-1], self.size - 1 - self.place, not self.turned)

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, which are of one shape, by place: one axis more."""
        found = x.new_empty(self.size, *x.shape)
        with telling("gather what the bound needs"):
            dist.all_gather(list(found), x.contiguous(), group=self.group)
        self.gathered += x.nbytes * (self.size - 1)
        return found.flip(0) if self.turned else found

    def swap(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], what: str) -> None:
        """Send tensors to places, and receive those that come from places into tensors; all of them contiguous."""
        sends = [self._operation(dist.isend, x, place) for place, x in outgoing.items()]
        receipts = [self._operation(dist.irecv, x, place) for place, x in incoming.items()]
        if not (sends or receipts):
            return
        with telling(f"exchange {what}"):
            for work in dist.batch_isend_irecv([*receipts, *sends]):
                work.wait()

    def _operation(self, operation: object, x: Tensor, place: int) -> dist.P2POp:
        peer = self.size - 1 - place if self.turned else place
        return dist.P2POp(operation, x, group=self.group, group_peer=peer)  # type: ignore[arg-type]


def device_of_numbers(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors of a few numbers travel from: the CPU, unless the group has GPUs alone."""
    devices = _backends(group)
    return torch.device("cpu" if "cpu" in devices else next(iter(devices)))


def validate_carried(q: Tensor, group: dist.ProcessGroup | None) -> None:
    """ValueError where a group has no backend that sends tensors from one rank to another where q is."""
    device, backends = q.device.type, _backends(group)
    if device not in backends or (device != "cpu" and backends[device] == "gloo"):
        held = ",".join(f"{place}:{backend}" for place, backend in backends.items())
        raise ValueError(
            f"q is on {device}, from where no backend of the group sends ({held}): move q, k and v, or give a group "
            "with one that does, such as cuda:nccl"
        )


def _backends(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Kind of device -> what carries tensors on it."""
    parts = (part.partition(":") for part in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in parts}


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Say of a connection that broke what it was for.

    Raises:
        RuntimeError: it broke, as the other end did, or nothing came within the time limit of the process group.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(
            f"context parallelism could not {what}: another rank ended, or is later than the process group's timeout "
            f"({reason})"
        ) from error
