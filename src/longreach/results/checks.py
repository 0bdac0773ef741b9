"""What a value of a record must be beyond its type, and the one-line errors for what is not."""

from collections.abc import Iterable
from typing import Any


def require_kind(name: str, value: object, kind: type[Any] | tuple[type[Any], ...], mend: str) -> None:
    """Refuse what is no instance of a class, or of one of several."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} of {type(value).__name__}: give {mend}")


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
