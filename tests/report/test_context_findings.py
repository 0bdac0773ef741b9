import pytest

from longreach.report import context_findings as findings


@pytest.mark.parametrize("make", [findings.loss_by_context, findings.decomposition, findings.strides])
def test_nothing_measured_concludes_nothing(demo, make):
    assert make(demo, 128) is None


@pytest.mark.parametrize("make", [findings.offsets, findings.ways])
def test_nothing_probed_concludes_nothing(demo, make):
    assert make(demo, 128) is None


def test_loss_falls_rises_or_is_level_by_the_intervals(empty, context):
    def curve(method, far, half=0.03):
        return [context(method, 512, 65, 128, 4.5, half=half), context(method, 512, 257, 512, far, half=half)]

    entries = curve("alibi", 4.4) + curve("t5", 4.45) + curve("rotary", 4.7) + curve("none", 1.0, half=None)
    finding = findings.loss_by_context(empty.add(*entries), 128)
    assert finding.sentence == (
        "Past 128 tokens of context, loss falls further with alibi; is level within the intervals with t5;"
        " rises with rotary; cannot be judged with none."
    )
    assert "alibi 4.500 at 65-128 and 4.400 at 257-512" in finding.details
    assert "35 documents" in finding.certainty


def test_loss_is_judged_in_the_longest_windows_and_past_the_training_length_alone(empty, context):
    short = [context("alibi", 128, 1, 64, 5.0), context("alibi", 128, 65, 128, 4.0)]
    assert "nothing was measured" in findings.loss_by_context(empty.add(*short), 128).sentence
    long = [context("alibi", 256, 65, 128, 4.5), context("alibi", 256, 129, 256, 4.4)]
    assert "4.500 at 65-128" in findings.loss_by_context(empty.add(*short, *long), 128).details
    straddling = [context("alibi", 256, 1, 100, 4.5), context("alibi", 256, 101, 256, 4.4)]
    assert "nothing was measured" in findings.loss_by_context(empty.add(*straddling), 128).sentence


def test_use_of_context_is_claimed_only_where_the_split_is_exact(empty, decomposed):
    exact = [
        decomposed("alibi", 512, 0.04, 0.01),
        decomposed("t5", 512, 0.04, 0.003),
        decomposed("rotary", 512, 0.04, -0.3),
        decomposed("none", 512, 0.04, 0.3, half=None),
        decomposed("alibi", 256, 0.04, -9.0),
    ]
    finding = findings.decomposition(empty.add(*exact), 128)
    assert finding.sentence == (
        "From 128 to 512 tokens (4x), context beyond 128 helps alibi; makes no difference that can be told with t5;"
        " harms rotary; cannot be judged, for want of intervals, with none."
    )
    assert "alibi +0.050 (relief +0.040, beyond +0.010)" in finding.details
    assert "exact" in finding.certainty
    bound = findings.decomposition(empty.add(decomposed("alibi", 512, 0.04, 0.01, stride=16)), 128)
    assert "context beyond 128 may help alibi" in bound.sentence
    assert "slid by 16" in bound.certainty
    assert "beyond is an upper bound" in bound.certainty


def test_a_fall_that_sliding_takes_away_is_named(empty, record, strided):
    # The paper's Tables 2, 13 and 15 at L = 512, up to the scale of the lengths.
    figures = {"alibi": (19.73, 18.40, 17.98, 18.30), "sinusoidal": (20.05, 160.0, 18.35, 360.12)}
    figures |= {"learner": (20.0, 15.0, 19.0, 16.0)}
    entries = []
    for method, (short, long, sliding_short, sliding_long) in figures.items():
        entries += [record(method, 128, short), record(method, 768, long)]
        entries += [strided(method, 128, sliding_short), strided(method, 768, sliding_long)]
        entries += [strided(method, 768, 1.0, stride=64)]
    finding = findings.strides(empty.add(*entries, record("t5", 128, 9.0)), 128)
    assert finding.sentence == (
        "Where windows slide by 1, perplexity from 128 to 768 tokens still falls with learner;"
        " no longer falls with alibi; did not fall before with sinusoidal."
    )
    assert "alibi 0.93x in nonoverlapping windows, 1.02x in sliding" in finding.details


def test_strides_without_two_lengths_or_both_ways(empty, record, strided):
    alone = findings.strides(empty.add(strided("alibi", 256, 9.0, stride=4), strided("alibi", 128, 9.0)), 128)
    assert alone.sentence.startswith("Windows that slide were measured at one length alone")
    one_way = empty.add(strided("alibi", 256, 9.0), strided("alibi", 512, 9.0), record("alibi", 256, 9.0))
    assert "No method was measured both ways" in findings.strides(one_way, 128).sentence


def test_the_stride_of_the_probes_does_not_hide_that_of_the_grid(empty, record, strided):
    entries = [record("alibi", n, 20.0 - n / 256) for n in (128, 256, 512)]
    entries += [strided("alibi", n, 20.0, stride=64) for n in (128, 256, 512)]
    probe = strided("alibi", 128, 19.0, stride=16)
    finding = findings.strides(empty.add(*entries, probe), 128)
    assert finding.sentence == (
        "Where windows slide by 64, perplexity from 128 to 512 tokens no longer falls with alibi."
    )
    shorter = [record("alibi", 64, 21.0), strided("alibi", 64, 21.0, stride=16)]
    finding = findings.strides(empty.add(record("alibi", 128, 19.5), probe, *shorter), 128)
    assert finding.sentence.startswith("Where windows slide by 16, perplexity from 64 to 128 tokens")


def test_positions_change_some_and_leave_others(empty, offset):
    shifted = [offset("shifted", n, p) for n, p in ((0, 30.0), (64, 20.0), (128, 25.0))]
    entries = [*shifted, offset("alibi", 0, 18.0), offset("alibi", 128, 18.1), offset("t5", 0, 9.0)]
    finding = findings.offsets(empty.add(*entries), 128)
    assert finding.sentence == (
        "Trained at 128: raising all positions, by up to 128, leaves the perplexity of alibi as it is;"
        " changes that of shifted (1.50x)."
    )
    assert finding.details == "Lowest and highest perplexity: shifted from 20.00 at 64 to 30.00 at 0."
    lone = findings.offsets(empty.add(offset("t5", 0, 9.0)), 128)
    assert "no method was tested at more than one position" in lone.sentence


def test_a_cache_is_judged_beside_recomputing_at_the_training_length(empty, strided):
    # Past it sinusoidal is as wrong recomputed as it is cached, which is no merit of caches.
    entries = []
    for method, cached, shifted in (("alibi", 18.0, 24.0), ("sinusoidal", 90.0, 400.0), ("t5", 18.35, 17.0)):
        entries += [
            strided(method, 128, 18.0, speed=100.0),
            strided(method, 128, cached, protocol="cached", speed=2000.0),
            strided(method, 128, shifted, protocol="cached-shifted", speed=104.0),
            strided(method, 256, 600.0),
            strided(method, 256, 600.0, protocol="cached"),
            strided(method, 4096, 18.0),
            strided(method, 4096, 18.0, protocol="cached-unbounded"),
        ]
    finding = findings.ways(empty.add(*entries), 128)
    assert finding.sentence == (
        "In windows of 128 tokens, the training length, perplexity beside recomputing holds with alibi (cached, 1.000x)"
        " and t5 (cached, 1.02x); is worse with alibi (shifted, 1.33x), sinusoidal (cached, 5.00x) and sinusoidal"
        " (shifted, 22.22x); is better with t5 (shifted, 0.94x)."
    )
    assert "with stride 1: alibi (cached) 20x; alibi (shifted) as fast" in finding.details
    assert "Within 2% counts as holding" in finding.certainty
    assert "within 5% they count as alike" in finding.certainty
    longer = [strided("alibi", 256, 9.0), strided("alibi", 256, 9.0, protocol="cached")]
    alone = findings.ways(empty.add(*longer, strided("alibi", 128, 9.0, protocol="cached")), 128)
    assert alone.sentence == "Windows of 128 tokens were not both recomputed and cached: nothing to compare."


def test_many_methods_are_counted(empty, decomposed):
    finding = findings.decomposition(empty.add(*(decomposed(f"m{i}", 256, 0.04, 0.01) for i in range(20))), 128)
    assert "helps m0, m1, m2, m3, m4 and 15 more" in finding.sentence
    assert finding.details.endswith("and 15 more.")


def test_without_intervals_none_are_spoken_of(empty, context, decomposed):
    bins = [context("alibi", 512, 65, 128, 4.5, half=None), context("alibi", 512, 257, 512, 4.0, half=None)]
    results = empty.add(*bins, decomposed("alibi", 512, 0.1, 0.1, half=None))
    for make in (findings.loss_by_context, findings.decomposition):
        finding = make(results, 128)
        assert "cannot be judged" in finding.sentence
        assert finding.certainty.startswith(
            "There are no intervals, for there was too little to resample (35 documents)"
        )
