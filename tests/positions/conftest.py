import dataclasses

import pytest

from longreach.positions import ModelSize


@pytest.fixture
def size():
    """A function that gives a small model's size with some fields changed."""
    base = ModelSize(d_model=24, num_heads=3, head_dim=8, train_length=16, longest_length=64)
    return lambda **changes: dataclasses.replace(base, **changes)
