"""Several comparisons as one, so that one page can show what was measured in several folders."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields, replace
from itertools import chain, combinations
from typing import Any

from longreach.results.checks import require_kind
from longreach.results.document import Results
from longreach.results.records import Entry, Provenance, TrainingRecord

_READ = {"text": ("split_seed", "corpus_hash"), "tokenizer": ("tokenizer_hash", "vocab_size")}
"""What was read -> the fields of the provenance that say so: perplexities of other tokens do not compare."""

_RETRIEVAL = ("lines", "topics", "kv", "passkey", "retrieval")

HEEDED_BY: dict[str, tuple[str, ...]] = {
    "valid_lengths": ("perplexity", "positions", *_RETRIEVAL, "qmsum"),
    **dict.fromkeys(("valid_tokens", "tokens_per_batch"), ("perplexity", "positions", "probes")),
    **dict.fromkeys(("protocols", "strides", "word_level"), ("perplexity",)),
    "capped_stride": ("positions", "probes"),
    "offsets": ("probes",),
    **dict.fromkeys(("cases_per_depth", "cases_seed", "num_depths"), _RETRIEVAL),
    "summary_tokens": ("qmsum",),
}
"""Setting of a test -> the tasks that heed it, where not all do: for others it may be anything."""

_IN_KEYS = frozenset({"seed", "tasks", "valid_lengths", "protocols", "strides", "offsets"})
"""Settings that entries have in their keys."""

_COSTS = frozenset({"seconds", "peak_memory", "attention", "exchanged"})
"""What it took to measure, and by what."""


def merge(comparisons: Mapping[str, Results]) -> Results:
    """One comparison that holds what several measured, in their order.

    They may differ in what was compared (methods, training lengths, seeds), in what was asked (tasks, lengths,
    strides), and in the options of their starts, which change no result. What is in several of them and the same in all
    is taken once, with the time and memory that it took in the first.

    Args:
        comparisons: name -> comparison, at least one. The configuration of the merged one has them under these names.

    Raises:
        ValueError: two differ in their text, its split, their tokenizer, or in how models were shaped, trained or
            tested; or both have a model or a measurement that is not the same in both. Or there is none.
        TypeError: comparisons are no mapping, or one is no comparison.
    """
    require_kind("comparisons", comparisons, Mapping, "names and their results, as longreach.results has them")
    for name, results in comparisons.items():
        require_kind(f"comparisons[{name!r}]", results, Results, "Results")
    if not comparisons:
        raise ValueError("comparisons is empty: give at least one")
    one, *others = comparisons.values()
    if not others:
        return one
    for (before, first), (after, second) in combinations(comparisons.items(), 2):
        _check_alike(before, first, after, second)
    kept: dict[Hashable, tuple[str, Entry | TrainingRecord]] = {}
    for source, results in comparisons.items():
        entries: tuple[Entry | TrainingRecord, ...] = (*results.training, *results.entries())
        for entry in entries:
            before, same = kept.setdefault(entry.key, (source, entry))
            if not _are_alike(same, entry):
                raise ValueError(
                    f"{before} and {source} both have {', '.join(map(str, entry.key))}, with different figures: report "
                    "them apart"
                )
    provenances = {source: results.provenance for source, results in comparisons.items()}
    provenance = replace(
        next(filter(_scored_text, provenances.values()), one.provenance),
        starts=tuple(chain.from_iterable(each.starts for each in provenances.values())),
        sources=dict(chain.from_iterable(each.sources.items() for each in provenances.values())),
        config={source: each.config for source, each in provenances.items()},
    )
    return Results(provenance=provenance).add(*(entry for _, entry in kept.values()))


def _are_alike(one: Entry | TrainingRecord, other: Entry | TrainingRecord) -> bool:
    """Whether two of one key are of one training, or have measured the same, whatever that took."""
    if type(one) is not type(other) or isinstance(one, TrainingRecord):
        return one == other
    costs = {field.name: getattr(other, field.name) for field in fields(one) if field.name in _COSTS}
    return replace(one, **costs) == other


def _check_alike(name: str, one: Results, other_name: str, other: Results) -> None:
    # Both are asked: an option that is None is not noted.
    free = _IN_KEYS.union(*(start.options for results in (one, other) for start in results.provenance.starts))
    ours, theirs = _conditions(one, free), _conditions(other, free)
    idle = _idle(one) | _idle(other)
    for what in ours.keys() | theirs.keys():
        sides = [conditions.get(what, {}) for conditions in (ours, theirs)]
        for setting in sorted((sides[0].keys() | sides[1].keys()) - idle) if all(sides) else ():
            values = [side.get(setting, "not given") for side in sides]
            if values[0] != values[1]:
                raise ValueError(
                    f"{setting} is {values[0]} in {name} and {values[1]} in {other_name}: what one table holds must "
                    "agree in that, report them apart"
                )


def _conditions(results: Results, free: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Kind of condition -> name -> value; two comparisons that both have a kind must agree in all of it.

    Settings that are free to differ are none.
    """
    provenance = results.provenance
    read = _READ if _scored_text(provenance) else {"tokenizer": _READ["tokenizer"]}
    found: dict[str, dict[str, Any]] = {kind: {n: getattr(provenance, n) for n in read[kind]} for kind in read}
    found |= {source: {source: digest} for source, digest in provenance.sources.items()}
    for section in ("model", "train", "evaluate"):
        settings = provenance.config.get(section)
        if isinstance(settings, dict):
            found[section] = {f"{section}.{n}": value for n, value in settings.items() if n not in free}
    return found


def _idle(results: Results) -> set[str]:
    """Settings of its test that none of its tasks heeds."""
    test = results.provenance.config.get("evaluate")
    if not isinstance(test, dict) or "tasks" not in test:
        return set()
    return {f"evaluate.{name}" for name, tasks in HEEDED_BY.items() if not set(tasks) & set(test["tasks"])}


def _scored_text(provenance: Provenance) -> bool:
    """Whether a text was scored; retrieval alone reads none."""
    return provenance.corpus_hash != "none"
