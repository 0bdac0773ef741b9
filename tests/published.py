"""Folders of encoders as they are published, with small random weights, and what they compute, from plain matrices.

Nothing of longreach is used: names of weights, shapes and equations are those of the published files and papers.
"""

import json
import math
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = "the sum of a word and another is what this text says again , until end . cat dog runs 1 2 3"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Published:
    """What is published: layout and shape."""

    layout: str
    heads: int = 12
    width: int = 48
    layers: int = 2
    inner: int = 64
    vocab: int = 40
    feed_forward: str = "geglu"
    head: str = ""
    """"", "lm" or "classifier"."""
    prefix: str = ""
    labels: int = 1
    extra: dict = field(default_factory=dict)

    def config(self):
        values = {
            "architectures": ["BertModel"],
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.0,
            "hidden_act": "gelu",
            "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
        }
        if self.layout == "mosaic":  # the current DNABERT-2 has no model_type
            values |= {"alibi_starting_size": 512, "position_embedding_type": "absolute"}
        else:
            ff = "original" if self.layout == "original" else self.feed_forward
            values |= {"model_type": "bert", "position_embedding_type": "alibi", "feed_forward_type": ff}
            values |= {"max_position_embeddings": 8192, "attn_implementation": "torch"}
        return values | self.extra

    def shapes(self):
        """Name of a weight -> its shape."""
        c, i = self.width, self.inner
        at = "embeddings"
        shapes = {f"{at}.word_embeddings.weight": (self.vocab, c), f"{at}.token_type_embeddings.weight": (2, c)}
        shapes |= _norm("embeddings.LayerNorm", c) | _linear("pooler.dense", c, c)
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}"
            if self.layout == "mosaic":
                shapes |= _linear(f"{at}.attention.self.Wqkv", 3 * c, c)
            else:
                for name in ("query", "key", "value"):
                    shapes |= _linear(f"{at}.attention.self.{name}", c, c)
            shapes |= _linear(f"{at}.attention.output.dense", c, c) | _norm(f"{at}.attention.output.LayerNorm", c)
            if self.layout == "jina-code":
                shapes |= _norm(f"{at}.attention.self.layer_norm_q", c) | _norm(f"{at}.attention.self.layer_norm_k", c)
                shapes |= _norm(f"{at}.layer_norm_1", c) | _norm(f"{at}.layer_norm_2", c)
                shapes |= {f"{at}.mlp.up_gated_layer.weight": (2 * i, c)} | _linear(f"{at}.mlp.down_layer", c, i)
            elif self.layout == "original":
                shapes |= _linear(f"{at}.intermediate.dense", i, c) | _linear(f"{at}.output.dense", c, i)
                shapes |= _norm(f"{at}.output.LayerNorm", c)
            else:
                shapes |= {f"{at}.mlp.gated_layers.weight": (2 * i, c)} | _linear(f"{at}.mlp.wo", c, i)
                shapes |= _norm(f"{at}.mlp.layernorm", c)
        shapes = {self.prefix + name: shape for name, shape in shapes.items()}
        if self.head == "lm":
            at = "cls.predictions.transform"
            shapes |= _linear(f"{at}.dense", c, c) | _norm(f"{at}.LayerNorm", c)
            bias = "decoder.bias" if self.layout == "mosaic" else "bias"
            shapes[f"cls.predictions.{bias}"] = (self.vocab,)
        if self.head == "classifier":
            shapes |= _linear("classifier", self.labels, c)
        return shapes

    def weights(self, dtype=torch.float32):
        """Large enough that attention is far from uniform, and norms far from 1."""
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, shape in self.shapes().items():
            drawn = torch.randn(shape, generator=generator)
            if len(shape) > 1:
                drawn *= 1.5 * shape[-1] ** -0.5
            else:
                drawn = 0.3 * drawn + name.endswith("weight")  # of a norm
            weights[name] = drawn.to(dtype)
        return weights


def _linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def write(published, folder, *, weights=None, bin_file=False, shards=1, tokenizer=True, pooling=None):
    """Write a folder in the published form, and return its path as text."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = published.weights() if weights is None else weights
    (folder / "config.json").write_text(json.dumps(published.config()))
    name = "pytorch_model.bin" if bin_file else "model.safetensors"
    save = (lambda tensors, path: torch.save(tensors, path)) if bin_file else save_file
    if shards == 1:
        save(weights, folder / name)
    else:
        stem, suffix = name.split(".")
        names = {key: f"{stem}-{1 + i % shards}-of-{shards}.{suffix}" for i, key in enumerate(sorted(weights))}
        for shard in set(names.values()):
            save({key: weights[key] for key in weights if names[key] == shard}, folder / shard)
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    if tokenizer:
        write_tokenizer(folder)
    if pooling is not None:
        write_pooling(folder, *pooling)
    return str(folder)


def write_tokenizer(folder):
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name.lower()[1:-1]}_token": name for name in SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **named}))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")


def write_pooling(folder, mode, normalize):
    """As jina-embeddings-v2-base-en has it, where the width is said wrongly too."""
    modules = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Normalize", "models.Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(modules[: 3 if normalize else 2])
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    flags = {f"pooling_mode_{name}": name.startswith(mode) for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 48, **flags}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8192, "do_lower_case": False}))


def slopes(heads):
    """By the paper's rule: a geometric sequence for a power of two, else also every other of twice that power."""
    power = 2 ** int(math.log2(heads))
    first, more = ([2 ** (-8 * (h + 1) / n) for h in range(n)] for n in (power, 2 * power))
    return torch.tensor((first + more[::2])[:heads], dtype=torch.float64)


def expected(published, weights, ids, types=None, mistake=""):
    """The last hidden states (T, C) of one text of ids (T,), in float64, from the equations, or with a mistake."""
    w = {name.removeprefix(published.prefix): x.double() for name, x in weights.items()}

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def normed(x, name):
        if mistake != "q and k normed by head":
            return norm(x, name)
        heads = x.unflatten(-1, (h, -1))
        return (heads - heads.mean(-1, keepdim=True)).flatten(1) / heads.std(-1, correction=0).repeat_interleave(
            c // h, 1
        )

    def halves(x):
        return x.split(i, dim=-1)[:: -1 if mistake == "the other half is the gate" else 1]

    act = torch.relu if published.feed_forward == "reglu" else gelu
    c, h, i = published.width, published.heads, published.inner
    types = torch.zeros_like(ids) if types is None else types
    words = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][types]
    x = norm(words, "embeddings.LayerNorm")
    position = torch.arange(len(ids), dtype=torch.float64)
    distance = (position[:, None] - position).abs()
    for layer in range(published.layers):
        at = f"encoder.layer.{layer}"
        if published.layout == "mosaic":
            q, k, v = linear(x, f"{at}.attention.self.Wqkv").split(c, dim=-1)
        else:
            q, k, v = (linear(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        if published.layout == "jina-code":
            q, k = (normed(x, f"{at}.attention.self.layer_norm_{name}") for x, name in ((q, "q"), (k, "k")))
        mixed = torch.zeros_like(x)
        for head, slope in enumerate(slopes(h)):
            of = slice(head * c // h, (head + 1) * c // h)
            scores = q[:, of] @ k[:, of].T / math.sqrt(c // h) - slope * distance
            mixed[:, of] = scores.softmax(-1) @ v[:, of]
        hidden = norm(linear(mixed, f"{at}.attention.output.dense") + x, f"{at}.attention.output.LayerNorm")
        if published.layout == "jina-code":
            once_more = norm(hidden if mistake == "the residual once" else x + hidden, f"{at}.layer_norm_1")
            first, second = halves(linear(once_more, f"{at}.mlp.up_gated_layer"))
            down = linear(first * act(second), f"{at}.mlp.down_layer")
            x = norm(once_more + down, f"{at}.layer_norm_2")
        elif published.layout == "original":
            inner = gelu(linear(hidden, f"{at}.intermediate.dense"))
            x = norm(linear(inner, f"{at}.output.dense") + hidden, f"{at}.output.LayerNorm")
        else:
            first, second = halves(linear(hidden, f"{at}.mlp.gated_layers"))
            x = norm(linear(act(first) * second, f"{at}.mlp.wo") + hidden, f"{at}.mlp.layernorm")
    return x
