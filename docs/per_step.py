"""Measure how far `per_step=True` is from recomputation, and fill the table of docs/extension.md.

python docs/per_step.py
"""

from pathlib import Path

import torch
import transformers
from refresh import fill

import longreach
from longreach.pretrained.attend import fixed_length

TRAIN_LENGTH, PROMPT, LENGTH, VOCABULARY = 32, 32, 128, 50
FAMILIES = {
    "BLOOM": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6),
    "MPT": transformers.MptConfig(vocab_size=VOCABULARY, d_model=48, n_layers=2, n_heads=6, max_seq_len=TRAIN_LENGTH),
    "Falcon": transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, alibi=True
    ),
}


def build(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """Random weights, large enough for attention to have preferences."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    return model


@torch.no_grad()
def decode(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and then of each token alone, through a cache: (LENGTH, V)."""
    cache, parts = transformers.DynamicCache(), []
    for piece in tokens.split([PROMPT] + [1] * (LENGTH - PROMPT), dim=1):
        parts.append(model(piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)[0]


@torch.no_grad()
def differences(config: transformers.PretrainedConfig, scaling: str) -> list[str]:
    """Against the full forward pass: constant L' at any step, per_step at the last step and its mean KL."""
    model = build(config)
    tokens = torch.randint(1, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    longreach.extend(model, scaling=scaling, train_length=TRAIN_LENGTH)
    full = model(tokens).logits[0]
    with fixed_length(model, LENGTH):
        constant = (decode(model, tokens) - full).abs().max().item()
    longreach.extend(model, scaling=scaling, train_length=TRAIN_LENGTH, per_step=True)
    stepwise = decode(model, tokens)
    last = (stepwise[-1] - full[-1]).abs().max().item()
    right, wrong = (logits[-64:].double().log_softmax(-1) for logits in (full, stepwise))
    kl = (right.exp() * (right - wrong)).sum(-1).mean().item()
    return [f"{constant:.0e}", f"{last:.2g}", f"{kl:.2g}"]


def main() -> None:
    rows = [
        f"| {name}, {scaling} | {' | '.join(differences(config, scaling))} |"
        for name, config in FAMILIES.items()
        for scaling in ("linear", "ntk")
    ]
    header = ["| | constant L', largest | per_step, last step | per_step, KL in nats |", "|---|---|---|---|"]
    fill(Path(__file__).parent / "extension.md", "per_step table", "\n".join([*header, *rows]))


if __name__ == "__main__":
    main()
