"""Tokenizers that strangers made: bounded in what they make of a text, and what their library fails at is one line."""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from longreach.files import open_file
from longreach.foreign import in_native_silence, refusing
from longreach.reading import parse_file

MAX_GROWTH = 1 << 12
"""How many times as long as it is a tokenizer may make a text, which comes in pieces of 64 thousand characters."""

MAX_VOCAB_SIZE = 1 << 24
"""The most tokens that are taken for a vocabulary, and not for one large id among few tokens."""


class Backend:
    """A tokenizer of the `tokenizers` library at work, which is taken over: it cuts, pads and drops nothing.

    Args:
        library: the tokenizer.

    Raises:
        ValueError: it may make texts over `MAX_GROWTH` times as long, or has ids over `MAX_VOCAB_SIZE`.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        for name in ("normalizer", "decoder"):
            part = getattr(library, name)
            if part is not None and _growth(json.loads(part.__getstate__())) > MAX_GROWTH:
                raise ValueError(f"its {name} may make texts over {MAX_GROWTH} times as long: mend it")
        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None):  # some were trained with it, and kept it
            library.model.dropout = None
        self.library = library
        # Some vocabularies have gaps, so that the number of tokens can be less than the largest id demands.
        self.vocab_size: int = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"it has the token id {self.vocab_size - 1}: give one whose ids are below {MAX_VOCAB_SIZE}"
            )

    @contextlib.contextmanager
    def at_work(self, purpose: str) -> Iterator[tokenizers.Tokenizer]:
        """In force while its library works; what that fails at is a ValueError."""
        silence = in_native_silence() if self._has_patterns else contextlib.nullcontext()
        with silence, refusing(f"the tokenizer cannot {purpose}", "give another tokenizer.json"):
            yield self.library

    @functools.cached_property
    def _has_patterns(self) -> bool:
        """Whether it brings regular expressions of its own, at which its library may panic."""
        return '"Regex"' in self.library.to_str()


def read_tokenizer(path: Path, subject: str) -> tokenizers.Tokenizer:
    """What a tokenizer.json holds.

    Args:
        path: of the file.
        subject: as `longreach.foreign.refusing` has it, where it is damaged.

    Raises:
        ValueError: it is damaged.
        OSError: it is no file, or may not be read.
    """
    with open_file(path) as file:
        data = file.read()
    with in_native_silence(), refusing(subject, "write or fetch it again"):
        return tokenizers.Tokenizer.from_buffer(data)


def declared_eos(folder: Path) -> str | None:
    """The token that the files beside a tokenizer.json say ends a text; None where they say nothing.

    Raises:
        ValueError: one of them is damaged.
    """
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        try:
            values = parse_file(path)
            eos = values.get("eos_token") if isinstance(values, dict) else values
            eos = eos.get("content") if isinstance(eos, dict) else eos
            if not isinstance(eos, str | None) or not isinstance(values, dict):
                raise ValueError(f"eos_token={str(eos)[:40]!r}: give the text of a token in a JSON object")
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"tokenizer: {str(path)!r}: {error}") from error
        if eos:
            return eos
    return None


def _growth(part: dict[str, Any]) -> float:
    """At most how many times as long replacements in a normalizer or a decoder make a text."""
    if inner := part.get("normalizers") or part.get("decoders"):
        return math.prod(map(_growth, inner))
    if part.get("type") == "Prepend":
        return 1.0 + len(part["prepend"])
    if part.get("type") != "Replace":
        return 1.0
    replaced = part["pattern"].get("String")  # a regular expression may replace nothing at all
    content = len(part["content"])
    return 1.0 + content if not replaced else max(1.0, content / len(replaced))
