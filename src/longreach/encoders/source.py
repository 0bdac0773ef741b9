"""The files of a published model, from a folder or the Hugging Face hub. They are read alone: no code is run."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from longreach.files import open_file
from longreach.foreign import first_line, refusing, require_transformers
from longreach.models.files import WEIGHTS, shards_of
from longreach.reading import parse_file

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids", "encoder.alibi")
"""What some files hold beside weights: counters, and Mosaic's table of biases."""

WORDS = "embeddings.word_embeddings.weight"
"""The weight that every encoder has, whatever stands before its name."""


@dataclass(frozen=True)
class Source:
    """Where the files are."""

    name: str
    """A folder or a name on the hub."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """How the hub is asked: revision, token, cache_dir, subfolder, local_files_only and others of transformers."""

    def find(self, file: str) -> Path | None:
        """A file of the model; None if it has no such file.

        Raises:
            ValueError: there is no such model, or the hub cannot be reached and the file was never fetched.
        """
        if Path(self.name).is_dir():
            path = Path(self.name, self.options.get("subfolder", ""), file)
            return path if path.is_file() else None
        require_transformers(self.name)
        from transformers.utils.hub import cached_file

        absent = {"_raise_exceptions_for_missing_entries": False}
        try:
            found = cached_file(self.name, file, **self.options, **absent)
        except OSError as error:
            raise self._unknown(error) from error
        return None if found is None else Path(found)

    def _unknown(self, error: Exception | None = None) -> ValueError:
        reason = f" ({first_line(error)})" if error else ""
        return ValueError(
            f"model {self.name!r} is no folder here, nor to be had from the Hugging Face hub{reason}; "
            "give a folder, or a hub name while there is a network"
        )

    def read_json(self, file: str) -> Any:
        """What a .json file holds; None if there is none. ValueError where it is damaged."""
        path = self.find(file)
        if path is None:
            return None
        try:
            return parse_file(path)
        except ValueError as error:
            raise ValueError(f"model {self.name!r}: {file}: {error}") from error

    def read_table(self, file: str) -> dict[str, Any]:
        """What a .json file holds that is an object; nothing where there is none. ValueError where it is damaged."""
        values = self.read_json(file)
        if not isinstance(values, dict | None):
            raise ValueError(f"model {self.name!r}: {file} holds no object: give one")
        return values or {}

    def configuration(self) -> dict[str, Any]:
        """What config.json holds; ValueError where there is none, or it is damaged."""
        values = self.read_json("config.json")
        if values is None and not Path(self.name).is_dir():
            raise self._unknown()
        if not isinstance(values, dict):
            raise ValueError(f"model {self.name!r} has no config.json with a table: give the folder of a model")
        return values

    def weights(self) -> dict[str, Tensor]:
        """Name -> tensor, whatever files they are in, with nothing before the names of the encoder.

        Raises:
            ValueError: there are none, or a file is damaged or holds more than tensors.
        """
        for file in WEIGHTS:
            whole = self.find(file)
            index = self.find(f"{file}.index.json") if whole is None else None
            paths = {file: whole} if index is None else {shard: self.find(shard) for shard in shards_of(index)}
            if paths == {file: None}:
                continue
            tensors: dict[str, Tensor] = {}
            for shard, path in paths.items():
                if path is None:
                    raise ValueError(f"model {self.name!r} has no {shard}, which its index names: fetch it again")
                tensors |= self._read(path)
            return self._without_prefix(tensors)
        raise ValueError(f"model {self.name!r} has no weights: give a folder with one of {', '.join(WEIGHTS)}")

    def _read(self, path: Path) -> dict[str, Tensor]:
        open_file(path).close()  # the libraries would wait for a pipe
        with refusing(f"model {self.name!r}: {path.name} holds no tensors", "fetch it again"):
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(tensors, dict) or not all(
            isinstance(key, str) and isinstance(x, Tensor) for key, x in tensors.items()
        ):
            raise ValueError(f"model {self.name!r}: {path.name} holds more than named tensors: give its weights alone")
        for key, x in tensors.items():
            if not _is_whole(x):
                raise ValueError(
                    f"model {self.name!r}: weight {key} in {path.name} is sparse, empty or repeats what it holds: "
                    "give dense weights"
                )
        return tensors

    def _without_prefix(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encoders of task models are one module of several: `bert.`; wrappers put names before that."""
        (key, *others) = [key for key in tensors if key.endswith(WORDS)] or [""]
        if not key or others:
            raise ValueError(
                f"model {self.name!r} has {len(others) + bool(key)} weights named {WORDS}: give files of one encoder"
            )
        before = key.removesuffix(WORDS)
        around = before.removesuffix("bert.")
        named = {key.removeprefix(before if key.startswith(before) else around): x for key, x in tensors.items()}
        if len(named) != len(tensors):
            raise ValueError(f"model {self.name!r} has weights both with and without {before!r}: give one of the two")
        return {key: x for key, x in named.items() if key not in BUFFERS}


def _is_whole(x: Tensor) -> bool:
    """Whether a tensor that was unpickled holds each of its numbers, as a few bytes may stand for any shape."""
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        return False
    return x.untyped_storage().nbytes() >= x.numel() * x.itemsize
