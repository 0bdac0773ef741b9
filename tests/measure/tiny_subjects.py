"""Small models with random weights and a small tokenizer, as subjects of evaluation."""

import functools

import torch

from longreach.data.tokenizer import train_tokenizer
from longreach.measure.subject import Subject
from longreach.measure.transformers import HuggingFaceModel
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.results import Model

LENGTH = 16
"""What the configurations below give as the training length."""
CPU = torch.device("cpu")


@functools.cache
def tokenizer():
    """Of about 280 tokens."""
    return train_tokenizer(["the sum of 1 and 2 is 3, the sum of 3 and 4 is 7.\n" * 3], 280)


def with_loud_weights(model, seed=0):
    """Redraws the weights so large that the likeliest token keeps changing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def decoder_subject(method="alibi"):
    model = with_loud_weights(
        Decoder(
            ModelConfig(
                vocab_size=tokenizer().vocab_size,
                train_length=LENGTH,
                method=method,
                num_layers=2,
                num_heads=2,
                d_model=16,
            )
        )
    )
    return Subject(
        identity=Model(method, LENGTH, seed=0),
        model=model,
        tokenizer=tokenizer(),
        vocab_size=tokenizer().vocab_size,
        device=CPU,
        max_length=model.positions.max_length,
        attention=model.attention_impl,
    )


def transformers_model(family):
    """A model of transformers, made from its configuration."""
    import transformers

    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    vocab_size = tokenizer().vocab_size
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": vocab_size, **special}
    llama = {"intermediate_size": 32, "max_position_embeddings": LENGTH, **small}
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, vocab_size=vocab_size, **special
        ),
        "llama": lambda: transformers.LlamaConfig(**llama),
        "bloom": lambda: transformers.BloomConfig(**small),
        "falcon": lambda: transformers.FalconConfig(alibi=True, **small),
        "gemma2": lambda: transformers.Gemma2Config(num_key_value_heads=1, head_dim=8, **llama),
        "granite": lambda: transformers.GraniteConfig(logits_scaling=4.0, **llama),
        "opt": lambda: transformers.OPTConfig(
            ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=LENGTH, **small
        ),
        "mpt": lambda: transformers.MptConfig(
            d_model=16, n_layers=2, n_heads=2, max_seq_len=LENGTH, vocab_size=vocab_size, **special
        ),
        "gptj": lambda: transformers.GPTJConfig(
            n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=LENGTH, vocab_size=vocab_size, **special
        ),
        "mamba": lambda: transformers.MambaConfig(
            hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=vocab_size
        ),
    }[family]()
    return with_loud_weights(transformers.AutoModelForCausalLM.from_config(config))


def transformers_subject(family):
    return Subject(
        identity=Model(family, LENGTH, seed=None),
        model=HuggingFaceModel(transformers_model(family)),
        tokenizer=tokenizer(),
        vocab_size=tokenizer().vocab_size,
        device=CPU,
        max_length=None,
        attention=lambda query_length, key_length, windowed: "sdpa",
    )
