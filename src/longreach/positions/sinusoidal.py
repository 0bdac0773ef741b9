"""Sinusoidal position embeddings (Vaswani et al., 2017, arXiv 1706.03762), and the same at shifted positions."""

import math

import torch
from torch import Tensor

from longreach.positions.method import ModelSize, NoOptions, PositionMethod


class Sinusoidal(PositionMethod):
    """x_t + C^-1/2 [sin(t w_0), cos(t w_0), sin(t w_1), ...] with w_i = 10000^(-2i/C).

    The paper multiplies the token embeddings by C^1/2 and adds the waves as they are. Dividing the waves instead
    keeps the same ratio and leaves tied embeddings unscaled.
    """

    def __init__(self, options: NoOptions, size: ModelSize):
        super().__init__()
        if size.d_model % 2:
            raise ValueError(f"d_model={size.d_model} with sinusoidal positions: give an even number")
        self.d_model = size.d_model

    def embed(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Add the waves, computed in float32."""
        pair = torch.arange(0, self.d_model, 2, device=positions.device)
        frequency = torch.exp(pair * (-math.log(10000.0) / self.d_model))  # [C / 2]
        angle = positions[..., None] * frequency  # [B or 1, T, C / 2]
        waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)  # [B or 1, T, C]
        return embeddings + (waves * self.d_model**-0.5).to(embeddings.dtype)


class ShiftedSinusoidal(Sinusoidal):
    """Sinusoidal, every training sequence starting at a position drawn from 0 to the longest length.

    An experiment on why sinusoidal embeddings do not extrapolate: here every position of a long sequence has been
    seen in training, so what remains of the failure is not unseen positions.
    """

    def __init__(self, options: NoOptions, size: ModelSize):
        super().__init__(options, size)
        self.max_training_offset = size.longest_length
