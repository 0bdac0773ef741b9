"""AdamW with its groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from longreach.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019, arXiv 1711.05101) over all parameters, fused where the device has it.

    Weight decay is for the matrices of linear layers: embeddings, tied ones too, norms, biases and slopes have none.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = list(model.parameters())
    matrices = {id(p) for p in parameters if p.dim() == 2} - embeddings  # GPT-2's linear layers are no nn.Linear
    groups = [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ...: a linear warm-up, then half a cosine down to final_learning_rate of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def independent_of_steps(config: TrainConfig, done: int) -> bool:
    """Whether the first `done` steps are the same in a longer run: warm-up or no cosine, and no curriculum."""
    return not config.curriculum and (done <= config.warmup_steps or config.final_learning_rate == 1)
