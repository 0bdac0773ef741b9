import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import at_seed

from longreach.data.synthetic import WORDS
from longreach.report.drawing import LIGHT
from longreach.report.heat_maps import shade
from longreach.report.subjects.retrieval import Score, Z, accuracy_grid, retrieval, retrieval_figure, scores


def cells(axes):
    """(column, row) -> text of every cell."""
    return {tuple(math.floor(x) for x in text.get_position()): text.get_text() for text in axes.texts}


@given(st.integers(1, 500).flatmap(lambda cases: st.tuples(st.integers(0, cases), st.just(cases))))
def test_wilson_intervals_end_where_the_share_is_z_deviations_away(counts):
    score = Score(*counts)
    low, high = score.interval
    assert 0 <= low <= score.accuracy + 1e-12
    assert score.accuracy - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            deviation = math.sqrt(end * (1 - end) / score.cases)
            assert abs(score.accuracy - end) == pytest.approx(Z * deviation, rel=1e-6)


def test_wilson_interval_of_no_and_of_all_answers():
    # With p = 0 the upper end solves p = z sqrt(p (1 - p) / n): z^2 / (n + z^2).
    assert Score(0, 10).interval == pytest.approx((0, Z**2 / (10 + Z**2)), abs=1e-15)
    assert Score(10, 10).interval == pytest.approx((10 / (10 + Z**2), 1))


def test_scores_sum_over_depths_of_one_task_and_training_length(empty, found):
    results = empty.add(
        found("alibi", 256, 0.0, 1),
        found("alibi", 256, 1.0, 9, cases=30),
        found("alibi", 128, 0.0, 10),
        found("alibi", 256, 0.0, 10, train_length=256),
        found("alibi", 256, 0.0, 10, task="kv"),
    )
    assert scores("lines", results, 128) == {"alibi": {128: Score(10, 10), 256: Score(10, 40)}}
    assert list(scores("lines", results, 128)["alibi"]) == [128, 256]


def test_accuracy_by_length_with_its_interval_and_cases(empty, found):
    results = empty.add(
        found("alibi", 128, 0.0, 10),
        found("alibi", 128, 1.0, 9),
        found("t5", 128, 0.0, 0),
        found("alibi", 1024, 0.0, 5),
    )
    grid = accuracy_grid("lines", results, 128)
    assert grid.columns == (("method",), ("128", "1x", "10-20 cases"), ("1,024", "8x", "10 cases"))
    # Wilson's interval of 19 of 20, 5 of 10 and 0 of 10, from Brown, Cai and DasGupta's formula by hand.
    assert grid.rows == (("alibi", "95% [76%, 99%]", "50% [24%, 76%]"), ("t5", "0% [0%, 28%]", "-"))
    assert accuracy_grid("kv", results, 128) is None
    assert accuracy_grid("lines", results, 64) is None


def test_the_best_is_named_with_whom_it_cannot_be_told_from(empty, found):
    entries = [found(m, 512, 0.5, n, 20) for m, n in (("t5", 11), ("rotary", 1), ("alibi", 17))]
    finding = retrieval("lines", empty.add(*entries, found("alibi", 128, 0.5, 20, 20)), 128)
    assert finding.sentence == (
        "Trained at 128, alibi finds most, 17 of 20 answers of lines in prompts of 512 tokens (4x the training length);"
        " t5 cannot be told apart from it."
    )
    assert finding.details == "Accuracy: alibi 85% at 512, 100% at 128; t5 55% at 512; rotary 5% at 512."
    assert "20 cases or more" in finding.certainty


def test_one_method_is_not_compared_and_none_is_not_praised(empty, found):
    alone = retrieval("lines", empty.add(found("alibi", 512, 0.5, 17, 20)), 128)
    assert "alibi finds 17 of 20" in alone.sentence
    assert "most" not in alone.sentence
    nothing = retrieval("lines", empty.add(found("alibi", 512, 0.5, 0), found("t5", 512, 0.5, 0)), 128)
    assert "no method finds a single answer" in nothing.sentence
    assert retrieval("lines", empty, 128) is None


def test_a_task_that_is_not_done_at_the_training_length_tells_nothing_of_extrapolation(empty, found):
    entries = [found(m, n, 0.5, 0) for m in ("alibi", "t5") for n in (128, 512)]
    neither = retrieval("lines", empty.add(*entries), 128).sentence
    assert neither.endswith(
        " At 128 tokens alibi and t5 do not do the task either: failing in longer prompts says nothing about"
        " extrapolation."
    )
    one = [found("alibi", 128, 0.5, 9), found("alibi", 512, 0.5, 8), *entries[2:]]
    assert " At 128 tokens t5 does not do the task either" in retrieval("lines", empty.add(*one), 128).sentence
    extrapolates = [found("alibi", 128, 0.5, 0), found("alibi", 512, 0.5, 8)]
    forgets = [found("alibi", 128, 0.5, 9), found("alibi", 512, 0.5, 0)]
    at_it_alone = [found("alibi", 128, 0.5, 0)]
    for others in (extrapolates, forgets, at_it_alone):
        assert "either" not in retrieval("lines", empty.add(*others), 128).sentence


def test_a_task_that_was_not_asked_at_the_training_length_leaves_that_open(empty, found):
    beyond_alone = retrieval("lines", empty.add(found("alibi", 512, 0.5, 0)), 128).sentence
    assert beyond_alone.endswith(" alibi had no prompts of 128 tokens: whether it does the task there is not known.")
    assert "not known" not in retrieval("lines", empty.add(found("alibi", 512, 0.5, 5)), 128).sentence


def test_guessing_one_of_the_told_words_is_not_doing_the_task(empty, found):
    def sentence(correct):
        entries = [found("alibi", n, 0.5, correct, 1000, task="retrieval") for n in (128, 512)]
        return retrieval("retrieval", empty.add(*entries), 128).sentence

    # Wilson's interval begins at 1/108 for 15.2 of 1000: above it more than luck was at work.
    guesses = 1000 / len(WORDS)
    lucky = guesses + Z * math.sqrt(guesses * (1 - 1 / len(WORDS)))
    assert "either" in sentence(math.floor(lucky))
    assert "either" not in sentence(math.ceil(lucky))


def test_a_method_without_the_longest_length_is_not_judged_there(empty, found):
    finding = retrieval("lines", empty.add(found("alibi", 512, 0.5, 3), found("t5", 128, 0.5, 10)), 128)
    assert "alibi finds 3 of 10" in finding.sentence
    assert "t5" not in finding.sentence


def test_retrieval_by_length_and_depth(empty, found):
    results = empty.add(
        found("alibi", 256, 1.0, 3),
        found("alibi", 128, 0.0, 10),
        found("alibi", 256, 0.0, 0),
        found("t5", 128, 0.0, 5),
        found("t5", 512, 0.5, 5, task="kv"),
    )
    first, second = retrieval_figure("lines", results).axes
    assert cells(first) == {(0, 0): "10/10", (1, 0): "0/10", (0, 1): "-", (1, 1): "3/10"}
    assert cells(second) == {(0, 0): "5/10", (1, 0): "-", (0, 1): "-", (1, 1): "-"}
    assert [label.get_text() for label in first.get_xticklabels()] == ["128", "256"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0%", "100%"]
    colours = {patch.get_facecolor()[:3] for patch in (first.patches[0], first.patches[1])}
    assert colours == {shade(1.0, LIGHT), shade(0.0, LIGHT)}
    assert first.get_title(loc="left") == "alibi\ntrained at 128"


def test_answers_of_all_seeds_are_counted_together(empty, found):
    results = empty.add(found("alibi", 512, 0.5, 3), at_seed(found("alibi", 512, 0.5, 8), 1))
    finding = retrieval("lines", results, 128)
    assert "finds 11 of 20 answers" in finding.sentence
    assert "Answers of 2 seeds are counted together" in finding.certainty
    (axes,) = retrieval_figure("lines", results).axes
    assert cells(axes) == {(0, 0): "11/20"}
