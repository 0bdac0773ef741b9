"""Retrieval and summaries: their tables and their sentences."""

import math
from dataclasses import replace

from longreach.data.synthetic import WORDS
from longreach.report.selection import Z
from longreach.report.task_findings import retrieval, summaries
from longreach.report.task_tables import accuracy_grid, summary_grid


def test_accuracy_by_length_with_its_interval_and_cases(empty, found):
    results = empty.add(
        found("alibi", 128, 0.0, 10),
        found("alibi", 128, 1.0, 9),
        found("t5", 128, 0.0, 0),
        found("alibi", 1024, 0.0, 5),
    )
    grid = accuracy_grid(results, "lines", 128)
    assert grid.columns == (("method",), ("128", "1x", "10-20 cases"), ("1,024", "8x", "10 cases"))
    # Wilson's interval of 19 of 20, 5 of 10 and 0 of 10, from Brown, Cai and DasGupta's formula by hand.
    assert grid.rows == (("alibi", "95% [76%, 99%]", "50% [24%, 76%]"), ("t5", "0% [0%, 28%]", "-"))
    assert accuracy_grid(results, "kv", 128) is None
    assert accuracy_grid(results, "lines", 64) is None


def test_the_best_is_named_with_whom_it_cannot_be_told_from(empty, found):
    entries = [found(m, 512, 0.5, n, 20) for m, n in (("t5", 11), ("rotary", 1), ("alibi", 17))]
    finding = retrieval(empty.add(*entries, found("alibi", 128, 0.5, 20, 20)), "lines", 128)
    assert finding.sentence == (
        "Trained at 128, alibi finds most, 17 of 20 answers of lines in prompts of 512 tokens (4x the training length);"
        " t5 cannot be told apart from it."
    )
    assert finding.details == "Accuracy: alibi 85% at 512, 100% at 128; t5 55% at 512; rotary 5% at 512."
    assert "20 cases or more" in finding.certainty


def test_one_method_is_not_compared_and_none_is_not_praised(empty, found):
    alone = retrieval(empty.add(found("alibi", 512, 0.5, 17, 20)), "lines", 128)
    assert "alibi finds 17 of 20" in alone.sentence
    assert "most" not in alone.sentence
    nothing = retrieval(empty.add(found("alibi", 512, 0.5, 0), found("t5", 512, 0.5, 0)), "lines", 128)
    assert "no method finds a single answer" in nothing.sentence
    assert retrieval(empty, "lines", 128) is None


def test_a_task_that_is_not_done_at_the_training_length_tells_nothing_of_extrapolation(empty, found):
    entries = [found(m, n, 0.5, 0) for m in ("alibi", "t5") for n in (128, 512)]
    neither = retrieval(empty.add(*entries), "lines", 128).sentence
    assert neither.endswith(
        " At 128 tokens alibi and t5 do not do the task either: failing in longer prompts says nothing about"
        " extrapolation."
    )
    one = [found("alibi", 128, 0.5, 9), found("alibi", 512, 0.5, 8), *entries[2:]]
    assert " At 128 tokens t5 does not do the task either" in retrieval(empty.add(*one), "lines", 128).sentence
    extrapolates = [found("alibi", 128, 0.5, 0), found("alibi", 512, 0.5, 8)]
    forgets = [found("alibi", 128, 0.5, 9), found("alibi", 512, 0.5, 0)]
    at_it_alone = [found("alibi", 128, 0.5, 0)]
    for others in (extrapolates, forgets, at_it_alone):
        assert "either" not in retrieval(empty.add(*others), "lines", 128).sentence


def test_a_task_that_was_not_asked_at_the_training_length_leaves_that_open(empty, found):
    beyond_alone = retrieval(empty.add(found("alibi", 512, 0.5, 0)), "lines", 128).sentence
    assert beyond_alone.endswith(" alibi had no prompts of 128 tokens: whether it does the task there is not known.")
    assert "not known" not in retrieval(empty.add(found("alibi", 512, 0.5, 5)), "lines", 128).sentence


def test_guessing_one_of_the_told_words_is_not_doing_the_task(empty, found):
    def sentence(correct):
        entries = [found("alibi", n, 0.5, correct, 1000, task="retrieval") for n in (128, 512)]
        return retrieval(empty.add(*entries), "retrieval", 128).sentence

    # Wilson's interval begins at 1/108 for 15.2 of 1000: above it more than luck was at work.
    guesses = 1000 / len(WORDS)
    lucky = guesses + Z * math.sqrt(guesses * (1 - 1 / len(WORDS)))
    assert "either" in sentence(math.floor(lucky))
    assert "either" not in sentence(math.ceil(lucky))


def test_a_method_without_the_longest_length_is_not_judged_there(empty, found):
    finding = retrieval(empty.add(found("alibi", 512, 0.5, 3), found("t5", 128, 0.5, 10)), "lines", 128)
    assert "alibi finds 3 of 10" in finding.sentence
    assert "t5" not in finding.sentence


def test_summaries(empty, summary):
    results = empty.add(summary("bloom", 2048, 0.073), summary("bloom", 4096, 0.166), summary("t5", 4096, 0.15))
    assert summary_grid(results).rows[1] == (
        *("bloom", "128", "4,096", "16.6", "[14.6, 18.6]", "4.2", "[2.2, 6.2]", "8.3", "[6.3, 10.3]", "35", "12"),
    )
    finding = summaries(results)
    assert finding.sentence == (
        "bloom (trained at 128, reading 4,096 tokens) has the highest ROUGE-1 16.6 [14.6, 18.6];"
        " it cannot be told apart from t5 (trained at 128, reading 4,096 tokens)."
    )
    assert finding.details == (
        "Transcripts that did not fit and were cut: 12 of 35 at 2,048 tokens and 12 of 35 at 4,096 tokens."
    )
    other_tokenizer = replace(summary("gpt2", 4096, 0.1), truncated=14)
    assert "and 12-14 of 35 at 4,096 tokens." in summaries(results.add(other_tokenizer)).details
    alone = summaries(empty.add(summary("bloom", 2048, 0.073, half=None)))
    assert alone.sentence == "bloom (trained at 128, reading 2,048 tokens) has ROUGE-1 7.3."
    assert summaries(empty) is None
    assert summary_grid(empty) is None
