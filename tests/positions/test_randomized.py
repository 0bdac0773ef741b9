import pytest
import torch

from longreach.positions import ModelSize, build_method

SIZE = ModelSize(d_model=24, num_heads=3, head_dim=8, train_length=16, longest_length=64)


def drawn(method, length, positions=None):
    """The positions that tokens are given, told by their rotations among those of plain rotary positions."""
    positions = torch.arange(length) if positions is None else positions
    rotation = method.attend(positions[None], length, length).rotation
    everywhere = build_method("rotary", SIZE).attend(torch.arange(300)[None], 300, 300).rotation
    found = (rotation[0][0, 0, :, None] == everywhere[0][0, 0]) & (rotation[1][0, 0, :, None] == everywhere[1][0, 0])
    return found.all(dim=-1).int().argmax(dim=-1)


@pytest.fixture
def method():
    return build_method("rotary-randomized:range=64", SIZE)


def test_a_training_batch_has_a_sorted_subset_of_the_range(method):
    torch.manual_seed(0)
    draws = torch.cat([method.draw(8, 16) for _ in range(200)])  # each for all of a batch of 8
    assert (draws.diff(dim=-1) > 0).all()
    assert draws.min() >= 0
    assert draws.max() < 64
    assert len(draws.unique(dim=0)) == 200
    # Each position is in a quarter of the draws: 50, give or take five deviations of 6.1.
    counts = draws.flatten().bincount(minlength=64)
    assert (counts - 50).abs().max() < 5 * 6.2
    torch.manual_seed(0)
    assert torch.equal(method.draw(8, 16), draws[:1])  # resumed training draws the same


def test_training_passes_are_at_the_positions_that_they_are_given(method):
    method.train()
    given = torch.tensor([0, 3, 17, 63])
    state = torch.get_rng_state()
    assert torch.equal(drawn(method, 4, given), given)
    assert torch.equal(torch.get_rng_state(), state)


def test_at_test_time_a_length_has_one_draw(method):
    method.eval()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = drawn(method, 16)
    assert torch.equal(drawn(method, 16), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.diff() > 0).all()
    assert torch.equal(drawn(method, 64), torch.arange(64))
    assert torch.equal(drawn(method, 16, torch.arange(5, 9)), first[5:9])  # as cached decoding asks
    assert torch.equal(drawn(method, 16, torch.arange(16, 32)), first + 64)
    assert method.depends_on_length


def test_holds_its_range(size):
    assert build_method("rotary-randomized", size()).max_length == 64
    with pytest.raises(ValueError, match=r"^range=8 is below train_length=16: give at least that$"):
        build_method("rotary-randomized:range=8", size())
    for option in ("range=0", "base=1"):
        with pytest.raises(ValueError, match=f": {option}.*: give"):
            build_method(f"rotary-randomized:{option}", size())
