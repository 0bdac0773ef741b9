import pytest
import torch

from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder


@pytest.fixture(scope="session")
def build():
    """A function that gives a small decoder for evaluation, with weights that make positions matter."""

    def make(method="alibi", dtype=torch.float64, seed=0, **architecture):
        fields = {"num_layers": 2, "num_heads": 4, "d_model": 32, "vocab_size": 50, "train_length": 8, **architecture}
        model = Decoder(ModelConfig(method=method, **fields)).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("log_slopes"):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def tokens_of():
    """A function that gives (B, T) random token ids below 50."""
    return lambda *shape, seed=0: torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))
