"""The one way from files and words to frozen dataclasses, and back: TOML, JSON, `rotary:base=500000`, the command line.

What is read is checked against the types that fields declare, as they are declared: no number stands for a string, no
fraction for a count. An error is a ValueError of one line that names the value by its dotted path.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from longreach.files import expanded, open_file

Kind = TypeVar("Kind")
Place = tuple[str | int, ...]
"""Names of fields and indices of lists, from the outermost in."""

_MENDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "missing": "more items",
    "too_long": "fewer items",
    "dict_type": "a table",
    "dataclass_type": "a table",
}
"""Pydantic's name of a mistake -> what is to be given instead, where its own words are not those of TOML and JSON."""

_SHOWN = 200
"""The most characters of a refused value that an error repeats."""

_SUBJECT = re.compile(r"\w+(?=[=:;]| is | has )")
"""The name that a refusal begins with, of what it refuses."""

_NAME = re.compile(r"(?<![\w.:'\"-])\w+(?==)")
"""A name before the value that it has."""


def dotted(path: Place) -> str:
    """A place in a file, as in `train.betas[1]`."""
    names = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return names.removeprefix(".") or "the whole"


def respelled(refusal: str, names: Mapping[str, str]) -> str:
    """A refusal of fields in the words of who gave their values.

    Args:
        refusal: one line, such as "steps=0: give a positive integer". One that begins with no field's name, but with
            that of a file for instance, stays as it is: names in it are not of fields.
        names: name of a field -> what it is called where its value was given.
    """
    subject = _SUBJECT.match(refusal)
    if subject is None or subject[0] not in names:
        return refusal
    rest = _NAME.sub(lambda name: names.get(name[0], name[0]), refusal[subject.end() :])
    return names[subject[0]] + rest


def marked(refusal: str, defaults: Mapping[str, Any]) -> str:
    """A refusal that says of values which nobody gave that they are the defaults; these by the names that it has."""
    for name, value in defaults.items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if value is not None and shown:
            said = rf"(?<![\w.-]){re.escape(f'{name}={shown}')}(?!\w|,\w|\.\d| \(the default\))"
            refusal = re.sub(said, r"\g<0> (the default)", refusal)
    return refusal


def below(name: str) -> Callable[[Place], str]:
    """`dotted` for places in what stands below a field."""
    return lambda path: dotted((name, *path))


def read_file(kind: type[Kind], path: Path) -> Kind:
    """Read a dataclass from a .toml or a .json file; fields left out take their defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds a key twice or an unknown one, or a value is of the wrong type or out of range.
    """
    try:
        return read_values(kind, parse_file(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_file(path: Path) -> Any:
    """What a .toml or a .json file holds, as plain values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or holds a key twice.
        OSError: it may not be read.
    """
    name = "TOML" if path.suffix == ".toml" else "JSON"
    with open_file(path) as file:
        data = file.read()
    try:
        text = data.decode()
        return tomllib.loads(text) if name == "TOML" else parse_json(text)
    except RecursionError as error:
        raise ValueError(f"nested too deeply for a {name} file of longreach; mend it there") from error
    except ValueError as error:  # of the decoder and of both parsers
        raise ValueError(f"not a {name} file ({error}); mend it there") from error


def parse_json(text: str | bytes) -> Any:
    """Plain values of strict JSON in which no key comes twice."""
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object: keep one of the two")
    return keys


def read_words(
    kind: type[Kind], words: Mapping[str, Any], spell: Callable[[str], str], start: Kind | None = None
) -> Kind:
    """Make a dataclass of words that a person typed.

    Args:
        kind: the dataclass. Fields of its sections are named as if they were its own.
        words: name of a field -> its word: a number, true or false, text; items with commas between them for a tuple;
            none for None or no numbers at all.
        spell: how the person calls a field, for errors.
        start: values of the fields that no word is given for, instead of their defaults.

    Raises:
        ValueError: a word is unknown, or not of its field's type, or contradicts another.
    """
    values: dict[str, Any] = {}
    for name, leaf in leaves(kind, start).items():
        if name in words and Path in (leaf.type, *get_args(leaf.type)):
            _check_paths(spell(name), words[name])
        value = _plain(words[name], leaf.type) if name in words else leaf.default
        if value is not dataclasses.MISSING:
            section = values
            for part in leaf.path[:-1]:
                section = section.setdefault(part, {})
            section[name] = value
    return read_values(kind, values, lambda path: spell(next((p for p in path[::-1] if isinstance(p, str)), "")))


def _check_paths(spelled: str, words: str | list[str]) -> None:
    """Refuse what Python takes for the folder that one stands in, and what no system has a file for."""
    for word in [words] if isinstance(words, str) else words:
        if not word or "\0" in word:
            raise _no_path(spelled, word)


def _no_path(name: str, word: str) -> ValueError:
    return ValueError(f"{name}={word!r}: give a path, or . for this folder")


def read_word(kind: type[Kind], word: str, name: str) -> Kind:
    """One word as a number, text or whatever a field of this type would make of it; ValueError that names it if not."""
    return read_values(kind, _plain(word, kind), lambda path: name)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A field of a dataclass or of one of its sections."""

    path: tuple[str, ...]
    """The sections, and its name."""
    type: Any
    """As it is declared."""
    default: Any
    """What it is when nothing is given; `dataclasses.MISSING` where something must be."""
    owner: type[Any]
    """The dataclass that has it."""


def leaves(kind: type[Any], start: Any = None) -> dict[str, Leaf]:
    """Name -> field, of a dataclass and its sections, in which no name may come twice.

    Defaults are those of the dataclass, or what start, an instance of it, has.
    """
    found: dict[str, Leaf] = {}
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, annotation = field.name, types[field.name]
        if start is not None:
            default = getattr(start, name)
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        inner = {name: Leaf((name,), annotation, default, kind)}
        if dataclasses.is_dataclass(annotation):
            inner = {
                key: dataclasses.replace(leaf, path=(name, *leaf.path))
                for key, leaf in leaves(annotation, default).items()  # type: ignore[arg-type]
            }
        if both := sorted(found.keys() & inner.keys()):
            raise TypeError(f"{kind.__name__} and its sections have two fields named {both[0]}: rename one")
        found |= inner
    return found


def _plain(word: Any, annotation: Any) -> Any:
    """What a word stands for, as JSON has it; one that does not fit stays as it is, for `read_values` to refuse."""
    parts = get_args(annotation)
    if isinstance(word, list):
        return [_plain(item, parts[0]) for item in word]
    if get_origin(annotation) is tuple:
        if word == "none" and parts[0] is not str:  # among names, none is a method
            return []
        return [_plain(item.strip(), parts[0]) for item in word.split(",")]
    if get_origin(annotation) in (Union, UnionType):
        inner = next(part for part in parts if part is not NoneType)
        return None if word == "none" and NoneType in parts else _plain(word, inner)
    if annotation is bool:
        return {"true": True, "false": False}.get(word, word)
    if annotation is Path and word.startswith("~"):  # shells leave it as it is behind an equals sign
        return str(expanded(word))
    if annotation in (int, float) and word.isascii() and "_" not in word:  # Python takes other digits, and 1_0 for 10
        try:
            return annotation(word)
        except ValueError:
            return word
    return word


def read_values(kind: type[Kind], values: Any, spell: Callable[[Place], str] = dotted) -> Kind:
    """Make a dataclass of plain values, as JSON and TOML have them.

    Args:
        kind: the dataclass.
        values: a table of its fields; a table for a dataclass in it, a list for a tuple.
        spell: how errors name a place in it.

    Raises:
        ValueError: a key is unknown or missing, or a value is of the wrong type or out of range.
    """
    try:
        _check_plain(values, (), spell)
        text = json.dumps(values, default=_encoded)
    except RecursionError as error:
        raise ValueError("the values are nested too deeply; mend them") from error
    try:
        # As JSON, for there a list is what a tuple is written as and an integer is a number, with types strict.
        return _adapter(kind).validate_json(text, strict=True, extra="forbid")  # type: ignore[arg-type]
    except ValidationError as error:
        raise ValueError(_refusal(kind, error, spell)) from error


def check_fields(entry: Any) -> None:
    """Check what a dataclass was made of as what is read is checked; integers given for numbers become floats.

    For `__post_init__` of those that Python code makes past any type checker.

    Raises:
        ValueError: a field is of the wrong type, or a number in it is not finite or does not fit 64 bits.
    """
    types = get_type_hints(type(entry))
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        _check_plain(value, (field.name,), dotted)
        try:
            read = _adapter(types[field.name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(_refusal(types[field.name], error, below(field.name))) from error
        object.__setattr__(entry, field.name, read)


def refuse_below(config: Any, least: int, *names: str) -> None:
    """Raise ValueError for fields of a configuration below a number, or with an item below it; None is let through."""
    for name in names:
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        if any(item is not None and item < least for item in items):
            mend = "a positive integer" if least else "at least 0"
            raise ValueError(f"{name}={','.join(map(str, items))}: give {mend}{' for each' if len(items) > 1 else ''}")


def refuse_empty(config: Any, *names: str) -> None:
    """Raise ValueError for texts of a configuration that are paths, or may be, and empty: Python takes "" for the
    folder that one stands in.
    """
    for name in names:
        value = getattr(config, name)
        if "" in (value if isinstance(value, tuple) else (value,)):
            raise _no_path(name, "")


def refuse_repeats(config: Any, *names: str, read: Callable[[Any], Any] = lambda item: item) -> None:
    """Raise ValueError for lists of a configuration in which anything stands twice, however `read` finds it spelled."""
    for name in names:
        value = getattr(config, name)
        if len(set(map(read, value))) < len(value):
            raise ValueError(f"{name}={','.join(map(str, value))}: give each once")


def plain_values(instance: Any) -> dict[str, Any]:
    """What `read_values` made a dataclass of, without what is None, for which TOML has no word.

    Args:
        instance: of a dataclass; dataclasses in it become tables, tuples lists.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = plain_values(value)
        elif value is not None:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def _encoded(value: Any) -> Any:
    """What JSON has for a value that TOML or a dataclass may hold."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _check_plain(value: Any, path: Place, spell: Callable[[Place], str]) -> None:
    """Refuse numbers that are not finite or do not fit 64 bits, and text that UTF-8 has not, wherever they stand."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{spell(path)} has the key {key!r}: give text")
            _check_plain(item, (*path, key), spell)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, (*path, index), spell)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{spell(path)} does not fit 64 bits: give a smaller number")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{spell(path)}={value}: give a finite number")
    elif isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{spell(path)}={value!r}: give text that UTF-8 can hold")
    elif not (isinstance(value, int | float | str | Path | date | time | NoneType) or dataclasses.is_dataclass(value)):
        raise ValueError(f"{spell(path)}={value!r}: give text or a number")


def _refusal(kind: type[Any], error: ValidationError, spell: Callable[[Place], str]) -> str:
    """The first of a validation's mistakes in one line: the name, the value and the mend."""
    # A misspelt key is also a missing one; its own refusal says more.
    first = min(error.errors(include_url=False), key=lambda found: found["type"] != "unexpected_keyword_argument")
    path, mistake, value = first["loc"], first["type"], first["input"]
    if mistake == "value_error":  # of a dataclass's own checks, which name what they refuse
        cause, owner = str(first["ctx"]["error"]), _kind_at(kind, path)
        refusal = respelled(cause, {name: spell((*path, *place)) for name, place in _places(owner)})
        if refusal == cause and path and spell is dotted:
            return f"{dotted(path)}: {cause}"
        lacking = (field for field in dataclasses.fields(owner) if isinstance(value, dict) and field.name not in value)
        return marked(refusal, {spell((*path, field.name)): field.default for field in lacking})
    if mistake == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(_kind_at(kind, path[:-1]))]
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        mend = f"did you mean {near[0]}? Known" if near else "known"
        return f"unknown key {dotted(path)!r}: {mend} are {', '.join(known)}"
    if mistake == "missing" and isinstance(path[-1], str):
        return f"{spell(path)} is missing: give it"
    if mistake == "missing":
        path = path[:-1]
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    mend = _MENDS.get(mistake, first["msg"].removeprefix("Input should be "))
    if mistake == "tuple_type" and isinstance(value, list):  # of Python code, for files have lists alone
        mend = "a tuple"
    return f"{spell(path)}={shown}: give {mend}"


def _kind_at(kind: Any, path: Place) -> Any:
    """The dataclass that stands at a place."""
    for part in path:
        if isinstance(part, str) and get_origin(kind) is not dict:
            kind = get_type_hints(kind)[part]
            if get_origin(kind) is dict:  # its keys are in the path, too
                continue
        kind = next((inner for inner in get_args(kind) if dataclasses.is_dataclass(inner)), kind)
    return kind


def _places(kind: Any) -> Iterator[tuple[str, Place]]:
    """Name and place of each field of a dataclass and of those in it, the inner ones first."""
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            yield from ((name, (field.name, *place)) for name, place in _places(types[field.name]))
    yield from ((field.name, (field.name,)) for field in dataclasses.fields(kind))
