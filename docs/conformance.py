"""Run longreach's conformance kit against transformers' ALiBi models and write docs/conformance.md.

python docs/conformance.py

Attention is asked of each model's own forward pass: its layers become one block whose projections are the identity, so
that hidden states are [q, k, v] themselves, while masks, biases, cache and softmax stay the model's.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import BloomConfig, BloomModel, DynamicCache, FalconConfig, FalconModel, MptConfig, MptModel
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt import modeling_mpt

from longreach import __version__
from longreach.conformance import (
    DIALECTS,
    AttentionFunction,
    BiasFunction,
    Dialect,
    Report,
    SlopesFunction,
    check_attention,
    check_bias,
    check_slopes,
)
from longreach.ops.alibi import alibi_bias, alibi_slopes
from longreach.ops.attention import attention

CONFIGURED_LENGTH = 512
"""What the models are configured for; the kit's long case has 600 tokens."""


def bloom(implementation: str) -> AttentionFunction:
    def model(num_heads: int, head_dim: int) -> nn.Module:
        config = BloomConfig(hidden_size=num_heads * head_dim, n_head=num_heads, n_layer=1, vocab_size=2)
        config._attn_implementation = implementation
        model = BloomModel(config)
        layer = model.h[0].self_attention
        layer.query_key_value, layer.dense = nn.Identity(), nn.Identity()
        model.word_embeddings_layernorm, model.ln_f = nn.Identity(), nn.Identity()
        model.h[0] = Bare(lambda x, **given: layer(x, torch.zeros(()), **given))
        return model

    return whole_model(model, interleaved)


def mpt(implementation: str) -> AttentionFunction:
    def model(num_heads: int, head_dim: int) -> nn.Module:
        size = {"d_model": num_heads * head_dim, "n_heads": num_heads, "max_seq_len": CONFIGURED_LENGTH}
        config = MptConfig(n_layers=1, vocab_size=2, **size)
        config._attn_implementation = implementation
        model = MptModel(config)
        layer = model.blocks[0].attn
        layer.Wqkv, layer.out_proj, model.norm_f = nn.Identity(), nn.Identity(), nn.Identity()
        model.blocks[0] = Bare(lambda x, layer_past, **given: layer(x, past_key_values=layer_past, **given))
        return model

    return whole_model(model, lambda q, k, v: torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1))


def falcon(implementation: str) -> AttentionFunction:
    def model(num_heads: int, head_dim: int) -> nn.Module:
        size = {"hidden_size": num_heads * head_dim, "num_attention_heads": num_heads}
        config = FalconConfig(alibi=True, multi_query=False, num_hidden_layers=1, vocab_size=2, **size)
        config._attn_implementation = implementation
        model = FalconModel(config)
        layer = model.h[0].self_attention
        layer.query_key_value, layer.dense, model.ln_f = nn.Identity(), nn.Identity(), nn.Identity()
        model.h[0] = Bare(layer)
        return model

    return whole_model(model, interleaved)


class Bare(nn.Module):
    """A block that is nothing but attention."""

    def __init__(self, attend: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.attend = attend

    def forward(self, hidden_states: Tensor, **given: object) -> tuple[Tensor, ...]:
        return self.attend(hidden_states, **given)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BLOOM's and Falcon's fused projection: q, k and v of the first head, then of the second."""
    return torch.stack((q, k, v), dim=2).permute(0, 3, 1, 2, 4).flatten(2)  # [B, T, H 3 D]


def whole_model(
    build: Callable[[int, int], nn.Module], fuse: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> AttentionFunction:
    """A model's forward pass as a function of q, k, v and padding; keys before the queries' own come from its cache."""

    @torch.no_grad()
    def attend(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if k.shape[1] != q.shape[1]:
            raise NotImplementedError
        past = k.shape[2] - q.shape[2]
        cache = DynamicCache()
        if past:
            cache.update(k[:, :, :past], v[:, :, :past], 0)
        out = build(q.shape[1], q.shape[3]).to(q.dtype)(
            inputs_embeds=fuse(q, k[:, :, past:], v[:, :, past:]),
            attention_mask=None if key_padding_mask is None else (~key_padding_mask).long(),
            past_key_values=cache,
        )
        return out.last_hidden_state.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)

    return attend


def built_from_mask(module: object, dtype: torch.dtype) -> BiasFunction:
    """BLOOM's and Falcon's builder of biases."""

    def build(num_heads: int, query_length: int, key_length: int, key_padding_mask: Tensor | None) -> Tensor:
        mask = torch.ones(1, key_length).long() if key_padding_mask is None else (~key_padding_mask).long()
        return module.build_alibi_tensor(mask, num_heads, dtype).unflatten(0, (-1, num_heads))

    return build


def mpt_bias(num_heads: int, query_length: int, key_length: int, key_padding_mask: Tensor | None) -> Tensor:
    return modeling_mpt.build_mpt_alibi_tensor(num_heads, key_length)


def slopes_of(bias: BiasFunction) -> SlopesFunction:
    """Slopes as a bias of two keys holds them."""

    def slopes(num_heads: int) -> Tensor:
        first, second = bias(num_heads, 2, 2, None).reshape(num_heads, 2).unbind(-1)
        return second - first

    return slopes


def ours(implementation: str, dialect: Dialect) -> AttentionFunction:
    """longreach's attention in a dialect that rounds nothing."""

    def attend(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        scale = dialect.scale(q.shape[3])
        slopes = alibi_slopes(q.shape[1]) * (scale if dialect.bias_before_scale else 1.0)
        options = {"causal": dialect.causal, "scale": scale, "key_padding_mask": key_padding_mask}
        return attention(q, k, v, slopes=slopes, impl=implementation, **options)

    return attend


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    checked: str
    against: str
    report: Report

    def __str__(self) -> str:
        offered = [case for case in self.report.cases if case.outcome != "not offered"]
        worst = max(offered, key=lambda case: case.error)
        findings = " ".join(f"{words} ({count})." for words, count in self.findings()) or "-"
        passed = sum(case.outcome == "passed" for case in offered)
        error = f"{worst.error:.1e}" if worst.error < float("inf") else "-"
        return f"| {self.model} | {self.checked} | {self.against} | {passed} of {len(offered)} | {error} | {findings} |"

    def findings(self) -> list[tuple[str, int]]:
        """Each diagnosis, and how many cases have it."""
        diagnoses = [case.diagnosis for case in self.report.failures]
        return [(words[:1].upper() + words[1:], diagnoses.count(words)) for words in dict.fromkeys(diagnoses)]


def slopes_and_biases() -> list[Row]:
    bloom_single = built_from_mask(modeling_bloom, torch.float32)
    bloom_half = built_from_mask(modeling_bloom, torch.bfloat16)
    falcon_single = built_from_mask(modeling_falcon, torch.float32)
    slopes = (
        ("BLOOM", slopes_of(bloom_single)),
        ("MPT", slopes_of(mpt_bias)),
        ("Falcon", slopes_of(falcon_single)),
        ("longreach", alibi_slopes),
    )
    biases = (
        ("BLOOM", "float32", bloom_single, "bloom"),
        ("BLOOM", "bfloat16", bloom_half, "bloom-bf16"),
        ("BLOOM", "bfloat16", bloom_half, "bloom"),
        ("MPT", "float32", mpt_bias, "mpt"),
        ("Falcon", "float32", falcon_single, "falcon"),
        ("Falcon", "float32", falcon_single, "bloom"),
        ("longreach", "float32", lambda heads, tq, tk, padding: alibi_bias(alibi_slopes(heads), tq, tk), "relative"),
    )
    return [
        *(Row(name, "slopes, 1 to 128 heads", "the paper's rule", check_slopes(fn)) for name, fn in slopes),
        *(
            Row(name, f"bias, {dtype}", f"`{dialect}`", check_bias(fn, dialect=DIALECTS[dialect]))
            for name, dtype, fn, dialect in biases
        ),
    ]


def attentions() -> list[Row]:
    single, half = torch.float32, torch.bfloat16
    exact_falcon = dataclasses.replace(DIALECTS["falcon"], factors_dtype=None)
    asked: list[tuple[str, AttentionFunction, str, torch.dtype, str, Dialect]] = [
        ("BLOOM, eager", bloom("eager"), "float32", single, "`bloom`", DIALECTS["bloom"]),
        ("BLOOM, eager", bloom("eager"), "bfloat16", half, "`bloom-bf16`", DIALECTS["bloom-bf16"]),
        ("BLOOM, eager", bloom("eager"), "bfloat16", half, "`bloom`", DIALECTS["bloom"]),
        ("MPT, eager", mpt("eager"), "float32", single, "`mpt`", DIALECTS["mpt"]),
        ("MPT, eager", mpt("eager"), "bfloat16", half, "`mpt`", DIALECTS["mpt"]),
        ("Falcon, eager", falcon("eager"), "float32", single, "`falcon`", DIALECTS["falcon"]),
        ("Falcon, sdpa", falcon("sdpa"), "float32", single, "`falcon`", DIALECTS["falcon"]),
        ("Falcon, sdpa", falcon("sdpa"), "bfloat16", half, "`falcon`", DIALECTS["falcon"]),
        ("Falcon, sdpa", falcon("sdpa"), "float32", single, "`falcon`, not rounded", exact_falcon),
    ]
    exact = [(f"`{name}`", DIALECTS[name]) for name in ("relative", "btlm", "encoder")]
    for implementation in ("reference", "sdpa", "cpu"):
        for against, dialect in (*exact, ("`falcon`, not rounded", exact_falcon)):
            fn = ours(implementation, dialect)
            asked.append((f"longreach, {implementation}", fn, "float32", single, against, dialect))
        fn = ours(implementation, DIALECTS["relative"])
        asked.append((f"longreach, {implementation}", fn, "bfloat16", half, "`relative`", DIALECTS["relative"]))
    return [
        Row(name, f"attention, {words}", against, check_attention(fn, dialect=dialect, dtype=dtype))
        for name, fn, words, dtype, against, dialect in asked
    ]


TABLE_HEAD = """\
| | checked | against | passed | largest error | what the failures look like (how many) |
|---|---|---|---|---|---|"""

PAGE = """\
# Conformance: who computes ALiBi, and who nearly does

<!-- Written by docs/conformance.py: change that, not this. -->

`longreach.conformance` holds golden values of ALiBi in every known dialect, and checks that run anyone's code against
them. A check gives a report with a line for each case: whether it passed, the largest error, and for a failure the
known mistake that explains its numbers.

```python
from longreach.conformance import DIALECTS, check_alibi

report = check_alibi(
    my_attention,  # (q, k, v, key_padding_mask) -> out
    slopes=my_slopes,  # num_heads -> slopes
    shard_slopes=my_shard,  # (num_heads, rank, world_size) -> slopes of that tensor-parallel rank
    bias=my_bias,  # (num_heads, query_length, key_length, key_padding_mask) -> bias
    dialect=DIALECTS["relative"],
)
print(report)
report.raise_if_failed()
```

All but attention may be left out, and each has a check of its own: `check_slopes`, `check_shards`, `check_bias`,
`check_attention`. Attention is asked at 4, 6 and 12 heads: full, decoding and a chunk against a cache, with padding on
either side, grouped-query, and at 600 tokens. Padding holds large numbers. A function that raises
NotImplementedError does not offer that case, which is then listed but not counted. Slopes and biases must agree to
2^-20, outputs to twice the error of the dense definition in the same dtype; of a rounded bias every bit counts.

| dialect | bias | score |
|---|---|---|
| `relative` | -m (i - j), the paper's equation | q.k / sqrt(D) + bias |
| `bloom`, `bloom-bf16`, `bloom-fp16` | m j, j from the first real key; exact or rounded | q.k / sqrt(D) + bias |
| `mpt` | m (j - last key) | q.k / sqrt(D) + bias |
| `falcon` | bfloat16(m) * bfloat16(j), in bfloat16 | (q.k + bias) / sqrt(D) |
| `btlm` | -m (i - j) | q.k / D + bias |
| `encoder` | -m &#124;i - j&#124;, not causal | q.k / sqrt(D) + bias |

In exact numbers the absolute forms are the relative one, since softmax removes a constant per query. In float32 they
lose about 1e-5 at 600 tokens; in bfloat16 neighbouring keys come to share one bias.

## transformers {transformers}

With torch {torch} on the CPU and longreach {longreach}. Models are configured for {length} tokens where they ask for a
length. Attention is the model's own forward pass, with projections that do nothing.

{table}

What this says:

- **BLOOM** is right in float32. In bfloat16 its bias has the bits that it should have, but the scores are rounded
  again with the bias in them, so that the output is neither that of the rounded bias nor that of the exact one.
- **MPT** is right within its configured length, in bfloat16 too, and stops with an error beyond it.
- **Falcon** adds the bias twice in its eager attention (`output_attentions=True` takes that path as well) and is right
  with sdpa. Its slopes are rounded to bfloat16 in every dtype, which is exact only up to 8 heads.

Run `python docs/conformance.py` with another version to see what changed.
"""


def main() -> None:
    rows = slopes_and_biases() + attentions()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "longreach": __version__}
    table = "\n".join([TABLE_HEAD, *map(str, rows)])
    page = Path(__file__).with_suffix(".md")
    page.write_text(PAGE.format(**versions, length=CONFIGURED_LENGTH, table=table), encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # so that the errors are the same everywhere
    main()
