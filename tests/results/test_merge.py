import itertools
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_records import ALIBI, ENTRIES, PROVENANCE, RESULTS, START, TRAINING, record

from longreach.folder import this_start
from longreach.reading import plain_values
from longreach.results import Model, Results, Skipped, merge
from longreach.train.config import TrainConfig
from longreach.verbs.compare import CompareConfig

CONFIG = {
    "methods": ["alibi"],
    "model": {"num_layers": 2, "d_model": 64},
    "train": {"train_length": 128, "steps": 600, "device": "auto", "seed": 0},
    "evaluate": {"tasks": ["perplexity"], "valid_tokens": 16384},
}

STARTED = replace(START, options={"cache": "tokens", "device": "auto"})


def comparison(*entries, config=CONFIG, **provenance):
    fields = {"starts": (STARTED,)} | provenance
    return Results(provenance=replace(PROVENANCE, config=config, **fields)).add(*entries)


def changed(section, **values):
    return CONFIG | {section: CONFIG[section] | values}


def test_one_comparison_stays_as_it_is():
    assert merge({"a": RESULTS}) is RESULTS


def test_all_of_several_is_there_in_their_order_and_what_both_have_once():
    first = comparison(TRAINING, *ENTRIES)
    second = comparison(TRAINING, ENTRIES[0], record("rotary"), starts=(START, START))
    merged = merge({"a": first, "b": second})
    assert merged.training == (TRAINING,)
    assert merged.entries() == first.add(record("rotary")).entries()
    assert len(merged.provenance.starts) == 3
    assert merged.provenance.config == {"a": CONFIG, "b": CONFIG}


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=2, max_size=4))
def test_how_entries_are_spread_over_comparisons_does_not_matter(parts):
    entries = [record(seed=seed) for seed in range(10)]
    merged = merge({str(n): comparison(*(entries[i] for i in sorted(part))) for n, part in enumerate(parts)})
    assert set(merged.records) == {entries[i] for i in set().union(*parts)}


@pytest.mark.parametrize(
    ("config", "provenance", "named"),
    [
        (CONFIG, {"corpus_hash": "c1"}, "corpus_hash is c0 in a and c1 in b"),
        (CONFIG, {"tokenizer_hash": "71"}, "tokenizer_hash is 70 in a and 71 in b"),
        (CONFIG, {"vocab_size": 512}, "vocab_size is 4096 in a and 512 in b"),
        (CONFIG, {"split_seed": 1}, "split_seed is 0 in a and 1 in b"),
        (CONFIG, {"sources": {"runs/alibi": "cd34"}}, "runs/alibi is ab12 in a and cd34 in b"),
        (changed("model", num_layers=4), {}, "model.num_layers is 2 in a and 4 in b"),
        (changed("train", steps=1200), {}, "train.steps is 600 in a and 1200 in b"),
        (changed("evaluate", valid_tokens=4096), {}, "evaluate.valid_tokens is 16384 in a and 4096 in b"),
        (changed("evaluate", word_level=True), {}, "evaluate.word_level is not given in a and True in b"),
    ],
)
def test_what_does_not_compare_is_refused_by_name(config, provenance, named):
    one, other = comparison(record()), comparison(record("rotary"), config=config, **provenance)
    with pytest.raises(ValueError, match=rf"^{named}: .*report them apart$"):
        merge({"a": one, "b": other})


@pytest.mark.parametrize("place", [*itertools.permutations("abc")])
def test_any_two_of_three_must_agree(place):
    # c says nothing of how models were trained, so that it agrees with both others.
    of = {
        "a": comparison(record("alibi")),
        "b": comparison(record("rotary"), config=changed("train", steps=9)),
        "c": comparison(record("none"), config={"evaluate": CONFIG["evaluate"]}),
    }
    with pytest.raises(ValueError, match=r"train\.steps"):
        merge({name: of[name] for name in place})


@pytest.mark.parametrize(
    "config",
    [
        changed("train", seed=7, device="cuda"),
        changed("evaluate", tasks=["positions"], valid_lengths=[64]),
        changed("evaluate", tasks=["perplexity"], cases_per_depth=3, summary_tokens=9),
        changed("evaluate", tasks=["passkey"], valid_tokens=9, word_level=True),
        CONFIG | {"methods": ["rotary"], "seeds": [1]},
        {"models": ["runs/rotary"], "evaluate": CONFIG["evaluate"]},
        {"model": 3, "train": None},
        {},
    ],
)
def test_what_was_compared_and_what_was_asked_may_differ(config):
    merged = merge({"a": comparison(record()), "b": comparison(record("rotary"), config=config)})
    assert merged.methods() == ("alibi", "rotary")


@pytest.mark.parametrize("place", [*itertools.permutations("ab")])
def test_what_either_notes_of_its_starts_as_changing_no_result_may_differ(place):
    noted = replace(START, options={"validate_every": 10})
    of = {
        "a": comparison(record(), config=changed("train", validate_every=None)),
        "b": comparison(record("rotary"), config=changed("train", validate_every=10), starts=(START, noted)),
    }
    assert merge({name: of[name] for name in place}).methods()
    of["b"] = of["b"].started((START,))
    with pytest.raises(ValueError, match=r"train\.validate_every is "):
        merge({name: of[name] for name in place})


OTHERS = {
    **{"compile": True, "recompute": True, "async_checkpoint": True, "on_full_disk": "continue", "device": "cpu"},
    **{"checkpoint_every": 9, "keep_checkpoints": 2, "validate_every": 10, "sample_every": 10, "peak_flops": 1e12},
    **{"track": ("tensorboard",), "parallel": "fsdp", "context_parallel": 2},
}
"""What a setting of a training is not by default."""


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig) if field.metadata.get("may_differ")])
def test_all_that_is_declared_to_change_no_result_may_differ(name):
    def compared(method, train):
        config = CompareConfig(methods=(method,), train=train)
        start = this_start(config, torch.device("cpu"))
        return comparison(record(method), config=plain_values(config), starts=(start,))

    one, other = compared("alibi", TrainConfig()), compared("rotary", TrainConfig(**{name: OTHERS[name]}))
    assert one.provenance.config["train"] != other.provenance.config["train"]
    assert merge({"a": one, "b": other}).methods() == ("alibi", "rotary")
    other = compared("rotary", TrainConfig(**{name: OTHERS[name]}, steps=601))
    with pytest.raises(ValueError, match=r"^train\.steps is 600 in a and 601 in b"):
        merge({"a": one, "b": other})


@pytest.mark.parametrize("place", [*itertools.permutations("ab")])
def test_what_scored_no_text_goes_with_any_and_the_text_is_told(place):
    asked = RESULTS.retrieval[0]
    of = {"a": comparison(record()), "b": comparison(asked, corpus="none", corpus_hash="none", split_seed=None)}
    merged = merge({name: of[name] for name in place})
    assert merged.entries() == (record(), asked)
    assert (merged.provenance.corpus_hash, merged.provenance.split_seed) == ("c0", 0)
    with pytest.raises(ValueError, match="tokenizer_hash is"):
        merge({"a": of["a"], "b": comparison(asked, corpus_hash="none", tokenizer_hash="71")})


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (record(nll=432.0), "perplexity, alibi trained at 128, seed 0, 128, 128, nonoverlapping"),
        (replace(TRAINING, seconds=99.0), "alibi trained at 128, seed 0"),
    ],
)
def test_two_figures_for_one_thing_are_refused(other, named):
    with pytest.raises(ValueError, match=f"^a and b both have {named}, with different figures"):
        merge({"a": comparison(TRAINING, record()), "b": comparison(other)})


def test_what_was_measured_twice_is_taken_once_whatever_it_took():
    slower = replace(record(), seconds=9 * record().seconds, peak_memory=None, attention="cpu")
    merged = merge({"a": comparison(record()), "b": comparison(slower, record("rotary"))})
    assert merged.records == (record(), record("rotary"))
    skipped = Skipped(**record().cell._asdict(), reason="out of memory")
    with pytest.raises(ValueError, match="with different figures"):
        merge({"a": comparison(record()), "b": comparison(skipped)})


def test_seeds_of_one_method_come_together():
    seeds = [comparison(record(seed=seed), config=changed("train", seed=seed)) for seed in range(3)]
    merged = merge({str(number): results for number, results in enumerate(seeds)})
    assert merged.models() == tuple(Model("alibi", 128, seed) for seed in range(3))
    assert ALIBI in merged.models()
