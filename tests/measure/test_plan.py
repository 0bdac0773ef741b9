import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.measure.plan import TASKS, EvaluateConfig, planned
from longreach.results import Cell, Model
from longreach.results.merge import HEEDED_BY


@given(st.integers(1, 10**6))
def test_what_follows_from_the_training_length(train_length):
    resolved = EvaluateConfig().resolved(train_length)
    assert resolved.valid_lengths == tuple(train_length * 2**k for k in range(5))
    assert resolved.capped_stride == max(1, train_length // 8)
    assert resolved.offsets[0] == 0
    assert resolved.offsets[-1] == 16 * train_length
    assert resolved.resolved(7) == resolved


def test_what_is_given_stays():
    given_values = EvaluateConfig(valid_lengths=(5, 7), capped_stride=3, offsets=(0, 2))
    assert given_values.resolved(128) == given_values


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"valid_lengths": (0,)}, "valid_lengths=0"),
        ({"valid_lengths": (-4, 8)}, "valid_lengths=-4,8"),
        ({"valid_lengths": (8, 8)}, "valid_lengths=8,8"),
        ({"valid_tokens": 0}, "valid_tokens=0"),
        ({"tokens_per_batch": -1}, "tokens_per_batch=-1"),
        ({"strides": (0,)}, "strides=0"),
        ({"strides": (4, 9), "valid_lengths": (4, 8)}, "strides=9 is over every window: give at most .*=4,8"),
        ({"capped_stride": 0}, "capped_stride=0"),
        ({"offsets": (-1,)}, "offsets=-1: give at least 0"),
        ({"cases_seed": -1}, "cases_seed=-1: give at least 0"),
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": ("perplexity", "speed")}, "tasks='speed': give one or more of perplexity, positions"),
        ({"tasks": ("kv", "kv")}, "tasks=kv,kv"),
        ({"protocols": ("rolling",)}, "protocols='rolling'"),
        ({"protocols": ("sliding-window",)}, "protocols=sliding-window: leave it out and give the strides"),
        ({"cases": "a.jsonl"}, "cases='a.jsonl' with 0 retrieval tasks"),
        ({"cases": "a.jsonl", "tasks": ("kv", "lines")}, "cases='a.jsonl' with 2 retrieval tasks"),
        ({"cases_per_depth": 0}, "cases_per_depth=0"),
        ({"num_depths": 0}, "num_depths=0"),
        ({"tasks": ("qmsum",)}, "meetings=None"),
        ({"meetings": "a.jsonl"}, "meetings='a.jsonl'"),
        ({"summary_tokens": 0}, "summary_tokens=0"),
    ],
)
def test_contradictions_are_named(values, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        EvaluateConfig(**values)


def test_a_stride_over_every_default_length_is_refused_once_they_are_known():
    config = EvaluateConfig(strides=(300,))
    assert config.resolved(32).strides == (300,)
    with pytest.raises(ValueError, match=r"^strides=300 is over every window: give at most .*,128,256$"):
        config.resolved(16)


@pytest.mark.parametrize(
    ("tasks", "longest"),
    [(("kv",), 0), (("kv", "probes"), 9), (("perplexity",), 7), (("perplexity", "probes"), 9), (("positions",), 9)],
)
def test_the_longest_window_that_tasks_score(tasks, longest):
    assert EvaluateConfig(tasks=tasks, valid_lengths=(5, 7)).longest_window(9) == longest


def test_every_piece_of_work_in_order_and_once():
    model = Model("alibi", 8, seed=1)
    config = EvaluateConfig(
        tasks=("perplexity", "kv", "positions", "probes"),
        valid_lengths=(8, 16),
        strides=(8, 1),
        capped_stride=1,
        protocols=("nonoverlapping", "cached", "cached-unbounded"),
    ).resolved(8)
    assert planned(model, config, 100) == (
        Cell("perplexity", model, 8, 8, "nonoverlapping"),
        Cell("perplexity", model, 8, 1, "cached"),
        Cell("perplexity", model, 8, 1, "sliding-window"),  # for the probes too
        Cell("perplexity", model, 16, 16, "nonoverlapping"),
        Cell("perplexity", model, 16, 1, "cached"),
        Cell("perplexity", model, 16, 8, "sliding-window"),
        Cell("perplexity", model, 16, 1, "sliding-window"),
        Cell("perplexity", model, 100, 1, "cached-unbounded"),
        Cell("positions", model, 8),
        Cell("positions", model, 16),
        Cell("decomposition", model, 16),
        Cell("offsets", model, 8),
        Cell("perplexity", model, 8, 1, "cached-shifted"),
        Cell("kv", model, 8),
        Cell("kv", model, 16),
    )


def test_each_setting_is_heeded_by_tasks_that_there_are():
    fields = {field.name for field in dataclasses.fields(EvaluateConfig)}
    assert HEEDED_BY.keys() <= fields
    assert {task for tasks in HEEDED_BY.values() for task in tasks} == set(TASKS)
