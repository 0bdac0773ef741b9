"""What a value of a record must be, and the one-line errors for what is not."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, get_type_hints

_KINDS: dict[Any, tuple[str, tuple[type[Any], ...]]] = {
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a string", (str,)),
    int | None: ("an integer or null", (int, type(None))),
    str | None: ("a string or null", (str, type(None))),
    float | None: ("a number or null", (int, float, type(None))),
    dict[str, Any]: ("an object", (dict,)),
    dict[str, str]: ("an object of strings", (dict,)),
}


def checked(value: Any, kind: Any, name: str) -> Any:
    """`value` itself if it is of the kind; an integer where a number is due becomes a float."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, kind):  # type: ignore[arg-type]
            raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}: build one")  # type: ignore[union-attr]
        return value
    description, types = _KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {description}, got {value!r}: correct the value or run again")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} does not fit 64 bits: correct the value or run again")
    if value is None or float not in types:
        return value
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number!r}: list the cell as skipped, with the reason")
    return number


def check_fields(entry: Any) -> None:
    """Check every field's type; integers given for numbers become floats."""
    kinds = get_type_hints(type(entry))
    for field in dataclasses.fields(entry):
        object.__setattr__(entry, field.name, checked(getattr(entry, field.name), kinds[field.name], field.name))


def require_positive(entry: Any, *names: str) -> None:
    """Refuse fields that are not above zero."""
    for name in names:
        if getattr(entry, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(entry, name)!r}: correct the value or run again")


def require_not_negative(entry: Any, *names: str) -> None:
    """Refuse fields below zero; None is let through."""
    for name in names:
        value = getattr(entry, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value!r}: correct the value or run again")


def require_distinct(what: str, keys: Iterable[tuple[Any, ...]]) -> None:
    """Refuse a key that appears twice."""
    seen: set[tuple[Any, ...]] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{what} appears twice, {', '.join(map(str, key))}: keep one of the two")
        seen.add(key)


def plain(value: Any, name: str) -> Any:
    """`value` in JSON's own types, so that a configuration is equal to itself after writing and reading."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}, which is not a string: convert it first")
        return {key: plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}: give a number or leave the setting out")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} is {value!r}, which JSON does not know: convert it to a string or a number first")
