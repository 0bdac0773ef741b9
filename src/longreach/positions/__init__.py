"""Position methods, one file each, behind the interface in `method.py`.

A method is named by a string: its name, then options, as in `rotary:base=500000:scaling=ntk`.
"""

import dataclasses
from typing import Any

from longreach.positions.alibi import Alibi, AlibiOptions
from longreach.positions.fire import Fire, FireOptions
from longreach.positions.kerple import Kerple, KerpleOptions
from longreach.positions.learned import Learned, LearnedOptions
from longreach.positions.method import AttentionPositions, ModelSize, NoOptions, PositionMethod
from longreach.positions.none import NonePositions
from longreach.positions.randomized import RandomizedRotary, RandomizedRotaryOptions
from longreach.positions.rotary import Rotary, RotaryOptions, rotate
from longreach.positions.sandwich import Sandwich, SandwichOptions
from longreach.positions.scaling import parse_scaling
from longreach.positions.sinusoidal import ShiftedSinusoidal, Sinusoidal
from longreach.positions.t5 import T5, T5Options
from longreach.positions.xpos import Xpos, XposOptions
from longreach.reading import read_words

__all__ = [
    "METHODS",
    "AttentionPositions",
    "ModelSize",
    "PositionMethod",
    "build_method",
    "canonical",
    "parse_method",
    "rotate",
    "with_scaling",
]

METHODS: dict[str, tuple[Any, Any]] = {
    "alibi": (Alibi, AlibiOptions),
    "fire": (Fire, FireOptions),
    "kerple": (Kerple, KerpleOptions),
    "learned": (Learned, LearnedOptions),
    "none": (NonePositions, NoOptions),
    "rotary": (Rotary, RotaryOptions),
    "rotary-randomized": (RandomizedRotary, RandomizedRotaryOptions),
    "sandwich": (Sandwich, SandwichOptions),
    "sinusoidal": (Sinusoidal, NoOptions),
    "sinusoidal-shifted": (ShiftedSinusoidal, NoOptions),
    "t5": (T5, T5Options),
    "xpos": (Xpos, XposOptions),
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
        raise ValueError(f"method={spec!r}: give a string, as in rotary:base=500000")
    name, *settings = spec.split(":")
    if name not in METHODS:
        raise ValueError(f"method={spec!r}: give one of {', '.join(METHODS)}")
    words: dict[str, str] = {}
    kind = METHODS[name][1]
    for setting in settings:
        option, equals, word = setting.partition("=")
        if option not in (known := [field.name for field in dataclasses.fields(kind)]) or not equals:
            raise ValueError(
                f"method={spec!r}: {setting!r} is no option of {name}, give OPTION=VALUE with one of "
                f"{', '.join(known) or 'none'}"
            )
        if option in words:
            raise ValueError(f"method={spec!r}: {option} is given twice: give it once")
        words[option] = word
    try:
        return name, read_words(kind, words, str)
    except ValueError as error:
        raise ValueError(f"method={spec!r}: {error}") from error


def canonical(spec: str) -> tuple[str, Any]:
    """As `parse_method`, and equal for all ways to write one method: alibi and alibi:scaling=none are one."""
    name, options = parse_method(spec)
    if hasattr(options, "scaling"):
        options = dataclasses.replace(options, scaling=str(parse_scaling(options.scaling, train_length=2)))
    return name, options


def with_scaling(spec: str, scaling: str) -> str:
    """The method under another scaling: it is tested with weights that it was trained with under its own.

    As with pretrained models, none is the method as it is, none+logn adds to that, and the others take the place of a
    scaling that it has.

    Raises:
        ValueError: the method has no scaling, or not this one.
    """
    name, options = parse_method(spec)
    if scaling == "none":
        return spec
    if not hasattr(options, "scaling"):
        able = (method for method, (_, kind) in METHODS.items() if hasattr(kind, "scaling"))
        raise ValueError(
            f"scaling={scaling!r}: position method {name} has no scaling; give none, or a model of {' or '.join(able)}"
        )
    asked, own = parse_scaling(scaling, train_length=2), parse_scaling(options.scaling, train_length=2)
    if asked.name == "none":
        asked = dataclasses.replace(own, logn=own.logn or asked.logn)
    dataclasses.replace(options, scaling=str(asked))  # refuses what the method does not have
    others = (setting for setting in spec.split(":") if not setting.startswith("scaling="))
    scaled = ":".join((*others, f"scaling={asked}"))
    return spec if asked == own else scaled
