"""The fields of dataclasses as options of the command line: their names, their types, and their docstrings as help.

Nothing is converted here: words go to `longreach.reading` as they were typed.
"""

import argparse
import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from longreach.reading import Leaf, leaves, marked, read_words, respelled

SHORT_NAMES = {
    "tasks": "--task",
    "valid_lengths": "--lengths",
    "curriculum": "--lengths",
    "start_from": "--from",
    "scalings": "--scaling",
}
"""Name of a field that is typed often -> a second name of its option; of two in one command the first has it."""

_VALUE = re.compile(r"(?<=[\w-])=(None|True|False)\b")
_WORDS = {"None": "=none", "True": "", "False": ""}
"""Of a value in Python what follows its option: --no-bias says it alone."""

_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


class CommandLine:
    """What a user typed, and the names that it has for the fields which it becomes.

    Args:
        program: as the user calls it.
        about: what it does.
        words: what the user typed after that.
    """

    def __init__(self, program: str, about: str, words: Sequence[str]) -> None:
        self._program, self._about, self._words = program, about, words
        self._names: dict[str, str] = {}
        self._defaults: dict[str, Any] = {}

    def parse(
        self,
        *kinds: type[Any],
        positional: str = "",
        start: Callable[[Mapping[str, Any]], Any] = lambda given: None,
        idle: Callable[[Any], Mapping[str, str]] = lambda config: {},
    ) -> list[Any]:
        """Read the words into dataclasses, or print the help and exit.

        Args:
            kinds: the dataclasses. The fields of all and of their sections become options, which stand beside each
                other.
            positional: the field whose words need no name before them.
            start: given field -> word, the values that the last dataclass starts from; None for its defaults.
            idle: the last dataclass -> the fields that nothing heeds beside its others, and why: they may have any
                value, but whoever types one expects something of it.

        Raises:
            ValueError: an option is unknown, without its word or not heeded, and as `read_words`.
        """
        parser = _parser(self._program, "", kinds, positional)
        given = _split(parser, self._words)
        self._names = _names(parser, self._words)
        started = start(given)
        if given.pop("help", False):
            print(_parser(self._program, self._about, kinds, positional, started).format_help(), end="")
            raise SystemExit(0)
        starts = [*[None] * (len(kinds) - 1), started]
        self._defaults = {
            self._spell(name): leaf.default
            for kind, values in zip(kinds, starts, strict=True)
            for name, leaf in leaves(kind, values).items()
            if name not in given
        }
        configs = [
            read_words(kind, {name: given[name] for name in leaves(kind) if name in given}, self._spell, values)
            for kind, values in zip(kinds, starts, strict=True)
        ]
        for name, reason in idle(configs[-1]).items():
            if name in given:
                raise ValueError(self.spelled(f"{name}={given[name]}: {reason}; leave it out"))
        return configs

    def _spell(self, name: str) -> str:
        """What a field is called that becomes an option, or holds such."""
        return self._names.get(name, name)

    def spelled(self, refusal: str) -> str:
        """A refusal of fields in the words that were typed for them, or are to be, and which are defaults."""
        spelled = marked(respelled(refusal, self._names), self._defaults)
        return _VALUE.sub(lambda value: _WORDS[value[1]], spelled) if spelled.startswith("--") else spelled


def _names(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, str]:
    """Name of a field -> its option as it was typed, by its first name where it was not, or its place."""
    names = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    names |= {action.dest: str(action.metavar) for action in parser._actions if not action.option_strings}
    typed = (word.partition("=")[0] for word in words)
    known = parser._option_string_actions
    return names | {known[option].dest: option for option in typed if option in known}


def _split(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Name of a field -> the word that was typed for it."""
    given, rest = parser.parse_known_intermixed_args(words)
    options = [word.partition("=")[0] for word in rest if word.startswith("-")]
    if options:
        near = difflib.get_close_matches(options[0], parser._option_string_actions, n=1)
        raise ValueError(f"unknown option {options[0]}: {f'did you mean {near[0]}?' if near else 'see --help'}")
    if rest:
        raise ValueError(f"{rest[0]!r} stands alone: give the option that it is for before it, see --help")
    return vars(given)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 and -1,5 are values too

    def error(self, message: str) -> NoReturn:
        ours = message.removeprefix("argument ").replace("ignored explicit argument", "it takes no value, leave out")
        raise ValueError(ours)


def _parser(
    program: str, about: str, kinds: Sequence[type[Any]], positional: str, started: Any = None
) -> argparse.ArgumentParser:
    """The options of all fields, in the sections that they stand in; started has what those of the last begin with."""
    parser = _Parser(
        prog=program,
        usage=" ".join(["%(prog)s", *([positional.upper()] if positional else []), "[options]"]),
        description=about,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="Show this page.")
    groups: dict[str, Any] = {}
    fields = [name for kind in kinds for name in leaves(kind)]
    short = {second: name for name, second in reversed(SHORT_NAMES.items()) if name in fields}
    seconds = {name: [second] for second, name in short.items()}
    for kind in kinds:
        for name, leaf in leaves(kind, started if kind is kinds[-1] else None).items():
            section = leaf.path[0]
            if len(leaf.path) > 1 and section not in groups:
                about_section = documentation(kind)[section]  # type: ignore[arg-type]
                groups[section] = parser.add_argument_group(about_section.rstrip("."))
            _add(groups.get(section, parser), name, leaf, positional, seconds.get(name, []))
    return parser


def _add(group: Any, name: str, leaf: Leaf, positional: str, second_names: list[str]) -> None:
    """Add a field to a group of options."""
    text = _explained(leaf)
    if name == positional:
        many = get_origin(leaf.type) is tuple
        group.add_argument(name, metavar=name.upper(), nargs="*" if many else "?", help=text)
    elif leaf.type is bool:
        group.add_argument(_option(name), action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(_option(name), *second_names, dest=name, metavar=_metavar(leaf.type), help=text)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(annotation: Any) -> str:
    parts = [part for part in get_args(annotation) if part not in (NoneType, Ellipsis)]
    if get_origin(annotation) is Literal:
        return "|".join(parts)
    if get_origin(annotation) is tuple:
        return ",".join([_metavar(part) for part in parts] if len(parts) > 1 else [_metavar(parts[0]), "..."])
    return _METAVARS[parts[0] if parts else annotation]


def _explained(leaf: Leaf) -> str:
    """The help of an option: what its field's docstring says, and its default, unless that is nothing."""
    text, default = documentation(leaf.owner)[leaf.path[-1]], leaf.default
    if default is MISSING:
        text += " (required)"
    elif default is not None and default != ():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text += f" (default: {shown.lower() if isinstance(default, bool) else shown})"
    return text.replace("%", "%%")


@cache
def documentation(kind: type[Any]) -> dict[str, str]:
    """Name of a field -> its docstring, from the source: Python keeps none of them, and under -OO no others either."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, below in pairwise(definition.body if isinstance(definition, ast.ClassDef) else []):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts
