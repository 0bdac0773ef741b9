"""What the files of an encoder say of texts: tokenizer, longest text, pooling, normalisation."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.encoders.source import Source
from longreach.positions.scaling import require_tokens
from longreach.tokenizing import Backend, read_tokenizer

POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
"""Name of a pooling in a sentence-transformers configuration -> ours."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
"""Files that make a tokenizer."""

POOLING_FILES = ("modules.json", "sentence_bert_config.json")
"""Files that say what becomes of its tokens, beside those of the modules."""

PROMPTS = "config_sentence_transformers.json"
"""File of sentence-transformers alone, which has written its own by the time that it has a model saved."""


@dataclass(frozen=True)
class Texts:
    """How texts become vectors."""

    tokenizer: Backend
    """Truncation is set where it is used."""
    max_length: int | None
    """The longest text in tokens; None where no file says."""
    pooling: str
    """mean, cls or max."""
    normalize: bool
    """Whether vectors get length 1."""


def read_texts(source: Source, tokenizer: Source | None = None) -> Texts:
    """What the files of an encoder say, the tokenizer's those of `tokenizer` where that is another model's."""
    pooling, normalize = _pooling(source)
    length = source.read_table("sentence_bert_config.json").get("max_seq_length")
    if length is not None:
        require_tokens(f"model {source.name!r}: sentence_bert_config.json has max_seq_length", length, 1)
    return Texts(_tokenizer(tokenizer or source), length, pooling, normalize)


def _tokenizer(source: Source) -> Backend:
    path = source.find("tokenizer.json")
    if path is None:
        raise ValueError(
            f"model {source.name!r} has no tokenizer.json: give that of its tokenizer by tokenizer=, a folder or a hub "
            "name (MosaicBERT's is bert-base-uncased)"
        )
    subject = f"model {source.name!r}: {path.name}"
    library = read_tokenizer(path, f"{subject} is damaged")
    try:
        return Backend(library)
    except ValueError as error:
        raise ValueError(f"{subject}: {error}") from error


def _pooling(source: Source) -> tuple[str, bool]:
    """Pooling and normalisation, as sentence-transformers has them; where it has no modules, as Jina's own code."""
    pooling, normalize = "mean", False
    modules = _modules(source)
    if not modules and (said := source.configuration().get("emb_pooler")) is not None:
        pooling = _mode({"pooling_mode": said}, source.name)
    for kind, path in modules:
        if kind == "Pooling":
            pooling = _mode(source.read_table(f"{path}/config.json"), source.name)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ValueError(f"model {source.name!r}: modules.json has a {kind}: load it with sentence-transformers")
    return pooling, normalize


def _modules(source: Source) -> list[tuple[str, str]]:
    """Class and folder of each module of sentence-transformers; none where there is no modules.json."""
    modules, listed = [], source.read_json("modules.json") or []
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise ValueError(f"model {source.name!r}: modules.json is no list of objects: give one")
    for module in listed:
        kind, path = str(module.get("type")).rsplit(".", 1)[-1], str(module.get("path"))
        if path != Path(path).name or path == "..":  # "" for the model's own folder
            raise ValueError(f"model {source.name!r}: modules.json has path={path!r}: give a folder beside it")
        modules.append((kind, path))
    return modules


def _mode(values: dict[str, Any], name: str) -> str:
    if isinstance(mode := values.get("pooling_mode"), str):
        modes = [mode]
    else:
        modes = [POOLINGS.get(key, key) for key, on in values.items() if key.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in POOLINGS.values():
        raise ValueError(
            f"model {name!r}: its pooling is {' and '.join(modes) or 'none'}: known are {', '.join(POOLINGS.values())}"
        )
    return modes[0]


def copy_text_files(folder: Path, source: Source, tokenizer: Source) -> None:
    """Write the files that say how texts become vectors to a folder, and delete those of another model there.

    Args:
        folder: where to.
        source: the files of an encoder.
        tokenizer: those of its tokenizer. Where there are none, the folder may have what somebody put there for it.
    """
    copies = {name: source.find(name) for name in POOLING_FILES}
    copies |= {name: source.find(name) for name in (f"{path}/config.json" for _, path in _modules(source) if path)}
    of_tokenizer = {name: tokenizer.find(name) for name in TOKENIZER_FILES}
    if any(of_tokenizer.values()):
        copies |= of_tokenizer
    if not Path(folder, PROMPTS).exists():
        copies[PROMPTS] = source.find(PROMPTS)
    for name, path in copies.items():
        copied = folder / name
        if path is None:
            copied.unlink(missing_ok=True)
            continue
        copied.parent.mkdir(parents=True, exist_ok=True)
        with suppress(shutil.SameFileError):
            shutil.copyfile(path, copied)
