"""Write a decoder as MPT, which stock transformers loads with the same logits; docs/extension.md names other readers.

MPT is the published architecture that holds our plain ALiBi decoder without loss: BLOOM normalizes its embeddings and
approximates GELU, Falcon rounds slopes to bfloat16.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from longreach.files import blaming, sync
from longreach.models.config import ModelConfig
from longreach.models.decoder import Decoder
from longreach.ops.arguments import validate_kind, validate_path
from longreach.positions import parse_method
from longreach.positions.scaling import require_tokens
from longreach.pretrained.lengths import TRAIN_LENGTH
from longreach.tokenizing import Backend, declared_eos, read_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export_mpt(
    model: Decoder,
    folder: str | os.PathLike[str],
    *,
    max_length: int,
    tokenizer: str | os.PathLike[str] | None = None,
    card_table: str | None = None,
) -> None:
    """Write config.json, model.safetensors, README.md and the tokenizer's files for `MptForCausalLM`.

    The logits are those of `model` up to rounding, which in the stock code grows with length, since it counts its bias
    from the last key. Dropout is not written: MPT's has other places, and only training knows of it. `folder` appears
    whole or not at all, even if the process is killed.

    Args:
        model: a decoder of method "alibi" in the shape that MPT has.
        folder: where to write; it must not exist, or be empty.
        max_length: the longest input, in tokens, that the exported model is to take: MPT holds a bias of that length
            and refuses longer inputs. At least the length trained at.
        tokenizer: a folder with a tokenizer.json that transformers' AutoTokenizer can load; none is written when None.
        card_table: Markdown of the model card, such as a table of measured perplexities.

    Raises:
        ValueError: MPT cannot hold the model, and why; max_length or the tokenizer does not fit it.
        FileExistsError: there is something at `folder`.
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    validate_kind("model", model, Decoder, "a decoder of longreach, as longreach.models.files.load_model reads one")
    validate_path("folder", folder)
    if tokenizer is not None:
        validate_path("tokenizer", tokenizer)
    validate_kind("card_table", card_table, str | None, "Markdown, or None")
    folder = Path(os.path.abspath(folder))  # a relative one may have no name
    _check(model.config, max_length)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder={str(folder)!r} exists: give a new one, or delete it first")
    texts, eos_id = ({}, None) if tokenizer is None else _tokenizer_files(Path(tokenizer), model.config.vocab_size)
    config = _config(model, max_length, eos_id)
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    texts["README.md"] = _card(folder.name, model.config, max_length, tokenizer is not None, card_table)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if unfinished.exists():  # of an export that was killed
        shutil.rmtree(unfinished)
    with blaming(folder, unfinished):
        unfinished.mkdir(parents=True)
    try:
        for name, text in texts.items():
            with blaming(folder / name, unfinished / name):
                (unfinished / name).write_text(text, encoding="utf-8")
        try:
            safetensors.torch.save_file(_weights(model), unfinished / "model.safetensors", metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(
                f"{folder / 'model.safetensors'} cannot be written ({error}): mend that, run again"
            ) from error
        shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")  # which only its owner can read
        for path in unfinished.iterdir():
            sync(path)  # so that the rename that follows cannot get there first
        with blaming(folder, unfinished):
            os.replace(unfinished, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _check(config: ModelConfig, max_length: int) -> None:
    name, options = parse_method(config.method)
    obstacles = [
        *([f"its position method is {name}, MPT has ALiBi"] if name != "alibi" else []),
        *(["its slopes are scaled, MPT's are the paper's"] if name == "alibi" and options.scaling != "none" else []),
        *(["its slopes are of another sequence than MPT's"] if name == "alibi" and not options.are_the_papers else []),
        *(["its slopes are learned, MPT's are the paper's"] if name == "alibi" and options.learned else []),
        *([f"its norm is {config.norm}, MPT's is layernorm"] if config.norm != "layernorm" else []),
        *([f"its activation is {config.activation}, MPT's is gelu"] if config.activation != "gelu" else []),
        *(["it has biases, MPT has none"] if config.bias else []),
        *(["its input and output embeddings are not tied, MPT's are"] if not config.tied_embeddings else []),
    ]
    if config.num_kv_heads not in (None, config.num_heads):
        obstacles.append(f"{config.num_heads} query heads share {config.num_kv_heads} key heads, MPT's share none")
    if config.d_ff not in (None, 4 * config.d_model):
        obstacles.append(f"its d_ff is {config.d_ff}, MPT's is 4 d_model = {4 * config.d_model}")
    if obstacles:
        raise ValueError(f"MPT cannot hold this model without loss: {'; '.join(obstacles)}. Use it with longreach")
    require_tokens("max_length", max_length, config.train_length)


def _weights(model: Decoder) -> dict[str, Tensor]:
    """The weights under MPT's names. Both stack queries, keys and values as rows [q | k | v]."""
    modules = {"vocabulary.embedding": "wte", "norm": "norm_f"}
    for layer in range(model.config.num_layers):
        for name, mpt_name in (
            ("attention_norm", "norm_1"),
            ("attention.qkv", "attn.Wqkv"),
            ("attention.out", "attn.out_proj"),
            ("feed_forward_norm", "norm_2"),
            ("feed_forward.up", "ffn.up_proj"),
            ("feed_forward.down", "ffn.down_proj"),
        ):
            modules[f"blocks.{layer}.{name}"] = f"blocks.{layer}.{mpt_name}"
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[f"transformer.{modules[name.removesuffix('.weight')]}.weight"] = tensor.cpu().contiguous()
    return weights


def _config(model: Decoder, max_length: int, eos_id: int | None) -> dict[str, Any]:
    """MPT's configuration, whole: readers other than transformers look for every key and know no defaults."""
    config = model.config
    return {
        "architectures": ["MPTForCausalLM"],  # the name that llama.cpp's converter knows; transformers minds not
        "model_type": "mpt",
        "d_model": config.d_model,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "expansion_ratio": 4,
        "max_seq_len": max_length,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "norm_type": "low_precision_layernorm",
        "no_bias": True,
        "learned_pos_emb": False,
        "tie_word_embeddings": True,
        "attn_config": {
            "attn_type": "multihead_attention",
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embedding_fraction": 1.0,
        "init_device": "cpu",
        "initializer_range": 0.02,
        "logit_scale": None,
        "use_cache": True,
        TRAIN_LENGTH: model.config.train_length,  # which max_seq_len does not tell
        "eos_token_id": eos_id,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _tokenizer_files(folder: Path, vocab_size: int) -> tuple[dict[str, str], int | None]:
    """The tokenizer's files that are there, name -> text, and the id of the token that they say ends a text."""
    path = folder / "tokenizer.json"
    try:
        library = read_tokenizer(path, f"{path.name} is damaged")
        largest = Backend(library).vocab_size - 1
    except (ValueError, OSError) as error:
        raise ValueError(f"tokenizer={str(folder)!r}: {error}; give a folder that holds a tokenizer.json") from error
    if largest >= vocab_size:
        raise ValueError(f"tokenizer={str(folder)!r} has token id {largest}, the model has {vocab_size}: give its own")
    eos = declared_eos(folder)
    files = [folder / name for name in _TOKENIZER_FILES]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files if path.is_file()}
    return texts, None if eos is None else library.token_to_id(eos)


def _card(name: str, config: ModelConfig, max_length: int, tokenizer: bool, table: str | None) -> str:
    load_tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n' if tokenizer else ""
    imported = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
    measured = "" if table is None else f"\n## Measured\n\n{table.strip()}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- alibi
- mpt
---

# {name}

A language model with ALiBi (Press, Smith, Lewis, ICLR 2022), trained with longreach on sequences of
{config.train_length:,} tokens and written as MPT, without loss. It takes up to {max_length:,} tokens; raise
`max_seq_len` in config.json for more. Transformers loads it, and so does vLLM up to 0.28; longreach's docs/extension.md
says how llama.cpp converts it.

```python
from transformers import {imported}

model = AutoModelForCausalLM.from_pretrained("{name}")
{load_tokenizer}```

| layers | heads | d_model | vocabulary | trained at |
|---|---|---|---|---|
| {config.num_layers} | {config.num_heads} | {config.d_model} | {config.vocab_size:,} | {config.train_length:,} |
{measured}"""
