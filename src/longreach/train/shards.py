"""A storage for PyTorch's distributed checkpoints, which plan who writes and reads what, in which nothing is pickled.

A checkpoint is a folder. Each rank has a file in it, RANK.safetensors; checkpoint.json holds plain values, and of each
tensor its shape, and which pieces of it are in which files, with a digest of each, and of itself.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longreach.files import digest_of, open_file, put_in_place, sync, temporary_name
from longreach.reading import parse_file, read_values
from longreach.train.parallel import shard

Plan = TypeVar("Plan")
Result = TypeVar("Result")

MANIFEST = "checkpoint.json"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a tensor may be of -> its name in safetensors."""


@dataclass(frozen=True)
class Piece:
    """Of a tensor, under whose name it stands in the file of a rank."""

    rank: int
    offsets: tuple[int, ...]
    """Where in the tensor it begins, on each axis."""
    sizes: tuple[int, ...]
    sha256: str
    """Of its bytes, hexadecimal."""


@dataclass(frozen=True)
class Pieces:
    """A tensor."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for piece in self.pieces:
            inside = (
                0 <= offset <= offset + size <= length
                for offset, size, length in zip(piece.offsets, piece.sizes, self.shape, strict=True)
            )
            if not all(inside):
                raise ValueError(f"pieces={piece.offsets}: it is not inside of {self.shape}")


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json."""

    values: dict[str, Any]
    tensors: dict[str, Pieces]


def read_manifest(path: Path) -> Manifest:
    """What a checkpoint holds besides its tensors, and which these are; ValueError where it is damaged."""
    plain = parse_file(path / MANIFEST)
    if not isinstance(plain, dict) or plain.keys() != {"sha256", "content"}:
        raise ValueError(f"{MANIFEST} is none of ours")
    if plain["sha256"] != digest_of(json.dumps(plain["content"])):
        raise ValueError(f"{MANIFEST}: its digest is another")
    return read_values(Manifest, plain["content"])


class _Storage:
    """What a storage must have, and one of a single folder has no use for."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def prepare_local_plan(self, plan: Plan) -> Plan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class ShardWriter(_Storage, dcp.StorageWriter):
    """Writes one checkpoint, whole or not at all.

    Args:
        path: the folder, which is not there yet.
        values: plain values; those of rank 0 count.
        ready: called on rank 0 first; nothing is written where it raises.
    """

    def __init__(self, path: Path, values: dict[str, Any], ready: Callable[[], None]) -> None:
        self._path, self._values, self._ready = path, values, ready
        self._beside: Path | None = None

    def give_up(self) -> None:
        """Leave nothing of what is not whole."""
        if self._beside is not None:
            shutil.rmtree(self._beside, ignore_errors=True)

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        """Make the folder that all write into, on rank 0."""
        self._ready()
        with self._writing():
            self._beside = temporary_name(self._path)
            self._beside.mkdir()
        return [replace(plan, storage_data=(self._beside.name, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        """Write the file of this rank, one tensor after the other."""
        name, rank = plan.storage_data
        with self._writing():
            return _done(list(_write_file(self._path.with_name(name), rank, plan.items, planner)) if plan.items else [])

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """Make the checkpoint whole, on rank 0, once all ranks have written."""
        assert self._beside is not None  # `prepare_global_plan` made it
        tensors: dict[str, Any] = {
            name: {"shape": list(tensor.size), "pieces": []}
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, dcp.TensorStorageMetadata)
        }
        for result in chain.from_iterable(results):
            tensors[result.index.fqn]["pieces"].append(vars(result.storage_data))
        content = json.dumps({"values": self._values, "tensors": tensors})
        with self._writing():
            manifest = self._beside / MANIFEST
            manifest.write_text(f'{{"sha256": "{digest_of(content)}", "content": {content}}}\n')
            sync(manifest)
            put_in_place(self._beside, self._path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"{error.strerror} while writing {self._path}: the checkpoint before it is kept"
            raise OSError(error.errno, message) from error

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: `prepare_global_plan` is called on rank 0 alone."""


def _write_file(
    folder: Path, rank: int, items: Iterable[dcp.WriteItem], planner: dcp.SavePlanner
) -> Iterator[WriteResult]:
    """Write the file of a rank, with one tensor in memory at a time: the library of safetensors takes all at once."""
    stored = [(item, item.tensor_data) for item in items if item.tensor_data is not None]
    stored.sort(key=lambda pair: -pair[1].properties.dtype.itemsize)  # so that each begins at a multiple of its own
    header, end = {}, 0
    for item, of in stored:
        start, end = end, end + of.chunk.sizes.numel() * of.properties.dtype.itemsize
        kind = {"dtype": DTYPES[of.properties.dtype], "shape": list(of.chunk.sizes)}
        header[item.index.fqn] = {**kind, "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    path = folder / _file(rank)
    with open(path, "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for item, of in stored:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)  # there are no others
            data = _bytes(tensor.detach().cpu())
            file.write(data)
            digest = hashlib.sha256(data).hexdigest()
            piece = Piece(rank, tuple(of.chunk.offsets), tuple(of.chunk.sizes), digest)
            yield WriteResult(item.index, len(data), piece)
    sync(path)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class ShardReader(_Storage, dcp.StorageReader):
    """Reads tensors of one checkpoint, each piece after its digest was found right.

    Args:
        path: the folder.
        manifest: of it.
        tensors: what is read into, of which this rank may have parts.
    """

    def __init__(self, path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        self._path, self._manifest, self._tensors = path, manifest, tensors
        self._pieces = {
            (name, piece.offsets): piece for name, tensor in manifest.tensors.items() for piece in tensor.pieces
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """What there is, as the planner of PyTorch looks at it."""
        return dcp.Metadata(
            {
                name: dcp.TensorStorageMetadata(
                    TensorProperties(),  # which nobody asks for
                    torch.Size(tensor.shape),
                    [dcp.ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in tensor.pieces],
                )
                for name, tensor in self._manifest.tensors.items()
            }
        )

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        """Read this rank's parts, of one piece after the other."""
        items = sorted(plan.items, key=lambda item: self._piece(item).rank)
        for rank, of_rank in groupby(items, key=lambda item: self._piece(item).rank):
            path = self._path / _file(rank)
            open_file(path).close()  # the library would wait for a pipe
            with safe_open(path, "pt") as file:
                for item in of_rank:
                    self._copy(file, item, planner)
        for name, tensor in self._tensors.items():
            if tensor.is_floating_point() and not shard(tensor).isfinite().all():
                raise ValueError(f"{name} is not all finite numbers")
        return _done(None)

    def _piece(self, item: dcp.ReadItem) -> Piece:
        return self._pieces[item.storage_index.fqn, tuple(item.storage_index.offset or ())]

    def _copy(self, file: Any, item: dcp.ReadItem, planner: dcp.LoadPlanner) -> None:
        """Put a part of a piece where it belongs."""
        name, piece, target = item.storage_index.fqn, self._piece(item), planner.resolve_tensor(item)
        read: Tensor = file.get_tensor(name)  # a view of what the file holds
        if tuple(read.shape) != piece.sizes or hashlib.sha256(_bytes(read)).hexdigest() != piece.sha256:
            raise ValueError(f"{name} in {_file(piece.rank)}: its digest is another")
        if read.dtype != target.dtype:
            raise ValueError(f"{name} is of {read.dtype}, not {target.dtype}")
        if not read.is_floating_point() and read.shape != self._tensors[name].shape:
            raise ValueError(f"{name}, which is of {read.dtype}, is not in one piece")
        part = tuple(slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True))
        target.copy_(read[part])
        planner.commit_tensor(item, target)

    def set_up_storage_reader(self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: all ranks read alike."""

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        """As they are."""
        return plans


def _file(rank: int) -> str:
    return f"{rank}.safetensors"


def _done(result: Result) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(result)
    return future
