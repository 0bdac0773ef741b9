import pytest
from sample_records import at_seed

from longreach.report.subjects.strides import cells_of, stride_grid, strides


def test_strides_are_of_methods_that_slide(empty, record, strided):
    results = empty.add(record("a", 128, 9.0), record("b", 128, 9.0), strided("b", 256, 8.0), strided("b", 512, 7.0))
    (found,) = cells_of(results, 128).values()
    perplexities = {place: entry.perplexity for place, entry in found.items()}
    assert perplexities == pytest.approx({(128, None): 9.0, (256, 1): 8.0, (512, 1): 7.0})


def test_a_fall_that_sliding_takes_away_is_named(empty, record, strided):
    # The paper's Tables 2, 13 and 15 at L = 512, up to the scale of the lengths.
    figures = {"alibi": (19.73, 18.40, 17.98, 18.30), "sinusoidal": (20.05, 160.0, 18.35, 360.12)}
    figures |= {"learner": (20.0, 15.0, 19.0, 16.0)}
    entries = []
    for method, (short, long, sliding_short, sliding_long) in figures.items():
        entries += [record(method, 128, short), record(method, 768, long)]
        entries += [strided(method, 128, sliding_short), strided(method, 768, sliding_long)]
        entries += [strided(method, 768, 1.0, stride=64)]
    finding = strides(empty.add(*entries, record("t5", 128, 9.0)), 128)
    assert finding.sentence == (
        "Where windows slide by 1, perplexity from 128 to 768 tokens still falls with learner;"
        " no longer falls with alibi; did not fall before with sinusoidal."
    )
    assert "alibi 0.93x in nonoverlapping windows, 1.02x in sliding" in finding.details


def test_strides_without_two_lengths_or_both_ways(empty, record, strided):
    alone = strides(empty.add(strided("alibi", 256, 9.0, stride=4), strided("alibi", 128, 9.0)), 128)
    assert alone.sentence.startswith("Windows that slide were measured at one length alone")
    one_way = empty.add(strided("alibi", 256, 9.0), strided("alibi", 512, 9.0), record("alibi", 256, 9.0))
    assert "No method was measured both ways" in strides(one_way, 128).sentence


def test_the_stride_of_the_probes_does_not_hide_that_of_the_grid(empty, record, strided):
    entries = [record("alibi", n, 20.0 - n / 256) for n in (128, 256, 512)]
    entries += [strided("alibi", n, 20.0, stride=64) for n in (128, 256, 512)]
    probe = strided("alibi", 128, 19.0, stride=16)
    finding = strides(empty.add(*entries, probe), 128)
    assert finding.sentence == (
        "Where windows slide by 64, perplexity from 128 to 512 tokens no longer falls with alibi."
    )
    shorter = [record("alibi", 64, 21.0), strided("alibi", 64, 21.0, stride=16)]
    finding = strides(empty.add(record("alibi", 128, 19.5), probe, *shorter), 128)
    assert finding.sentence.startswith("Where windows slide by 16, perplexity from 64 to 128 tokens")


def test_strides_with_nonoverlapping_windows_last(empty, record, strided):
    entries = [strided("alibi", n, p, stride=s) for n, p, s in ((128, 17.98, 1), (256, 18.3, 1), (256, 18.2, 64))]
    grid = stride_grid(empty.add(record("alibi", 128, 19.73), record("t5", 128, 19.0), *entries), 128)
    assert grid.columns == (("method",), ("validation", "length"), ("stride", "1"), ("stride", "64"), ("no overlap",))
    assert grid.rows == (("alibi", "128", "17.98", "-", "19.73"), ("alibi", "256", "18.30", "18.20", "-"))


def test_over_seeds_the_disclaimer_is_of_the_mean(empty, record, strided):
    entries = [entry for n in (128, 256) for entry in (record("alibi", n, 9.0), strided("alibi", n, 9.0))]
    alone, both = (empty.add(*(at_seed(e, s) for s in range(seeds) for e in entries)) for seeds in (1, 2))
    assert "one seed" in strides(alone, 128).certainty
    assert strides(both, 128).certainty.endswith("Each figure is the mean over 2 seeds.")
    assert stride_grid(both, 128) == stride_grid(alone, 128)
