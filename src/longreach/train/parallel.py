"""Several processes, ranks, that do the work of one, as torchrun starts them: the only file that knows of them.

What is computed together goes through PyTorch's process group: gradients, and `Ranks.mean`; checkpoints have a group of
their own. All else goes through its store, a table of words that all ranks can read, where waiting has no limit:
`Ranks.leading`, `Ranks.shared`. A thread of each rank looks there whether the others are alive.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from longreach.train.watch import BEAT, GRACE, PAUSE, Watch

Engine = Literal["auto", "none", "ddp", "fsdp"]
Loss = Callable[..., Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")

FAILED = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)
"""What a command ends with in one line: rank 0 says it for all."""

MEETING = 300.0
"""Seconds within which all ranks must have started."""


class RankLost(OSError):
    """Another rank failed or is gone, which ends the work of all."""


class Launch(NamedTuple):
    """Which process of how many this is."""

    rank: int
    """Its number, from 0."""
    size: int
    """How many there are."""
    local: int
    """Its number on its machine, which is that of its GPU."""


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What torchrun, or a scheduler in its stead, says of this process in its environment; None where neither did.

    Raises:
        ValueError: it does not say all, or contradicts itself.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    numbers = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        word = environment.get(name, "")
        if not word.isascii() or not word.isdigit():
            raise ValueError(f"{name}={word!r} in the environment beside RANK or WORLD_SIZE: start it by torchrun")
        numbers.append(int(word))
    rank, size, local, _ = numbers
    if rank >= size:
        raise ValueError(f"RANK={rank} in the environment is not below WORLD_SIZE={size}: start it by torchrun")
    if "MASTER_ADDR" not in environment:
        raise ValueError("MASTER_ADDR is missing in the environment beside RANK: start it by torchrun")
    return Launch(rank, size, local)


class Spread(NamedTuple):
    """A loss whose gradients are those of all ranks."""

    loss: Loss
    """Of this rank's part of the batch; its gradients become the means over all ranks."""
    syncing: Callable[[bool], AbstractContextManager[Any]]
    """Given whether a backward pass is the last of a step: what it must run in, lest ranks wait for each other."""
    gathered: Callable[[], AbstractContextManager[Any]]
    """What the model must run in where it is called by itself, by all ranks alike."""


class Ranks:
    """The processes of one job, seen from one of them. `ALONE` is a job of one process, which waits for nobody."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, watch: Watch | None = None) -> None:
        self.rank, self.size = rank, size
        self._store, self._watch = store, watch
        self._stage = 0
        self._contexts: dict[int, dist.ProcessGroup] = {}
        self.beside: dist.ProcessGroup | None = None
        """All ranks, where there are several, for what is done on the CPU beside training and may take long."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def processes_here(self) -> int:
        """How many of them are on this machine, as torchrun says."""
        return min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    def rows(self, batch_size: int, context: int = 1) -> range:
        """Which sequences of a batch are this rank's, with as many ranks as `context` to each."""
        each, place = batch_size * context // self.size, self.rank // context
        return range(place * each, (place + 1) * each)

    def check(self, engine: Engine, batch_size: int, accumulation: int, context: int = 1) -> None:
        """ValueError where the ranks cannot share out a training, with as many ranks as `context` to each sequence."""
        if engine in ("ddp", "fsdp") and read_launch() is None:
            raise ValueError(f"parallel={engine} and one process: start it by torchrun --nproc-per-node N -m longreach")
        if engine == "none" and self.size > 1:
            raise ValueError(f"parallel=none and {self.size} processes: give ddp or fsdp, or start it without torchrun")
        self.check_context(context)
        shares = self.size // context
        if batch_size % (shares * accumulation):
            sharing = f"{shares} processes" if context == 1 else f"{shares} x {context} processes"
            raise ValueError(
                f"batch_size={batch_size} cannot be shared by {sharing} x accumulation={accumulation}: "
                "give a multiple of both together"
            )

    def check_context(self, context: int) -> None:
        """ValueError where so many ranks cannot share each sequence."""
        if self.size % context:
            raise ValueError(
                f"context_parallel={context} and {self.size} process{'es' if self.size > 1 else ''}: give a divisor, "
                "or start more by torchrun --nproc-per-node N -m longreach"
            )

    def check_sees(self, folder: Path) -> None:
        """ValueError where this rank does not see the folder in which rank 0 has begun."""
        if not (folder / "folder.toml").exists():
            raise ValueError(
                f"output={folder}: it is not seen on {socket.gethostname()}, give one that all machines see"
            )

    def mean(self, *values: float) -> tuple[float, ...]:
        """The mean of each value over all ranks."""
        if self.size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return tuple((summed / self.size).tolist())

    def largest(self, value: int) -> int:
        """The largest value of all ranks."""
        highest = torch.tensor(value)
        if self.size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def collected(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The numbers, int64 [...], that each rank has, by rank, however many each has."""
        if self.size == 1:
            return [numbers]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(numbers)]))
        padded = torch.zeros(max(map(int, sizes)), dtype=torch.int64)
        padded[: len(numbers)] = torch.from_numpy(numbers)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[: int(size)].numpy() for part, size in zip(parts, sizes, strict=True)]

    def first_one_s(self, values: Tensor) -> Tensor:
        """The tensor that rank 0 has, in the place of this rank's, on the CPU."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values

    def draw_otherwise(self, *seed: int) -> None:
        """Let dropout draw otherwise than on rank 0, as a function of seed, so that there is no state to keep."""
        if not self.is_first:
            torch.manual_seed(int(np.random.default_rng([*seed, self.rank]).integers(2**63)))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Whatever goes wrong inside of the block on one of several ranks alone is a `RankLost`, which ends all.

        Raises:
            RankLost: a connection broke, as the other end did, or this rank broke down.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self._watch is None:
                raise
            broken = any(word in str(error) for word in ("gloo", "NCCL"))
            raise RankLost(self._watch.cause() if broken else f"{type(error).__name__}: {error}") from error

    def spread(self, engine: Engine, model: nn.Module, blocks: Sequence[nn.Module], loss: Loss) -> Spread:
        """A loss of a model, shared out by DDP, each rank with all weights, or by FSDP2, each with a part of them.

        Args:
            engine: ddp, which auto is, or fsdp.
            model: what is trained, on its device; its parameters become DTensors under fsdp.
            blocks: its parts that are whole for the time of their computation under fsdp.
            loss: calls the model.
        """
        if self._watch is None:
            return Spread(loss, lambda last: nullcontext(), nullcontext)
        device = next(model.parameters()).device
        self._join(device)
        objective = _Objective(model, loss)
        if engine == "fsdp":
            mesh = init_device_mesh(device.type, (self.size,))
            for part in (*blocks, objective):
                fully_shard(part, mesh=mesh)
            return Spread(objective, partial(_sharded_sync, objective), partial(_gathered, objective))
        replicated = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        return Spread(replicated, lambda last: nullcontext() if last else replicated.no_sync(), nullcontext)

    def context_group(self, context: int, device: torch.device) -> dist.ProcessGroup:
        """This rank and those that share its sequences: one axis of a mesh, the other being whose sequences differ."""
        self._join(device)
        if context not in self._contexts:
            shape = (self.size // context, context)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("sequences", "context"))
            self._contexts[context] = mesh.get_group("context")
        return self._contexts[context]

    def _join(self, device: torch.device) -> None:
        """Have a process group of all ranks."""
        if self._watch is not None and not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self._watch.timeout + GRACE),  # the watch, which knows more, comes first
            )
            self.beside = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def together(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """What `work` makes of each item, which all ranks do together; the results come out on rank 0."""
        for item in items:
            with self.computing():
                result = work(item)
            if self.is_first:
                yield result

    def shared(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        pack: Callable[[Result], str],
        unpack: Callable[[str], Result],
    ) -> Iterator[Result]:
        """What `work` makes of each item, as it is done; each rank takes the next that is left.

        The results come out on rank 0; the other ranks hand theirs over, packed.

        Raises:
            ValueError: on all ranks, where work failed on one of several, which is named.
        """
        if self.size == 1:
            yield from map(work, items)
            return
        stage = self._next_stage()
        self._meet(f"{stage}/here")  # all have made the same list, before any result changes what it is made of
        left = set(range(len(items)))
        for number, result in self._work(stage, items, work):
            if self.is_first:
                left.remove(number)
                yield result
                yield from self._handed_over(stage, left, unpack)
            else:
                self._store.set(f"{stage}/{number}", pack(result))
        if self.is_first:
            while left and not self._store.check([f"{stage}/error"]):
                time.sleep(PAUSE)
                self._check_failures()
                yield from self._handed_over(stage, left, unpack)
            self._store.set(f"{stage}/end", "")
        self._wait(f"{stage}/end")
        if self._store.check([f"{stage}/error"]):
            raise ValueError(self._store.get(f"{stage}/error").decode())

    def _work(self, stage: str, items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[tuple[int, Result]]:
        while not self._store.check([f"{stage}/error"]):
            number = self._store.add(f"{stage}/taken", 1) - 1
            if number >= len(items):
                return
            try:
                result = work(items[number])
            except Exception as error:
                self._store.set(f"{stage}/error", f"rank {self.rank}: {error}")
                return
            yield number, result

    def _handed_over(self, stage: str, left: set[int], unpack: Callable[[str], Result]) -> Iterator[Result]:
        for number in sorted(left):
            if self._store.check([f"{stage}/{number}"]):
                left.remove(number)
                yield unpack(self._store.get(f"{stage}/{number}").decode())

    @contextmanager
    def leading(self) -> Iterator[None]:
        """The block runs on rank 0 first, then on the others.

        Where it failed on rank 0, it runs on none of the others, and there is the same kind of error on all.
        """
        if self.size == 1:
            yield
            return
        stage = self._next_stage()
        if self.is_first:
            try:
                yield
            except Exception as error:
                self._store.set(f"{stage}/{'lost' if isinstance(error, OSError) else 'error'}", str(error))
                raise
            finally:
                self._store.set(stage, "")
        else:
            self._wait(stage)
            for name, kind in (("lost", RankLost), ("error", ValueError)):
                if self._store.check([f"{stage}/{name}"]):
                    raise kind(self._store.get(f"{stage}/{name}").decode())
            yield

    def whole(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights with those that are sharded put together, on the CPU of rank 0; all ranks must call it."""
        together: dict[str, Tensor] = {}
        for name, weight in weights.items():
            full = whole(weight)
            if self.is_first:
                together[name] = full.cpu()
        return together

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank keeps of tensors that all have: its parts of sharded ones, and some of the others."""
        return {
            name: tensor
            for number, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or number % self.size == self.rank
        }

    def leave(self) -> None:
        """Wait until all ranks are done."""
        self._meet("done")
        come = self._store.add("gone", 1)
        while self.is_first and come < self.size:  # this process may keep the store
            time.sleep(PAUSE)
            come = self._store.add("gone", 0)

    def _next_stage(self) -> str:
        self._stage += 1
        return f"stage/{self._stage}"

    def _meet(self, place: str) -> None:
        """Wait until all ranks have come to this place."""
        come = self._store.add(place, 1)
        while come < self.size:
            self._check_failures()
            time.sleep(PAUSE)
            come = self._store.add(place, 0)

    def _wait(self, key: str) -> None:
        """Wait for a word in the store, in a way that lets signals through."""
        while not self._store.check([key]):
            self._check_failures()
            time.sleep(PAUSE)

    def _check_failures(self) -> None:
        if self._store.check(["failed"]):
            raise RankLost(self._store.get("failed").decode())


ALONE = Ranks()
"""One process."""


@contextmanager
def joined(program: str, timeout: float) -> Iterator[Ranks]:
    """The ranks that torchrun started, for as long as the block runs; `ALONE` where it started one, or none.

    An error of the kinds of `FAILED` comes out on rank 0 alone, with that of the rank where it arose; the other ranks
    exit with 2 and in silence.

    Args:
        program: its name in what is said of a rank that is lost.
        timeout: seconds without a sign of life after which a rank counts as lost.

    Raises:
        ValueError: the environment is not one that torchrun makes, or its port is taken.
    """
    launch = read_launch()
    if launch is None or launch.size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local)  # what "cuda" means from here on
    store = _meeting(launch)
    watch = Watch(store.clone(), launch.rank, launch.size, program, timeout)
    ranks = Ranks(launch.rank, launch.size, store, watch)
    try:
        yield ranks
        ranks.leave()
        if dist.is_initialized():
            dist.destroy_process_group()  # after an error it might wait for what never comes
    except Exception as error:
        raise _outcome(error, launch, store) from error
    finally:
        watch.end()


def whole(number: Tensor) -> Tensor:
    """A tensor of the sharded parameters' making, on each rank."""
    return number.full_tensor() if isinstance(number, DTensor) else number


def shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which is all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _sharded_sync(objective: nn.Module, last: bool) -> Iterator[None]:
    assert isinstance(objective, FSDPModule)  # `fully_shard` made it one
    objective.set_requires_gradient_sync(last)
    yield


@contextmanager
def _gathered(objective: nn.Module) -> Iterator[None]:
    """The weights that are in no block are whole; blocks gather their own whenever they are called."""
    assert isinstance(objective, FSDPModule)
    objective.unshard()
    yield
    objective.reshard()


class _Objective(nn.Module):
    """A loss as the forward pass of a module, which is what DDP and FSDP look after."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self._loss(*batch)


def _meeting(launch: Launch) -> Any:
    """The store of all ranks."""
    try:
        store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.size, timeout=timedelta(seconds=MEETING)))
    except (RuntimeError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        reason = "the port is taken" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ValueError(f"{where}: the processes cannot meet there ({reason}): give another port or host") from error
    store.set(f"who/{launch.rank}", f"process {os.getpid()} on {socket.gethostname()}")
    return store


def _outcome(error: Exception, launch: Launch, store: Any) -> BaseException:
    """What to raise for an error, after telling the others of it."""
    with suppress(RuntimeError):  # the store is gone, too
        store.compare_set("failed", "", f"rank {launch.rank}: {error}")
        until = time.monotonic() + 4 * BEAT
        gone = store.add("gone", 1)
        while launch.rank == 0 and gone < launch.size and time.monotonic() < until:  # this process may keep the store
            time.sleep(PAUSE)
            gone = store.add("gone", 0)
    return SystemExit(2) if launch.rank and isinstance(error, FAILED) else error
