"""Models that the tests extend."""

import pytest
import torch
from family_models import FAMILIES


@pytest.fixture(params=FAMILIES)
def model(request):
    """A tiny model of each family in turn, trained on 32 tokens as far as its configuration tells."""
    return FAMILIES[request.param]()


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield
