import math

import pytest

from longreach.positions.scaling import Scaling
from longreach.pretrained.lengths import read_alibi_scaling, write_alibi_scaling


@pytest.mark.parametrize(
    ("alibi_scaling", "scaling"),
    [
        (None, Scaling("none")),
        ({"type": "linear", "factor": 2.0}, Scaling("linear-fixed", factor=2.0)),
        ({"type": "linear", "train_seq_len": 8192}, Scaling("linear", train_length=8192)),
    ],
)
def test_alibi_scaling_there_and_back(alibi_scaling, scaling):
    assert read_alibi_scaling(alibi_scaling) == scaling
    assert write_alibi_scaling(scaling) == alibi_scaling


@pytest.mark.parametrize(
    ("alibi_scaling", "told"),
    [
        ({}, "type=None"),
        ("linear", "alibi_scaling='linear'"),
        ({"type": "dynamic", "factor": 2.0}, "type='dynamic'"),
        ({"factor": 2.0, "train_seq_len": 2048}, "type=None"),
        ({"type": "linear"}, "exactly one"),
        ({"type": "linear", "factor": 2.0, "train_seq_len": 2048}, "exactly one"),
        ({"type": "linear", "factor": 2.0, "base": 10}, "field 'base'"),
        ({"type": "linear", "factor": 2}, "factor=2"),  # the schema says float
        ({"type": "linear", "factor": 1.0}, "factor=1.0"),
        ({"type": "linear", "factor": math.nan}, "factor=nan"),
        ({"type": "linear", "factor": "2.0"}, "factor='2.0'"),
        ({"type": "linear", "train_seq_len": 1}, "train_seq_len=1"),
        ({"type": "linear", "train_seq_len": 2048.0}, "train_seq_len=2048.0"),
        ({"type": "linear", "train_seq_len": True}, "train_seq_len=True"),
    ],
)
def test_alibi_scaling_refused_by_name(alibi_scaling, told):
    with pytest.raises(ValueError, match=told):
        read_alibi_scaling(alibi_scaling)


@pytest.mark.parametrize("scaling", [Scaling("ntk", 2048), Scaling("linear", 2048, logn=True)])
def test_alibi_scaling_has_no_place_for_others(scaling):
    with pytest.raises(ValueError, match=f'^scaling="{scaling.name}'):
        write_alibi_scaling(scaling)
