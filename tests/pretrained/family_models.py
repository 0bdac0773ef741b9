"""Tiny models of the three families, and what they compute, written down anew in float64 from their state dicts."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers

HEADS = 6  # no power of two
WIDTH = 48
VOCABULARY = 50


def bloom(**options):
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=HEADS, **options)
    return _ready(transformers.BloomForCausalLM(config))


def mpt(max_seq_len=32, attn_config=None, **options):
    config = transformers.MptConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        n_heads=HEADS,
        n_layers=2,
        max_seq_len=max_seq_len,
        attn_config=attn_config,
        use_cache=True,
        **options,
    )
    return _ready(transformers.MptForCausalLM(config))


def falcon(heads=HEADS, implementation="sdpa", **options):
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH if heads == HEADS else 8 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        **{
            "alibi": True,
            "multi_query": False,
            "new_decoder_architecture": False,
            "parallel_attn": False,
            "bias": True,
            "max_position_embeddings": 32,
            **options,
        },
    )
    return _ready(transformers.FalconForCausalLM._from_config(config, attn_implementation=implementation))


FAMILIES = {"bloom": bloom, "mpt": mpt, "falcon": falcon}


def _ready(model):
    """Weights large enough for attention to have preferences."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    model.generation_config.eos_token_id = None  # generate to the end
    model.generation_config.pad_token_id = 0
    return model.eval()


@contextmanager
def in_float64():
    """Stock BLOOM and MPT turn their scores into float32 for the softmax, whatever the dtype."""
    softmax = F.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def tokens(batch, length, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def paper_slopes(heads):
    """As the paper's code has it, in plain Python."""
    if math.log2(heads).is_integer():
        return [2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return paper_slopes(power) + paper_slopes(2 * power)[::2][: heads - power]


def oracle(model, ids, slopes, logit_factor=1.0, distance=None):
    """Logits (T, V) in float64 of one row of tokens (T,), with the given slopes (H,), by dense attention."""
    family = model.config.model_type
    weights = {name.removeprefix("transformer."): w.double() for name, w in model.state_dict().items()}
    return _ORACLES[family](model.config, weights, ids, torch.as_tensor(slopes).double(), logit_factor, distance)


def _attention(q, k, v, slopes, scale, bias_scale, distance):
    length = q.shape[1]
    if distance is None:
        distance = torch.arange(length)[:, None] - torch.arange(length)
    distance = distance.double()
    scores = scale * q @ k.mT - bias_scale * slopes[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, float("-inf")).masked_fill(distance.isinf(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)  # [T, C]


def _norm(x, w, name, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), eps)


def _linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _bloom(config, w, ids, slopes, logit_factor, distance):
    x = _norm(w["word_embeddings.weight"][ids], w, "word_embeddings_layernorm")
    for n in range(config.n_layer):
        normed = _norm(x, w, f"h.{n}.input_layernorm")
        q, k, v = _linear(normed, w, f"h.{n}.self_attention.query_key_value").unflatten(-1, (HEADS, 3, -1)).unbind(2)
        q, k, v = (y.transpose(0, 1) for y in (q, k, v))
        out = _attention(q, k, v, slopes, logit_factor * q.shape[-1] ** -0.5, 1.0, distance)
        x = x + _linear(out, w, f"h.{n}.self_attention.dense")
        normed = _norm(x, w, f"h.{n}.post_attention_layernorm")
        hidden = F.gelu(_linear(normed, w, f"h.{n}.mlp.dense_h_to_4h"), approximate="tanh")
        x = x + _linear(hidden, w, f"h.{n}.mlp.dense_4h_to_h")
    return _norm(x, w, "ln_f") @ w["word_embeddings.weight"].T


def _mpt(config, w, ids, slopes, logit_factor, distance):
    x = w["wte.weight"][ids]
    scale = config.attn_config.softmax_scale or (WIDTH // HEADS) ** -0.5
    for n in range(config.n_layers):
        qkv = _linear(_norm(x, w, f"blocks.{n}.norm_1"), w, f"blocks.{n}.attn.Wqkv")
        if config.attn_config.clip_qkv:
            qkv = qkv.clamp(-config.attn_config.clip_qkv, config.attn_config.clip_qkv)
        q, k, v = (y.transpose(0, 1) for y in qkv.unflatten(-1, (3, HEADS, -1)).unbind(1))
        out = _attention(q, k, v, slopes, logit_factor * scale, 1.0, distance)
        x = x + _linear(out, w, f"blocks.{n}.attn.out_proj")
        hidden = F.gelu(_linear(_norm(x, w, f"blocks.{n}.norm_2"), w, f"blocks.{n}.ffn.up_proj"))
        x = x + _linear(hidden, w, f"blocks.{n}.ffn.down_proj")
    return _norm(x, w, "norm_f") @ w["wte.weight"].T


def _falcon(config, w, ids, slopes, logit_factor, distance):
    x = w["word_embeddings.weight"][ids]
    heads = config.num_attention_heads
    for n in range(config.num_hidden_layers):
        normed = _norm(x, w, f"h.{n}.input_layernorm")
        fused = _linear(normed, w, f"h.{n}.self_attention.query_key_value")
        if config.multi_query:
            q, k, v = fused.unflatten(-1, (heads + 2, -1)).split((heads, 1, 1), dim=1)
        else:
            q, k, v = fused.unflatten(-1, (heads, 3, -1)).unbind(2)
        q, k, v = (y.transpose(0, 1) for y in (q, k, v))
        root = q.shape[-1] ** -0.5
        out = _attention(q, k, v, slopes, logit_factor * root, root, distance)
        out = _linear(out, w, f"h.{n}.self_attention.dense")
        if config.parallel_attn:
            x = x + out + _mlp(normed, w, n)
        else:
            x = x + out
            x = x + _mlp(_norm(x, w, f"h.{n}.post_attention_layernorm"), w, n)
    return _norm(x, w, "ln_f") @ w["lm_head.weight"].T


def _mlp(x, w, n):
    return _linear(F.gelu(_linear(x, w, f"h.{n}.mlp.dense_h_to_4h")), w, f"h.{n}.mlp.dense_4h_to_h")


_ORACLES = {"bloom": _bloom, "mpt": _mpt, "falcon": _falcon}
