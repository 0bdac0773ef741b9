import math

import pytest
from sample_records import at_seed

from longreach.report.subjects.differences import difference_grid, differences, ratios_of, sections

T_OF_2 = 4.302653  # Student's t at 95% for two degrees of freedom, from a printed table


@pytest.fixture
def three_seeds(empty, record):
    """Three methods at three seeds: t5 is above alibi by as much at each, rotary now above and now below."""
    curves = {"rotary": (12.5, 10.0, 15.2), "t5": (11.0, 13.25, 15.4), "alibi": (10.0, 12.0, 14.0)}
    entries = [at_seed(record(m, n, p), s) for m, at in curves.items() for s, p in enumerate(at) for n in (128, 256)]
    return empty.add(*entries)


def test_differences_are_paired_by_seed(three_seeds):
    lowest, ratios = ratios_of(three_seeds, 128)
    assert lowest == "alibi"
    logs = [math.log(a / b) for a, b in ((11.0, 10.0), (13.25, 12.0), (15.4, 14.0))]
    mean = sum(logs) / 3
    half = T_OF_2 * math.sqrt(sum((log - mean) ** 2 for log in logs) / 2 / 3)
    ratio = ratios["t5"][256]
    expected = (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(expected, rel=1e-6)
    text = "{:.3f} [{:.3f}, {:.3f}]".format(*expected)
    assert difference_grid(three_seeds, 128).rows[1] == ("t5", text, text)


def test_only_what_the_interval_tells_apart_is_called_different(three_seeds):
    finding = differences(three_seeds, 128)
    assert finding.sentence == (
        "Trained at 128, on the same seeds and tokens, the perplexity of alibi at 256 tokens is below that of t5;"
        " cannot be told from that of rotary."
    )
    assert "may be chance" in finding.certainty


def test_there_is_nothing_to_pair_with_one_seed_or_one_method(demo, everything, empty, record):
    assert list(sections(demo)) == list(sections(everything)) == []
    alone = empty.add(record("alibi", 128, 9.0), at_seed(record("alibi", 128, 8.0), 1))
    assert list(sections(alone)) == []
    other_seed = empty.add(record("alibi", 128, 9.0), at_seed(record("t5", 128, 8.0), 1))
    assert list(sections(other_seed)) == []


def test_a_method_of_one_seed_is_not_taken_for_the_best(three_seeds, record):
    lowest, ratios = ratios_of(three_seeds.add(record("learned", 256, 2.0)), 128)
    assert lowest == "alibi"
    assert "learned" not in ratios
