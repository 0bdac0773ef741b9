import math

import pytest

from longreach.report.entries import growth, loss_ratio, perplexity_lengths


def test_perplexity_is_of_those_trained_or_asked(empty, record, training, skipped, found, strided):
    entries = [record("a", 128, 9.0), training("a", 64), skipped("a", 64, "why", 32), found("a", 8, 0.0, 1, 10, 16)]
    entries += [training("a", 256), found("a", 256, 0.0, 1, train_length=256)]  # asked for something else
    assert perplexity_lengths(empty.add(*entries, strided("a", 4, 9.0, 4))) == (32, 64, 128)


def test_ratios_of_losses_survive_perplexities_that_do_not(empty, record, offset):
    assert loss_ratio(offset("a", 0, math.inf), offset("a", 0, math.inf)) == 1
    assert loss_ratio(offset("a", 0, math.inf), offset("a", 0, 1.0)) == math.inf
    assert loss_ratio(record("a", 128, 12.0), record("a", 128, 8.0)) == pytest.approx(1.5)
    assert growth(empty.add(record("a", 128, math.inf), record("a", 256, 9.0)), "a", 128, 256) is None
