"""Tokenizers: a byte-level BPE trained here, or any Hugging Face one, behind the few methods that we need."""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from longreach.files import digest_of, expanded, write_atomically
from longreach.foreign import in_silence, refusing
from longreach.tokenizing import Backend, declared_eos, read_tokenizer

END_OF_TEXT = "<|endoftext|>"
# The names under which public models' tokenizers end a document, tried in this order where none is declared.
KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
BYTE_CHARS = frozenset(pre_tokenizers.ByteLevel.alphabet())
MIN_VOCAB_SIZE = len(BYTE_CHARS) + 1


class Tokenizer:
    """Text to token ids and back.

    Text is only ever text: a special token's name inside it, such as "<|endoftext|>" in a file about
    tokenizers, is encoded as the characters that it is. No special tokens are added either; whoever lays out
    sequences places `eos_id`.

    Args:
        backend: the tokenizer of the `tokenizers` library. It is taken over: truncation and padding are
            switched off.
        eos_token: the token that ends a document; it becomes a special token if it is not one.

    Raises:
        ValueError: the vocabulary has no `eos_token`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str) -> None:
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"eos_token={eos_token!r} is not in the vocabulary; name a token that is")
        self._library, self._backend = backend, Backend(backend)
        backend.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
        backend.encode_special_tokens = True
        self.eos_token = eos_token
        self.eos_id: int = eos_id
        self.vocab_size = self._backend.vocab_size

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process; what the library itself would pickle forgets how special tokens in a text are taken."""
        return _rebuilt, (self._library.to_str(), self.eos_token)

    @property
    def text_vocab_size(self) -> int:
        """One more than the largest id that text or its end becomes: special tokens, such as padding, never come of it.

        The least vocabulary that a model must have to read what this tokenizer gives.
        """
        special = {index for index, token in self._library.get_added_tokens_decoder().items() if token.special}
        ids = set(self._library.get_vocab(with_added_tokens=True).values())
        return max(ids - special | {self.eos_id}) + 1

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without any eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, computed in parallel."""
        with self._backend.at_work("encode the text") as library:
            encodings = library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens have none; bytes that are not UTF-8 become U+FFFD."""
        with self._backend.at_work("decode its tokens") as library:
            return library.decode([int(token) for token in ids], skip_special_tokens=True)

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """The UTF-8 bytes of the text that `ids` stand for; special tokens stand for none.

        Exact and additive over any cut for byte-level vocabularies. For others it is the length of the decoded
        text, in which a leading space may be missing and half a character counts as U+FFFD.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if self._byte_counts is None:
            return len(self.decode(ids).encode())
        return int(self._byte_counts[ids].sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides how text becomes tokens and documents end."""
        return digest_of(self.eos_token, self._library.to_str())

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json `path`, and beside it the tokenizer_config.json that names the eos token.

        `transformers.AutoTokenizer` loads their folder, and so does `load_tokenizer`. Where `path` exists, both
        are there and whole, even if the process is killed.
        """
        path = Path(path)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        for target, text in (
            (path.with_name("tokenizer_config.json"), json.dumps(config, indent=2)),
            (path, self._library.to_str(pretty=True)),
        ):
            write_atomically(target, (text + "\n").encode())

    @functools.cached_property
    def _byte_counts(self) -> np.ndarray | None:
        """Bytes of each token, int64 [V], or None where tokens are not strings of bytes."""
        if not isinstance(self._library.decoder, decoders.ByteLevel):
            return None
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._library.get_vocab(with_added_tokens=False).items():
            # Byte-level vocabularies write each byte as one character of their own alphabet.
            counts[index] = len(token) if BYTE_CHARS.issuperset(token) else len(token.encode())
        for index, added in self._library.get_added_tokens_decoder().items():
            counts[index] = 0 if added.special else len(added.content.encode())
        return counts


def _rebuilt(library: str, eos_token: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(library), eos_token)


class StreamingDecoder:
    """Decodes a growing sequence of tokens, giving out text as soon as no later token can change it.

    What `push` and `finish` return adds up to `tokenizer.decode` of all ids, in whole characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The last tokens, from a place between two characters on. Those whose text is out already are kept a while,
        # since many tokenizers write a token differently at the start of a text.
        self._window: list[int] = []
        self._old = 0  # how many of them came before the last place where all was out
        self._shown = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """The text that became definite with `token`, often empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        new = text.rstrip("\ufffd")[self._shown :]  # U+FFFD at the end may be the start of a character
        self._shown += len(new)
        if new and self._shown == len(text):
            self._window = self._window[self._old :]
            self._old = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        return new

    def finish(self) -> str:
        """The text of tokens still held back; the decoder is then as new."""
        new = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._old, self._shown = [], 0, 0
        return new


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenizer and `<|endoftext|>` as eos; the same texts give the same one.

    Every text can be encoded and comes back byte for byte (Radford et al. 2019, section 2.2).

    Args:
        texts: the training text in pieces.
        vocab_size: tokens to have in the end, eos and the 256 bytes included. Text too small or too uniform
            yields fewer.

    Raises:
        ValueError: `vocab_size` is below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} has no room for 256 bytes and eos; give {MIN_VOCAB_SIZE} or more")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(BYTE_CHARS),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, END_OF_TEXT)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json file, of a folder that holds one, or of a model on the Hugging Face hub.

    Its eos is the one declared in tokenizer_config.json or special_tokens_map.json beside it, else the first of
    `KNOWN_EOS` in its vocabulary; of a hub model only the latter is looked at.

    Raises:
        ValueError: there is no such file or model, it is damaged, or no eos can be found.
    """
    path = expanded(source)
    if path.is_dir():
        path = path / "tokenizer.json"
    declared = None
    if path.exists():
        backend = read_tokenizer(path, f"tokenizer={str(path)!r} is no tokenizer.json")
        declared = declared_eos(path.parent)
    elif path.name.endswith(".json") or path.is_absolute():
        raise ValueError(f"tokenizer={str(source)!r}: no such file; give a tokenizer.json or a folder that holds one")
    else:
        backend = _fetch_backend(str(source))
    try:
        return Tokenizer(backend, declared or _known_eos(backend))
    except ValueError as error:
        raise ValueError(f"tokenizer={str(source)!r}: {error}") from error


def _fetch_backend(name: str) -> tokenizers.Tokenizer:
    subject = f"tokenizer={name!r} is no file or folder here, nor to be had from the Hugging Face hub"
    with (
        in_silence("huggingface_hub"),
        refusing(subject, "give the path of a tokenizer.json, or a hub name while there is a network"),
    ):
        return tokenizers.Tokenizer.from_pretrained(name)


def _known_eos(backend: tokenizers.Tokenizer) -> str:
    for token in KNOWN_EOS:
        if backend.token_to_id(token) is not None:
            return token
    raise ValueError("no eos token is declared or known; put a tokenizer_config.json with an eos_token beside it")
