import math
import statistics

import pytest
from sample_records import record

from longreach.results.seeds import (
    OverSeeds,
    loss_difference,
    over_seeds,
    t_quantile,
)

# Two-sided 95% points of Student's t: the tables' three digits (NIST/SEMATECH e-Handbook, 1.3.6.7.2), seven as R's qt
# gives them.
POINTS = {
    1: 12.7062047,
    2: 4.3026527,
    3: 3.1824463,
    4: 2.7764451,
    5: 2.5705818,
    6: 2.4469118,
    7: 2.3646243,
    8: 2.3060041,
    9: 2.2621572,
    10: 2.2281389,
    20: 2.0859634,
    30: 2.0422725,
    100: 1.9839715,
}


@pytest.mark.parametrize(("freedom", "point"), POINTS.items())
def test_published_quantiles(freedom, point):
    assert t_quantile(0.95, freedom) == pytest.approx(point, abs=1e-6)


def test_other_quantiles():
    assert t_quantile(0.99, 5) == pytest.approx(4.0321430, abs=1e-6)
    assert t_quantile(0.5, 1) == pytest.approx(1.0, abs=1e-12)  # Cauchy's quartile
    # With many degrees of freedom the normal distribution's, off by about (z^3 + z) / (4 nu).
    normal = statistics.NormalDist().inv_cdf(0.975)
    assert t_quantile(0.95, 10_000) == pytest.approx(normal + (normal**3 + normal) / 40_000, abs=1e-6)


def test_mean_and_interval_by_hand():
    found = over_seeds([1.0, 2.0, 6.0])
    half = POINTS[2] * math.sqrt(7) / math.sqrt(3)  # the variance is (4 + 1 + 9) / 2
    assert (found.mean, found.n) == (3.0, 3)
    assert (found.low, found.high) == (pytest.approx(3 - half, abs=1e-6), pytest.approx(3 + half, abs=1e-6))
    assert over_seeds([2.0, 2.0]) == OverSeeds(2.0, 2.0, 2.0, 2)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert over_seeds([5.0]) == OverSeeds(5.0, None, None, 1)
    assert over_seeds([0.0]).exponentiated() == OverSeeds(1.0, None, None, 1)
    with pytest.raises(ValueError, match="values is empty"):
        over_seeds([])


def losses(method, values, **changes):
    return [record(method, seed=seed, nll=100 * loss, tokens=100, **changes) for seed, loss in values.items()]


def test_perplexities_are_averaged_as_losses():
    found = over_seeds([math.log(10), math.log(1000)]).exponentiated()
    assert found.mean == pytest.approx(100)
    half = POINTS[1] * math.log(10)  # the standard deviation is ln(100) / sqrt(2)
    assert math.log(found.high) == pytest.approx(math.log(100) + half, abs=1e-6)
    assert math.log(found.low) == pytest.approx(math.log(100) - half, abs=1e-6)
    assert over_seeds([700.0, 800.0]).exponentiated().mean == math.inf


def test_differences_are_paired_by_seed():
    # Seeds differ by much, the methods by 0.1 and 0.3 at each: only pairing sees it.
    ours = losses("alibi", {2: 5.0, 0: 1.0, 7: 9.0})
    theirs = losses("rotary", {0: 1.1, 2: 5.3, 8: 2.0})
    found = loss_difference(ours, theirs)
    assert (found.mean, found.n) == (pytest.approx(-0.2), 2)
    half = POINTS[1] * 0.1
    assert (found.low, found.high) == (pytest.approx(-0.2 - half, abs=1e-6), pytest.approx(-0.2 + half, abs=1e-6))
    ratio = found.exponentiated()
    assert (ratio.mean, ratio.n) == (pytest.approx(math.exp(-0.2)), 2)
    assert loss_difference(ours, losses("t5", {3: 1.0})) is None


def test_growth_with_length_is_a_difference_too():
    own, long = losses("alibi", {0: 4.0, 1: 4.2}), losses("alibi", {0: 4.5, 1: 4.7}, valid_length=512)
    assert loss_difference(long, own).exponentiated().mean == pytest.approx(math.exp(0.5))


def test_models_trained_elsewhere_are_one_each():
    assert loss_difference(losses("bloom", {None: 2.0}), losses("mpt", {None: 1.5})) == OverSeeds(0.5, None, None, 1)


def test_other_texts_have_no_difference():
    alibi = losses("alibi", {0: 1.0, 1: 1.0})
    assert loss_difference(alibi, [record("rotary", tokens=99)]) is None
    assert loss_difference(alibi, losses("rotary", {0: 1.0}, bytes=399)) is None  # of another tokenizer
    assert loss_difference(alibi, losses("rotary", {0: 1.0})).mean == 0


def test_a_seed_given_twice_is_refused():
    alibi = losses("alibi", {0: 1.0})
    with pytest.raises(ValueError, match=r"^entries has seed 0 twice: give each seed once"):
        loss_difference(alibi * 2, alibi)
