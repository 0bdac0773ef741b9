import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.reading import check_fields, leaves, read_file, read_values, read_words


@dataclass(frozen=True)
class Section:
    steps: int = 4
    rate: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    names: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    compiled: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a positive integer")
        if "no" in self.names:
            raise ValueError("there are names that do not fit")
        if self.names == ("few",) and self.steps > 2:
            raise ValueError(f"steps={self.steps}: give at most 2 for names=few")


@dataclass(frozen=True)
class Whole:
    method: str
    train: Section = Section()
    folder: Path = Path("here")
    sections: tuple[Section, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def spell(name):
    return f"--{name}"


DEEP = 5000
INTEGERS = st.integers(-(2**63), 2**63 - 1)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SECTIONS = st.builds(
    Section,
    steps=st.integers(1, 2**63 - 1),
    rate=NUMBERS,
    betas=st.tuples(NUMBERS, NUMBERS),
    names=st.lists(st.text().filter(lambda name: name not in ("no", "few"))).map(tuple),
    lengths=st.lists(INTEGERS).map(tuple),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    compiled=st.booleans(),
    limit=st.none() | INTEGERS,
)


@given(st.builds(Whole, method=st.text(), train=SECTIONS, sections=st.lists(SECTIONS, max_size=2).map(tuple)))
def test_plain_values_become_what_they_were_made_of(whole):
    assert read_values(Whole, dataclasses.asdict(whole)) == whole


def test_an_integer_is_a_number_and_becomes_one():
    assert type(read_values(Section, {"rate": 3}).rate) is float


@dataclass(frozen=True)
class Named:
    sections: dict[str, Section]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stepz": 3}, r"^unknown key 'sections\.a\.stepz': did you mean steps\?"),
        ({"steps": 0}, r"^sections\.a\.steps=0: give a positive integer$"),
        ({"names": ["no"]}, r"^sections\.a: there are names that do not fit$"),
    ],
)
def test_places_in_a_table_of_tables_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        read_values(Named, {"sections": {"a": section}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstepz = 3\n", r"unknown key 'train\.stepz': did you mean steps\? Known are steps, rate, "),
        ("methodd = 3\n", r"unknown key 'methodd': did you mean method\?"),
        ("colour = 3\n", r"unknown key 'colour': known are method, train, "),
        ("[[sections]]\nstepz = 3\n", r"unknown key 'sections\[0\]\.stepz': did you mean steps\?"),
        ("", r"method is missing: give it$"),
        ("method = 3\n", r"method=3: give text$"),
        ("[train]\nsteps = 3.5\n", r"train\.steps=3\.5: give an integer$"),
        ("[train]\nsteps = true\n", r"train\.steps=True: give an integer$"),
        ("[train]\nsteps = '3'\n", r"train\.steps='3': give an integer$"),
        ("[train]\nsteps = 1979-05-27\n", r"train\.steps='1979-05-27': give an integer$"),
        ("[train]\nsteps = 0\n", r"train\.steps=0: give a positive integer$"),
        ("[train]\nnames = ['few']\n", r"train\.steps=4 \(the default\): give at most 2 for train\.names=few$"),
        ("[train]\nnames = ['no']\n", r"train: there are names that do not fit$"),
        ("[train]\nrate = 'fast'\n", r"train\.rate='fast': give a number$"),
        ("[train]\nrate = nan\n", r"train\.rate=nan: give a finite number$"),
        ("[train]\nrate = -inf\n", r"train\.rate=-inf: give a finite number$"),
        ("[train]\nlimit = 9223372036854775808\n", r"train\.limit does not fit 64 bits: give a smaller number$"),
        ("[extra]\ndeep = [1, inf]\n", r"extra\.deep\[1\]=inf: give a finite number$"),
        ("[train]\nbetas = 3\n", r"train\.betas=3: give a list$"),
        ("[train]\nbetas = [1]\n", r"train\.betas=\[1\]: give more items$"),
        ("[train]\nbetas = [1, 2, 3]\n", r"train\.betas=\[1, 2, 3\]: give fewer items$"),
        ("[train]\nbetas = [1, 'x']\n", r"train\.betas\[1\]='x': give a number$"),
        ("[train]\ncompiled = 1\n", r"train\.compiled=1: give true or false$"),
        ("[train]\nnorm = 'batchnorm'\n", r"train\.norm='batchnorm': give 'layernorm' or 'rmsnorm'$"),
        ("train = 3\n", r"train=3: give a table$"),
        ("extra = 3\n", r"extra=3: give a table$"),
        ("method = 'a'\nmethod = 'b'\n", r"not a TOML file \(Cannot overwrite a value"),
        ("method = = 3\n", r"not a TOML file \(Invalid value \(at line 1"),
        ("method = " + "[" * DEEP + "]" * DEEP, r"nested too deeply for a TOML file of longreach; mend it there$"),
        ("extra" + ".a" * DEEP + " = 1", r"the values are nested too deeply; mend them$"),
        ("[train]\nsteps = " + "9" * DEEP, r"not a TOML file \(Exceeds the limit"),
        (f"[train]\nsteps = '{'9' * DEEP}'", r"train\.steps='9{199}\.\.\.: give an integer$"),
    ],
)
def test_mistakes_in_toml_are_one_line_that_names_them(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text if text.startswith(("method", "colour")) or not text else f"method = 'a'\n{text}")
    with pytest.raises(ValueError, match=rf"config\.toml: {message}") as raised:
        read_file(Whole, path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"null", "the whole=None: give a table$"),
        (b"[]", r"the whole=\[\]: give a table$"),
        (b"", r"not a JSON file \(Expecting value"),
        (b"{", r"not a JSON file \(Expecting property name"),
        (b"\xef\xbb\xbf{}", r"not a JSON file \(Unexpected UTF-8 BOM"),
        (b"\xff\xfe{}", r"not a JSON file \('utf-8' codec can't decode byte 0xff in position 0"),
        (b'{"method": "a", "method": "b"}', r"not a JSON file \(the key 'method' comes twice in one object: keep one"),
        (b'{"extra": [{"a": 1, "b": 2, "b": 3}]}', r"not a JSON file \(the key 'b' comes twice"),
        (b'{"method": null}', "method=None: give text$"),
        (b'{"method": "\\ud800"}', r"method='\\ud800': give text that UTF-8 can hold$"),
        (b'{"train": {"rate": NaN}}', r"train\.rate=nan: give a finite number$"),
        (b'{"train": {"rate": 1e999}}', r"train\.rate=inf: give a finite number$"),
        (b"[" * DEEP + b"]" * DEEP, "nested too deeply for a JSON file of longreach; mend it there$"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deeply for a JSON file of longreach; mend it there$"),
        (b"9" * DEEP, r"not a JSON file \(Exceeds the limit"),
    ],
    ids=range(15),
)
def test_mistakes_in_json_are_one_line_that_names_them(tmp_path, data, message):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"config\.json: {message}") as raised:
        read_file(Whole, path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.toml: no such file$"):
        read_file(Whole, tmp_path / "config.toml")


@given(st.sampled_from(["x.toml", "x.json"]), st.binary(max_size=30) | st.text(max_size=30).map(str.encode))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    refusal = ""
    try:
        assert isinstance(read_file(Section, path), Section)
    except ValueError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_words_are_read_by_the_types_of_their_fields():
    words = {
        "method": "3",
        "steps": "7",
        "rate": ".5e1",
        "betas": "0.1, 0.2",
        "names": "none,3",
        "lengths": "1,2",
        "compiled": "true",
        "limit": "none",
        "folder": "a b",
    }
    train = Section(7, 5.0, (0.1, 0.2), ("none", "3"), (1, 2), compiled=True)
    assert read_words(Whole, words, spell) == Whole("3", train, Path("a b"))
    assert read_words(Whole, {"lengths": "none"}, spell, Whole("x", train)).train.lengths == ()


def test_words_change_what_they_start_from():
    start = Whole("x", Section(limit=3), Path("there"), extra={"a": [None]})
    assert read_words(Whole, {}, spell, start) == start
    assert read_words(Whole, {"steps": "9"}, spell, start) == dataclasses.replace(start, train=Section(9, limit=3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "a", "steps": "ten"}, "--steps='ten': give an integer"),
        ({"method": "a", "steps": "3.0"}, "--steps='3.0': give an integer"),
        ({"method": "a", "steps": ""}, "--steps='': give an integer"),
        ({"method": "a", "steps": "٣"}, "--steps='٣': give an integer"),
        ({"method": "a", "rate": "٣.٣"}, "--rate='٣.٣': give a number"),
        ({"method": "a", "steps": "none"}, "--steps='none': give an integer"),
        ({"method": "a", "limit": "some"}, "--limit='some': give an integer"),
        ({"method": "a", "steps": "9" * 20}, "--steps does not fit 64 bits: give a smaller number"),
        ({"method": "a", "steps": "0"}, "--steps=0: give a positive integer"),
        ({"method": "a", "rate": "nan"}, "--rate=nan: give a finite number"),
        ({"method": "a", "lengths": "1,,2"}, "--lengths='': give an integer"),
        ({"method": "a", "betas": "1"}, "--betas=[1.0]: give more items"),
        ({"method": "a", "compiled": "yes"}, "--compiled='yes': give true or false"),
        ({"method": "a", "norm": "x"}, "--norm='x': give 'layernorm' or 'rmsnorm'"),
        ({"method": "\udcff"}, "--method='\\udcff': give text that UTF-8 can hold"),
        ({}, "--method is missing: give it"),
    ],
)
def test_mistakes_in_words_name_the_option(words, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared)
        read_words(Whole, words, spell)
    assert str(raised.value) == message


@dataclass(frozen=True)
class Measured:
    count: int
    share: float = 0.0
    section: Section = Section()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)


def test_what_is_measured_is_checked_as_what_is_read():
    measured = Measured(3, 1)
    assert (type(measured.share), measured) == (float, Measured(3, 1.0))
    section = Section(2)
    assert Measured(3, section=section).section is section


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": True}, "count=True: give an integer"),
        ({"count": 3.0}, "count=3.0: give an integer"),
        ({"count": np.int64(3)}, "count=np.int64(3): give text or a number"),
        ({"count": 2**63}, "count does not fit 64 bits: give a smaller number"),
        ({"share": float("nan")}, "share=nan: give a finite number"),
        ({"section": {}}, "section={}: give an instance of Section"),
        ({"extra": {"a": [object]}}, "extra.a[0]=<class 'object'>: give text or a number"),
        ({"extra": {3: 4}}, "extra has the key 3: give text"),
    ],
)
def test_mistakes_in_what_is_measured_name_the_field(changes, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared)
        Measured(**{"count": 1, **changes})
    assert str(raised.value) == message


def test_two_fields_of_one_name_are_no_options():
    @dataclass(frozen=True)
    class Twice:
        steps: int = 1
        train: Section = Section()

    with pytest.raises(TypeError, match="two fields named steps"):
        leaves(Twice)
