"""Position methods, one file each, behind the interface in `method.py`.

A method is named by a string: its name, then options, as in `rotary:base=500000:scaling=ntk`.
"""

import dataclasses
from typing import Any

from longreach.positions.alibi import Alibi, AlibiOptions
from longreach.positions.learned import Learned, LearnedOptions
from longreach.positions.method import AttentionPositions, ModelSize, PositionMethod
from longreach.positions.none import NoneOptions, NonePositions
from longreach.positions.rotary import Rotary, RotaryOptions, rotate
from longreach.positions.sinusoidal import ShiftedSinusoidal, Sinusoidal, SinusoidalOptions
from longreach.positions.t5 import T5, T5Options
from longreach.reading import read_words

__all__ = ["METHODS", "AttentionPositions", "ModelSize", "PositionMethod", "build_method", "parse_method", "rotate"]

METHODS: dict[str, tuple[Any, Any]] = {
    "alibi": (Alibi, AlibiOptions),
    "learned": (Learned, LearnedOptions),
    "none": (NonePositions, NoneOptions),
    "rotary": (Rotary, RotaryOptions),
    "sinusoidal": (Sinusoidal, SinusoidalOptions),
    "sinusoidal-shifted": (ShiftedSinusoidal, SinusoidalOptions),
    "t5": (T5, T5Options),
}
"""Name -> the method's class and the class of its options."""


def build_method(spec: str, size: ModelSize) -> PositionMethod:
    """Build the method that a string names, as in `alibi` or `rotary:base=500000:scaling=ntk`."""
    name, options = parse_method(spec)
    method: PositionMethod = METHODS[name][0](options, size)
    return method


def parse_method(spec: str) -> tuple[str, Any]:
    """Split `NAME[:OPTION=VALUE...]` into the name and its options.

    Returns:
        The name, a key of METHODS, and an instance of that method's options.

    Raises:
        ValueError: an unknown method or option, or a value that the option does not take.
    """
    if not isinstance(spec, str):
        raise ValueError(f"position method {spec!r}: give a string, as in rotary:base=500000")
    name, *settings = spec.split(":")
    if name not in METHODS:
        raise ValueError(f"position method {name!r}: give one of {', '.join(METHODS)}")
    words: dict[str, str] = {}
    kind = METHODS[name][1]
    for setting in settings:
        option, equals, word = setting.partition("=")
        if option not in (known := [field.name for field in dataclasses.fields(kind)]) or not equals:
            raise ValueError(
                f"option {setting!r} of position method {name}: give OPTION=VALUE with one of "
                f"{', '.join(known) or 'none'}"
            )
        if option in words:
            raise ValueError(f"option {option!r} of position method {name} is given twice in {spec!r}: give it once")
        words[option] = word
    return name, read_words(kind, words, lambda option: f"{name}:{option}")
