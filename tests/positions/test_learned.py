import pytest
import torch

from longreach.positions import AttentionPositions, build_method


def test_adds_the_rows_of_its_table(size):
    method = build_method("learned:table_length=20", size())
    positions = torch.tensor([[0, 19, 3], [4, 4, 0]])
    embeddings = torch.randn(2, 3, 24)
    expected = embeddings + method.table.weight[positions]
    assert torch.equal(method.embed(embeddings, positions), expected)
    assert method.embed(embeddings.bfloat16(), positions).dtype == torch.bfloat16
    assert method.attend(positions, 3, 3) == AttentionPositions()


def test_table_is_as_long_as_training_unless_told(size):
    method = build_method("learned", size())
    assert method.max_length == 16
    assert method.table.weight.shape == (16, 24)
    assert build_method("learned:table_length=64", size()).max_length == 64


def test_rows_start_as_large_as_the_sinusoidal_waves_and_the_embeddings(size):
    torch.manual_seed(0)
    table = build_method("learned:table_length=1000", size()).table.weight
    deviation = 24**-0.5
    assert abs(table.std() / deviation - 1) < 5 / (2 * table.numel()) ** 0.5  # five standard errors


@pytest.mark.parametrize("length", [0, -1])
def test_table_length_out_of_range(size, length):
    with pytest.raises(ValueError, match=rf": table_length={length}: give at least 1$"):
        build_method(f"learned:table_length={length}", size())


def test_table_shorter_than_training(size):
    with pytest.raises(ValueError, match=r"^table_length=8 is below train_length=16: "):
        build_method("learned:table_length=8", size())
