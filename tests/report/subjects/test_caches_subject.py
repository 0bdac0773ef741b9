from sample_records import at_seed

from longreach.report.subjects.caches import ways, ways_grid, ways_of


def test_ways_hold_the_smallest_stride_beside_a_cache(empty, strided):
    results = empty.add(
        strided("a", 128, 9.0, stride=64),
        strided("a", 128, 8.0, stride=1),
        strided("a", 256, 8.0, stride=1),
        strided("a", 128, 8.5, protocol="cached-shifted"),
    )
    (ways,) = ways_of(results, 128).values()
    assert [(protocol, entry.stride) for protocol, entry in ways.items()] == [
        ("sliding-window", 1),
        ("cached-shifted", 1),
    ]


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
    finding = ways(empty.add(*entries), 128)
    assert finding.sentence == (
        "In windows of 128 tokens, the training length, perplexity beside recomputing holds with alibi (cached, 1.000x)"
        " and t5 (cached, 1.02x); is worse with alibi (shifted, 1.33x), sinusoidal (cached, 5.00x) and sinusoidal"
        " (shifted, 22.22x); is better with t5 (shifted, 0.94x)."
    )
    assert "with stride 1: alibi (cached) 20x; alibi (shifted) as fast" in finding.details
    assert "Within 2% counts as holding" in finding.certainty
    assert "within 5% they count as alike" in finding.certainty
    longer = [strided("alibi", 256, 9.0), strided("alibi", 256, 9.0, protocol="cached")]
    alone = ways(empty.add(*longer, strided("alibi", 128, 9.0, protocol="cached")), 128)
    assert alone.sentence == "Windows of 128 tokens were not both recomputed and cached: nothing to compare."


def test_ways_by_hand(empty, strided):
    results = empty.add(
        strided("sinusoidal", 128, 20.0, stride=4, speed=300.0),
        strided("sinusoidal", 128, 400.0, protocol="cached-shifted", speed=9000.0),
        strided("alibi", 4096, 18.0, protocol="cached-unbounded", speed=4000.0),
    )
    assert ways_grid(results, 128).rows == (
        ("sinusoidal", "recomputed", "128", "4", "20.00", "1.000x", "300"),
        ("sinusoidal", "shifted", "128", "1", "400.00", "20.00x", "9,000"),
        ("alibi", "unbounded", "4,096", "1", "18.00", "-", "4,000"),
    )


def test_over_seeds_the_disclaimer_is_of_the_mean(empty, strided):
    entries = [strided("alibi", 128, 9.0), strided("alibi", 128, 9.0, protocol="cached")]
    alone, both = (empty.add(*(at_seed(e, s) for s in range(seeds) for e in entries)) for seeds in (1, 2))
    assert "of one run on this machine" in ways(alone, 128).certainty
    assert "Speeds are of this machine." in ways(both, 128).certainty
    assert "mean over 2 seeds" in ways(both, 128).certainty
    assert ways_grid(both, 128) == ways_grid(alone, 128)
