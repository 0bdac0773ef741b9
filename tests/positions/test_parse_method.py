import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.positions import METHODS, parse_method, with_scaling
from longreach.positions.alibi import AlibiOptions
from longreach.positions.fire import FireOptions
from longreach.positions.kerple import KerpleOptions
from longreach.positions.learned import LearnedOptions
from longreach.positions.method import NoOptions
from longreach.positions.randomized import RandomizedRotaryOptions
from longreach.positions.rotary import RotaryOptions
from longreach.positions.sandwich import SandwichOptions
from longreach.positions.t5 import T5Options
from longreach.positions.xpos import XposOptions

SCALINGS = st.sampled_from(["none", "linear", "linear-fixed=2.5", "ntk", "ntk-fixed=4", "linear+logn"])
OF_ROTARY = SCALINGS | st.sampled_from(["yarn", "yarn-fixed=2"])
OPTIONS = {
    "alibi": st.builds(
        AlibiOptions,
        scaling=SCALINGS,
        learned=st.booleans(),
        slopes=st.sampled_from(["paper", "closed", "equal", "random"]),
        exponent=st.floats(0, 64, exclude_min=True),
    ),
    "fire": st.builds(FireOptions, width=st.integers(1, 99), threshold=st.none() | st.floats(1, 1e6)),
    "kerple": st.builds(KerpleOptions, kernel=st.sampled_from(["log", "power"])),
    "learned": st.builds(LearnedOptions, table_length=st.none() | st.integers(1, 10**6)),
    "none": st.just(NoOptions()),
    "rotary": st.builds(RotaryOptions, base=st.floats(1, 1e12, exclude_min=True), scaling=OF_ROTARY),
    "rotary-randomized": st.builds(RandomizedRotaryOptions, range=st.none() | st.integers(1, 10**6)),
    "sandwich": st.builds(SandwichOptions, dimension=st.integers(1, 99).map(lambda half: 2 * half)),
    "sinusoidal": st.just(NoOptions()),
    "sinusoidal-shifted": st.just(NoOptions()),
    "t5": st.builds(T5Options, num_buckets=st.integers(2, 64), max_distance=st.integers(33, 10**6)),
    "xpos": st.builds(XposOptions, gamma=st.floats(0.01, 10), unit=st.integers(1, 10**6)),
}


def spelled(name, options):
    """The string that names a method with these options, each that is not None."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items() if v is not None}
    return ":".join([name, *(f"{option}={text}" for option, text in texts.items())])


def test_every_method_is_covered():
    assert set(OPTIONS) == set(METHODS)


@given(st.sampled_from(sorted(METHODS)).flatmap(lambda name: st.tuples(st.just(name), OPTIONS[name])))
def test_spelled_options_are_read_back(named):
    assert parse_method(spelled(*named)) == named


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_name_gives_the_defaults(name):
    assert parse_method(name) == (name, METHODS[name][1]())


BEGINNINGS = ["", *(f"{name}:" for name in METHODS)] + [
    f"{name}:{field.name}=" for name, (_, options) in METHODS.items() for field in dataclasses.fields(options)
]


@given(st.tuples(st.sampled_from(BEGINNINGS), st.text(max_size=9)).map("".join))
def test_any_text_is_read_or_refused_in_one_line(spec):
    refusal = ""
    try:
        name, options = parse_method(spec)
        assert isinstance(options, METHODS[name][1])
    except ValueError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "method='': give one of alibi, "),
        ("ALiBi", "method='ALiBi': give one of alibi, "),
        (" alibi", "method=' alibi': give one of alibi, "),
        (None, "method=None: give a string"),
        (7, "method=7: give a string"),
        ("alibi:", "method='alibi:': '' is no option of alibi, give OPTION=VALUE with one of scaling, "),
        ("alibi:learned", "method='alibi:learned': 'learned' is no option of alibi, give OPTION=VALUE"),
        ("alibi:base=2", "method='alibi:base=2': 'base=2' is no option of alibi, give OPTION=VALUE"),
        ("alibi:learned=yes", "method='alibi:learned=yes': learned='yes': give true or false"),
        (
            "alibi:scaling=linear-fixed=half",
            "method=.*: scaling='linear-fixed=half': factor='half': give a number",
        ),
        ("rotary:base=half", r"method='rotary:base=half': base='half': give a number"),
        ("rotary:base=", r"method='rotary:base=': base='': give a number"),
        ("learned:table_length=1.5", r"method='learned:table_length=1\.5': table_length='1\.5': give an integer"),
        ("t5:num_buckets=32:num_buckets=64", "method='t5:num_buckets=32:num_buckets=64': num_buckets is given twice"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_method(spec)


@pytest.mark.parametrize(
    ("spec", "scaling", "scaled"),
    [
        ("alibi", "none", "alibi"),
        ("alibi", "linear", "alibi:scaling=linear"),
        ("alibi", "none+logn", "alibi:scaling=none+logn"),
        ("alibi:learned=true", "ntk-fixed=4", "alibi:learned=true:scaling=ntk-fixed=4"),
        ("alibi:scaling=linear", "linear", "alibi:scaling=linear"),
        ("alibi:scaling=linear-fixed=2", "none", "alibi:scaling=linear-fixed=2"),
        ("alibi:scaling=linear-fixed=2", "none+logn", "alibi:scaling=linear-fixed=2+logn"),
        ("alibi:scaling=linear-fixed=2:learned=true", "ntk", "alibi:learned=true:scaling=ntk"),
        ("rotary:base=500", "yarn", "rotary:base=500:scaling=yarn"),
        ("rotary", "yarn-fixed=4", "rotary:scaling=yarn-fixed=4"),
        ("sinusoidal", "none", "sinusoidal"),
    ],
)
def test_a_method_under_another_scaling(spec, scaling, scaled):
    assert with_scaling(spec, scaling) == scaled


@pytest.mark.parametrize(
    ("spec", "scaling", "message"),
    [
        ("sinusoidal", "linear", "scaling='linear': position method sinusoidal has no scaling; give none, or a model"),
        ("t5:num_buckets=8", "ntk", "scaling='ntk': position method t5 has no scaling"),
        ("none", "none+logn", r"scaling='none\+logn': position method none has no scaling"),
        ("alibi", "yarn", 'scaling="yarn" scales the frequencies of rotary positions, and ALiBi has slopes: give one'),
        ("alibi", "cubic", "scaling='cubic': give one of none, "),
    ],
)
def test_scalings_that_a_method_does_not_have(spec, scaling, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        with_scaling(spec, scaling)
