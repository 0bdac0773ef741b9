import pytest
import torch

from longreach.ops.alibi import alibi_slopes
from longreach.positions import AttentionPositions, build_method


def slopes(spec, size, length):
    given = build_method(spec, size).attend(torch.arange(length)[None], length, length)
    assert given == AttentionPositions(slopes=given.slopes)
    return given.slopes


@pytest.mark.parametrize("length", [1, 16, 64])
def test_gives_the_papers_slopes(size, length):
    assert torch.equal(slopes("alibi", size(), length), alibi_slopes(3))


@pytest.mark.parametrize("length", [1, 16, 64])
def test_a_fixed_factor_multiplies_at_every_length(size, length):
    assert torch.equal(slopes("alibi:scaling=linear-fixed=4", size(), length), alibi_slopes(3) * 0.25)


@pytest.mark.parametrize(("length", "factor"), [(1, 1), (16, 1), (17, 16 / 17), (32, 0.5), (64, 0.25)])
def test_a_dynamic_factor_comes_only_past_the_training_length(size, length, factor):
    assert torch.equal(slopes("alibi:scaling=linear", size(), length), alibi_slopes(3) * factor)
    assert build_method("alibi:scaling=linear", size()).depends_on_length
    assert not build_method("alibi", size()).depends_on_length


def test_a_dynamic_factor_follows_the_given_length_not_the_keys(size):
    method = build_method("alibi:scaling=linear", size())
    given = method.attend(torch.arange(3)[None], 3, 32).slopes
    assert torch.equal(given, alibi_slopes(3) * 0.5)


def test_learned_slopes_start_at_the_papers_and_stay_positive(size):
    method = build_method("alibi:learned=true", size())
    given = method.attend(torch.arange(3)[None], 3, 3).slopes
    torch.testing.assert_close(given, alibi_slopes(3), rtol=1e-6, atol=0)
    given.sum().backward()
    torch.testing.assert_close(method.log_slopes.grad, given.detach())  # d exp(x) / dx
    with torch.no_grad():
        method.log_slopes -= 50.0
    assert (method.attend(torch.arange(3)[None], 3, 3).slopes > 0).all()


def test_learned_and_dynamic_together(size):
    given = slopes("alibi:learned=true:scaling=linear", size(), 64)
    torch.testing.assert_close(given, alibi_slopes(3) * 0.25, rtol=1e-6, atol=0)


def test_fixed_slopes_are_no_weights(size):
    method = build_method("alibi", size())
    assert list(method.parameters()) == []
    assert method.state_dict() == {}


@pytest.mark.parametrize("factor", ["0", "-1", "0.5", "1", "nan"])
def test_factor_out_of_range(size, factor):
    with pytest.raises(ValueError, match=r"^(factor|scaling=linear-fixed)=.*: give a finite number"):
        build_method(f"alibi:scaling=linear-fixed={factor}", size())


def test_logn_multiplies_the_logits_and_leaves_the_slopes(size):
    method = build_method("alibi:scaling=none+logn", size())
    given = method.attend(torch.arange(3)[None], 3, 256)
    assert torch.equal(given.slopes, alibi_slopes(3))
    assert given.logit_factor == pytest.approx(2.0)  # log 256 / log 16
    assert method.depends_on_length
