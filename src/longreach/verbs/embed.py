"""Texts to vectors by an ALiBi encoder: `embed`."""

import hashlib
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longreach.data.corpora import Corpus, Document, first_pieces, idle_field, open_corpus
from longreach.data.prepare import naming
from longreach.encoders.encode import SPARE_TOKENS, texts_of, tokenize
from longreach.encoders.load import load_encoder
from longreach.encoders.texts import Texts
from longreach.files import blaming, digest, digest_of, replacing, sync
from longreach.folder import begin, hold
from longreach.positions.scaling import Scaling, parse_scaling
from longreach.reading import refuse_below
from longreach.terminal import TerminalProgress
from longreach.train.loop import resolve_device
from longreach.verbs.open import named_dtype

WORK = ".part"
"""What the name of the folder has after that of the output, in which vectors are kept until all of them are made."""

VECTORS = "vectors.f32"
"""File in it: finished vectors, one after another, float32, little-endian."""

CHUNK = 256
"""How many texts are taken at a time: what a killed process loses."""

BYTES_PER_TOKEN = 64
"""How much of a text is read at first for each token that it may have: no language needs as much, but blanks may."""

MOST_BYTES = 1 << 24
"""How much of a text is read whatever it holds: tokenizers take some 60 bytes of memory for each, of blanks too."""


@dataclass(frozen=True)
class EmbedConfig:
    """What is to be embedded, and by what."""

    model: str
    """A folder or a name on the Hugging Face hub."""
    data: str
    """Text: a file, folder or glob of text or .jsonl files (also .gz, .xz, .zst), or hf:NAME[:CONFIG]. Every document
    has a vector, an empty one too, in the order in which they are read."""
    text_field: str = "text"
    """Field of a JSON line, or column of a table or a Hugging Face data set, that holds the text."""
    skip_bad: bool = False
    """Leave out files and lines that are no text, instead of refusing them; they are counted and have no vector."""
    max_length: int | None = None
    """Tokens after which a text is cut off; what the model's files say when not given."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where the model has none."""
    scaling: str | None = None
    """How slopes are scaled for texts past L: linear, ntk, linear-fixed=FACTOR or ntk-fixed=FACTOR."""
    train_length: int | None = None
    """L in tokens, where the model's configuration does not tell it."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto for that of its files, and float32 on the CPU."""
    batch_size: int = field(default=32, metadata={"may_differ": True})
    """The most texts at a time."""
    device: str = field(default="auto", metadata={"may_differ": True})
    """Where to run: auto, cpu, cuda or another device of torch."""

    def __post_init__(self) -> None:
        refuse_below(self, 1, "batch_size", "max_length", "train_length")
        named_dtype(self.dtype)  # refuses
        if self.scaling is not None:
            parse_scaling(self.scaling, train_length=2).require_slopes()  # any L will do to see that it can be read

    def idle(self) -> dict[str, str]:
        """Name of a field that nothing heeds beside the others -> why."""
        return idle_field(self.text_field, self.data)


def embed(config: EmbedConfig, output: Path, progress: TerminalProgress) -> tuple[int, int]:
    """Write the vectors of all documents of a text to a .npy file, float32 (N, C). Run again, it goes on.

    Returns:
        N and C.

    Raises:
        ValueError: the output is there already; the model, its tokenizer or the text cannot be read; or what was read
            is not what the work was begun with.
        OSError: the output cannot be written.
    """
    if output.suffix != ".npy":
        raise ValueError(f"output={output}: give a name that ends in .npy")
    work = output.with_name(output.name + WORK)
    if output.exists() and not work.exists():
        raise ValueError(f"output={output}: it is there already, give another name, or remove it")
    device = resolve_device(config.device)
    with hold(work, config):
        model = _load(config, device)
        check_length_is_heeded(config.train_length, model.sizes.scaling)
        texts = _texts(model, config.tokenizer)
        length = config.max_length or texts.max_length or model.sizes.longest
        with naming("data"):
            corpus = open_corpus(config.data, text_field=config.text_field, skip_bad=config.skip_bad)
            count, fingerprint = _survey(corpus, progress)
        if corpus.skipped is not None and corpus.skipped.count:
            progress(f"left out {corpus.skipped}", 1, 1)
        digests = {
            "text": fingerprint,
            "tokenizer": digest_of(texts.tokenizer.library.to_str()),
            "pooling": digest_of(texts.pooling, str(texts.normalize)),
            f"weights of {config.model}": digest(model.source.find("config.json").parent),
        }
        begin(work, config, digests, device)
        width = model.config.hidden_size
        _append(model, config, corpus, length, work / VECTORS, count, progress)
        _finish(work / VECTORS, output, (count, width))
        shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        work.rmdir()
    return count, width


def _load(config: EmbedConfig, device: torch.device) -> Any:
    return load_encoder(
        config.model,
        scaling=config.scaling,
        train_length=config.train_length,
        tokenizer=config.tokenizer,
        dtype=named_dtype(config.dtype),
        device=device,
    )


def _texts(model: Any, tokenizer: str | None) -> Texts:
    """How texts become vectors, by a tokenizer that may be another model's."""
    try:
        return texts_of(model)
    except ValueError as error:
        raise error if tokenizer is None else ValueError(f"tokenizer={tokenizer}: {error}") from error


def check_length_is_heeded(train_length: int | None, scaling: Scaling) -> None:
    """Raise ValueError where L is given and changes nothing."""
    if train_length is not None and not scaling.depends_on_length:
        raise ValueError(
            f"train_length={train_length}: no slopes are scaled by length here; give a scaling that does, such as "
            "linear, or leave it out"
        )


def beginning(model: Any, document: Document, length: int, *, special: bool = True) -> str:
    """As much of a document as has its first tokens, so many by the tokenizer of a model, or all of it.

    Raises:
        ValueError: it has fewer, and `SPARE_TOKENS` after them, in the first `MOST_BYTES`, and goes on; and as
            `tokenize`.
    """
    enough = length + SPARE_TOKENS
    text, size, wanted = "", 0, BYTES_PER_TOKEN * enough
    most = max(MOST_BYTES, wanted)
    while True:
        more = "".join(first_pieces(document.pieces, wanted))
        text, count = text + more, len(more.encode())
        size += count
        if count < wanted or len(tokenize(model, [text], length=enough, special=special)[0]) >= enough:
            return text
        if size >= most:
            raise ValueError(f"{document.name} has under {enough} tokens in {size >> 20} MiB: cut or drop it")
        wanted = min(size, most - size)


def _survey(corpus: Corpus, progress: TerminalProgress) -> tuple[int, str]:
    """How many documents there are, and a digest of them in their order."""
    count, hashed = 0, hashlib.sha256()
    for count, document in enumerate(corpus.read(), start=1):
        text = hashlib.sha256()
        for piece in document.pieces:
            text.update(piece.encode())
        hashed.update(text.digest())
        progress("reading", count, None)
    if not count:
        raise ValueError(f"{corpus.name!r} holds no document: name a source with text in it")
    return count, hashed.hexdigest()


def _append(
    model: Any, config: EmbedConfig, corpus: Corpus, length: int, path: Path, count: int, progress: TerminalProgress
) -> None:
    """Add the vectors that a file lacks."""
    row = 4 * model.config.hidden_size
    with open(path, "ab") as file:
        done = file.tell() // row
        file.truncate(done * row)  # a killed process may have left half a vector
        left = (beginning(model, document, length) for document in islice(corpus.read(), done, None))
        while chunk := list(islice(left, CHUNK)):
            progress("embedding", done, count)
            vectors = model.encode(chunk, max_length=length, batch_size=config.batch_size)
            with blaming(path):
                file.write(vectors.numpy().astype("<f4").tobytes())
                file.flush()
                sync(path)
            done += len(chunk)
        progress("embedding", done, count)
    if done != count:
        raise ValueError(f"the text of {corpus.name!r} changed while it was read; run again once it rests")


def _finish(path: Path, output: Path, shape: tuple[int, int]) -> None:
    """Make a .npy file of finished vectors."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with replacing(output) as temporary, open(temporary, "wb") as file, open(path, "rb") as vectors:
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(vectors, file, 2**20)
