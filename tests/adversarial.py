"""Inputs on which a bound, a mask or a rounding could go wrong, for every implementation that skips keys."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longreach.ops.alibi import alibi_bias, alibi_distance, alibi_slopes, dense_bias
from longreach.ops.visibility import Visibility


@dataclass(frozen=True)
class Case:
    """Shapes, options, and what is done to Gaussian tensors of std 1."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    queries: int = 300
    keys: int = 300
    head_dim: int = 16
    slopes: Any = None
    """None for the paper's."""
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Tensor, Tensor, Tensor], None] = lambda q, k, v: None

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
        """q, k, v of that dtype and the options of `longreach.attention`, slopes included."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(self.heads, self.queries), (self.kv_heads, self.keys), (self.kv_heads, self.keys)]
        tensors = [
            torch.randn(self.batch, *shape, self.head_dim, generator=generator, dtype=torch.float64).to(dtype)
            for shape in shapes
        ]
        self.change(*tensors)
        slopes = alibi_slopes(self.heads) if self.slopes is None else self.slopes
        return tensors, {"slopes": slopes, **self.options}


def _one_huge_early_key(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:, :, 3] *= 40


def _equal_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:] = k[:, :, :1]


def _common_mean(q: Tensor, k: Tensor, v: Tensor) -> None:
    k += 6.0


def _large_logits(q: Tensor, k: Tensor, v: Tensor) -> None:
    q *= 8


def _strided(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x in (q, k, v):
        x.set_(x.transpose(-1, -2).contiguous().transpose(-1, -2))


def _padding(*visible: tuple[int, int], keys: int) -> Tensor:
    mask = torch.ones(len(visible), keys, dtype=torch.bool)
    for row, (first, past) in zip(mask, visible, strict=True):
        row[first:past] = False
    return mask


def _poison(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    def change(q: Tensor, k: Tensor, v: Tensor) -> None:
        for x in (k, v):
            x.masked_fill_(mask[:, None, :, None], float("nan"))

    return change


_ENDS = _padding((40, 200), (0, 77), (5, 5), keys=200)
_HOLES = (torch.arange(200) % 7 < 3).expand(2, 200).clone()
_HOLES[1, :150] = True

CASES = {
    "gaussian": Case(),
    "one huge early key": Case(change=_one_huge_early_key),
    "equal keys": Case(change=_equal_keys),
    "common mean": Case(change=_common_mean),
    "logits of std 8": Case(change=_large_logits),
    "plain head beside a steep one": Case(heads=2, kv_heads=2, slopes=torch.tensor([0.0, 2**-0.5])),
    "grouped heads": Case(heads=4, kv_heads=2, batch=2),
    "slopes by sequence": Case(batch=2, heads=2, kv_heads=2, slopes=torch.tensor([[0.7, 0.02], [0.1, 0.0]])),
    "strided": Case(batch=2, change=_strided),
    "chunk of queries": Case(queries=77, keys=500),
    "single query": Case(queries=1, keys=700),
    "single token": Case(queries=1, keys=1),
    "few queries": Case(kv_heads=2, queries=9, keys=700),
    "few queries, one huge early key": Case(queries=3, keys=900, change=_one_huge_early_key),
    "few queries both ways, slopes by sequence": Case(
        batch=2,
        heads=2,
        kv_heads=1,
        queries=6,
        keys=600,
        slopes=torch.tensor([[0.7, 0.02], [0.1, 0.0]]),
        options={"causal": False},
    ),
    "few queries, padding, window, both ways": Case(
        batch=3,
        queries=7,
        keys=200,
        options={"key_padding_mask": _ENDS, "window_size": 50, "causal": False},
        change=_poison(_ENDS),
    ),
    "few queries, padding with holes": Case(
        batch=2, queries=5, keys=200, options={"key_padding_mask": _HOLES}, change=_poison(_HOLES)
    ),
    "more queries than keys": Case(queries=170, keys=130),
    "more queries than keys, both ways": Case(queries=170, keys=130, options={"causal": False}),
    "bidirectional": Case(options={"causal": False}),
    "two slopes": Case(slopes=(alibi_slopes(4), alibi_slopes(4).flip(0)), options={"causal": False}),
    "window": Case(options={"window_size": 90}),
    "window both ways": Case(queries=260, options={"window_size": 33, "causal": False}),
    "documents": Case(options={"cu_seqlens": torch.tensor([0, 1, 2, 140, 299, 300])}),
    "documents both ways": Case(options={"cu_seqlens": torch.tensor([0, 150, 151, 300]), "causal": False}),
    "padding at both ends": Case(
        batch=3, queries=200, keys=200, options={"key_padding_mask": _ENDS}, change=_poison(_ENDS)
    ),
    "padding, window, both ways": Case(
        batch=3,
        queries=60,
        keys=200,
        options={"key_padding_mask": _ENDS, "window_size": 50, "causal": False},
        change=_poison(_ENDS),
    ),
    "padding with holes": Case(
        batch=2, queries=200, keys=200, options={"key_padding_mask": _HOLES}, change=_poison(_HOLES)
    ),
    "padding with holes in documents": Case(
        batch=2,
        queries=200,
        keys=200,
        options={"key_padding_mask": _HOLES, "cu_seqlens": torch.tensor([0, 30, 155, 200])},
        change=_poison(_HOLES),
    ),
    "longer than the reach": Case(heads=2, kv_heads=2, queries=1100, keys=1100, slopes=torch.tensor([0.5, 0.1])),
    "longer than the reach, both ways": Case(
        heads=2, kv_heads=1, queries=900, keys=900, slopes=torch.tensor([0.9, 0.3]), options={"causal": False}
    ),
}


def _ten_times_a_line(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x in (q, k):
        x[:] = 10 * torch.linspace(0.9, 1.1, x.shape[-1], dtype=x.dtype)


def _one_key_beyond_all_others(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:, :, 3] *= 1000


def _large_and_one_larger(q: Tensor, k: Tensor, v: Tensor) -> None:
    q *= 10
    k *= 10
    k[:, :, 3] *= 30


LARGE_SCORES = {
    "one key": Case(queries=1, keys=1, head_dim=64, change=_ten_times_a_line),
    "few equal keys": Case(queries=9, keys=9, head_dim=64, change=_ten_times_a_line),
    "few queries, one key beyond all others": Case(queries=5, change=_one_key_beyond_all_others),
    "one key beyond all others": Case(queries=600, keys=600, head_dim=64, change=_one_key_beyond_all_others),
    "std 10, one key larger": Case(queries=600, keys=600, head_dim=64, change=_large_and_one_larger),
    "long rows": Case(heads=2, kv_heads=1, head_dim=256, change=_large_and_one_larger),
}
"""Scores of thousands, of which float32 loses the fraction: only what is equal cancels."""


def probabilities(q: Tensor, k: Tensor, *, slopes: Any, causal: bool = True, **masks: Any) -> Tensor:
    """Attention weights (B, H, Tq, Tk) in float64, from the definition; 0 where nothing is visible."""
    padding = masks.get("key_padding_mask")
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if padding is not None:
        k = k.masked_fill(padding[:, None, :, None], 0.0)
    query_length, key_length = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-2, -1) * q.shape[3] ** -0.5
    scores = scores + dense_bias(slopes, None, query_length, key_length, torch.float64)
    visible = Visibility(query_length, key_length, causal, **masks).dense(q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1).nan_to_num(nan=0.0)


def run(function: Any, tensors: list[Tensor], options: dict[str, Any], grads: Any, **more: Any) -> Any:
    """Output, LSE and the gradients of q, k, v and slopes, for given gradients of output and LSE."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    slopes = options["slopes"]
    pair = tuple(m.detach().requires_grad_() for m in (slopes if isinstance(slopes, tuple) else (slopes,)))
    options = options | {"slopes": pair if isinstance(slopes, tuple) else pair[0]}
    out, lse = function(*leaves, **options, **more)
    seen = lse.masked_fill(lse.isneginf(), 0.0)
    loss = (out * grads[0].to(out.dtype)).sum() + (seen * grads[1].to(seen.dtype)).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, [*leaves, *pair])


def random_grads(tensors):
    q = tensors[0]
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(q.shape, generator=generator, dtype=torch.float64),
        torch.randn(q.shape[:3], generator=generator, dtype=torch.float64),
    )


def magnitudes(tensors, options, grads):
    """Sums of the absolute values of the terms of out, dq, dk, dv, dleft, dright: one rounding of each is no error."""
    padding = options.get("key_padding_mask")
    q, k, v = (x.double() for x in tensors)
    if padding is not None:
        k, v = (x.masked_fill(padding[:, None, :, None], 0.0) for x in (k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).abs() for x in (k, v))
    grad_out, grad_lse = (x.abs() for x in grads)
    weights = probabilities(*tensors[:2], **options)
    product = weights * (grad_out @ v.transpose(-2, -1))
    score = product + weights * (product.sum(dim=-1, keepdim=True) + grad_lse[..., None])
    distance = alibi_distance(q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5
    by_key = [score.transpose(-2, -1) @ q.abs() * scale, weights.transpose(-2, -1) @ grad_out]
    by_key = [x.unflatten(1, (-1, group)).sum(dim=2) for x in by_key]
    by_slope = [(score * d.clamp(min=0)).sum(dim=(-2, -1)) for d in (distance, -distance)]
    if not isinstance(options["slopes"], tuple):
        by_slope = [by_slope[0] + by_slope[1]]
    return [weights @ v, score @ k * scale, *by_key, *by_slope]


MEASURES = (torch.Tensor.amax, torch.Tensor.mean)


def shaken(function, tensors, options, golden):
    """Largest and mean change of what a function finds where scores err as sums of D terms do, by sqrt(D) roundings."""
    q, k, v = (x.double() for x in tensors)
    group = q.shape[1] // k.shape[1]
    terms = q.abs() @ k.abs().repeat_interleave(group, dim=1).transpose(-2, -1)  # times sqrt(D), and the scale D^-1/2
    terms -= alibi_bias(options["slopes"], q.shape[2], k.shape[2])
    changes = []
    for seed in range(4):
        signs = torch.randint(2, terms.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        errors = {"bias": signs * terms * torch.finfo(tensors[0].dtype).eps / 2}
        found = function([q, k, v], options | errors)
        changes.append([[measure((x - y).abs()) for measure in MEASURES] for x, y in zip(found, golden, strict=True)])
    return torch.tensor(changes).amax(dim=0)


def assert_within_the_rule(golden, plain, actual, magnitudes, by_scores=None):
    """Errors of out and gradients at most 2 and 3 times those of the plain reference in the same dtype.

    One rounding of each term is no error, nor is `by_scores`, by result and measure."""
    for number, (right, terms) in enumerate(zip(golden, magnitudes, strict=False)):
        rounding = torch.finfo(actual[number].dtype).eps / 2
        errors, allowed = ((found[number].double() - right).abs() for found in (actual, plain))
        for which, measure in enumerate(MEASURES):
            limit = (3 if number else 2) * measure(allowed) + rounding * measure(terms)
            limit += 0 if by_scores is None else by_scores[number, which]
            assert measure(errors) <= limit, (number, measure)
