"""What a pretrained ALiBi model's stock code does at a length, found out by running it against the exact form."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longreach.conformance.golden import Dialect, Reading
from longreach.conformance.mistakes import rounding_mistakes, slope_mistakes, strength_mistakes
from longreach.ops.alibi import alibi_slopes
from longreach.ops.reach import default_tolerance, reach
from longreach.pretrained.attend import ATTRIBUTE, extension_of
from longreach.pretrained.extend import extend
from longreach.pretrained.families import find_layout
from longreach.pretrained.layout import Layout
from longreach.pretrained.lengths import SCALING
from longreach.pretrained.restore import restore

COMPARED = 256
"""How many of the last tokens have their logits compared: those of long texts and vocabularies would fill memory."""

RIGHT = 1e-4
"""Mean KL in nats up to which the stock code counts as right: a hundredth of a percent of perplexity."""

ROUNDING = 4
"""Where weights are in a half type, how many times the exact form's own KL the stock code's may be to count as right:
it rounds its scores, which ours holds in float32."""

UNEXPLAINED = 0.1
"""The share of an error's KL that a mistake may leave over and still be named."""

PROBE = 12
"""Tokens on which is tried what does not depend on length."""

FORM_LENGTH = 64
"""Tokens on which the stock code is held against the form that its family is known to have."""

BLOCK = 32
"""Queries and keys per block of the reach, which is known to within so many tokens."""

STOCK_BYTES = 16 * 2**30
"""Most memory that the stock code's scores may take unless the caller says otherwise."""

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))

IGNORED = f"{SCALING} is ignored"
"""The mistake of stock code whose configuration says how slopes are scaled, and which does not look."""

CRASHES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError)
"""What stock code is known to raise."""


@dataclass(frozen=True)
class StockForm:
    """How a model's stock code writes ALiBi down."""

    family: str
    """The model_type of its configuration."""
    slopes: tuple[float, ...]
    """One for each head, before any rounding."""
    rule: str
    """Where they come from, and how its stock code rounds them."""
    score: str
    """What the bias is added to."""
    bias: str
    """What it is made from, and how its stock code rounds it."""
    deviation: float | None
    """Largest difference of logits between the stock code and this form on the first tokens, in at least float32; None
    where its stock code crashes on them."""


@dataclass(frozen=True)
class StockRun:
    """What the stock code does at one length."""

    length: int
    """In tokens."""
    outcome: Literal["right", "wrong", "crashes", "not run"]
    """Right: its KL is at most RIGHT, or ROUNDING times what rounding costs the exact form, and it ignores nothing that
    the configuration says of the slopes."""
    mistake: str = ""
    """What is wrong with it, in words."""
    difference: float | None = None
    """Largest difference of logits from the exact form's, over the last COMPARED tokens; None where it did not run."""
    kl: float | None = None
    """Mean KL(exact || stock) in nats over the same tokens."""
    exact_kl: float | None = None
    """Likewise of the exact form in the dtype of the model, where that is below float32: what rounding alone costs."""


@dataclass(frozen=True)
class HeadReach:
    """How far one head sees."""

    slope: float
    """Its slope."""
    tokens: tuple[int, ...]
    """For each layer, the most keys back, itself included, at which a key may hold more than the tolerated mass."""
    kept: tuple[float, ...]
    """For each layer, the blocks within reach as a share of those of dense causal attention."""


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a model once it has been run."""

    form: StockForm
    """How its stock code writes ALiBi down."""
    dtype: str
    """Of its weights."""
    attention: str
    """The attention that transformers runs it with."""
    train_length: int | None
    """The length trained on, as far as its configuration tells."""
    causal: bool
    """Whether its stock code hides later tokens from earlier ones."""
    static_cache: str | None
    """What its stock code raises when it generates with a static cache; "" where it works, None where it generates not
    at all."""
    runs: tuple[StockRun, ...]
    """The stock code at each length."""
    heads: tuple[HeadReach, ...]
    """Heads in the order of the model."""
    reach_length: int
    """The length in tokens of the text on which the reach was measured: the longest."""
    tolerance: float
    """Probability mass per token that the reach may leave out."""


Progress = Callable[[str, int, int | None], None]
"""Called with a stage in words, how many lengths are done, and how many there are."""


def diagnose(
    model: nn.Module,
    tokens: Tensor,
    lengths: Sequence[int],
    *,
    max_bytes: int = STOCK_BYTES,
    progress: Progress = lambda stage, done, total: None,
) -> Diagnosis:
    """Run a stock model against its exact form at each length, name what is wrong, and measure how far its heads see.

    The exact form is the model extended as its configuration says, computed in float32 where the weights are in a half
    type: they are widened in place for a while, which takes three times their memory. Afterwards the model is what it
    was.

    Args:
        model: a causal language model as `extend` takes it, not extended. It is put into evaluation mode.
        tokens: (T,) int64 ids on its device, of which each length takes the first.
        lengths: in tokens, each at least 2 and at most T.
        max_bytes: the stock code is not run where its scores would take more.
        progress: told of each length.

    Raises:
        ValueError: the model has no ALiBi, its family is unknown, or it is extended; or a length is out of range.
    """
    layout = find_layout(model)
    if ATTRIBUTE in vars(layout.base):
        raise ValueError(f"{type(model).__name__} is extended: longreach.restore(model) first, to see its stock code")
    if layout.dialect is None:
        raise ValueError(f"{layout.family} was converted: only models trained with ALiBi have stock code to diagnose")
    for length in lengths:
        if not 2 <= length <= len(tokens):
            raise ValueError(f"lengths has {length}: give at least 2 and at most the {len(tokens)} tokens there are")
    if not lengths:
        raise ValueError("lengths is empty: give at least one, in tokens")
    model.eval()
    with torch.no_grad():
        causal = _is_causal(model, tokens[:PROBE])
        static_cache = _try_static_cache(model, tokens[:PROBE])
        deviation = _deviation(model, layout, tokens)
        runs = []
        for done, length in enumerate(sorted(lengths)):
            progress("running the stock code beside the exact form", done, len(lengths))
            runs.append(_run_stock(model, layout, tokens[:length], causal, max_bytes))
        progress("running the stock code beside the exact form", len(lengths), len(lengths))
        heads = _head_reach(model, layout, tokens[: max(lengths)])
    dtype = next(model.parameters()).dtype
    return Diagnosis(
        form=_stock_form(layout, dtype, deviation),
        dtype=str(dtype).removeprefix("torch."),
        attention=getattr(layout.base.config, "_attn_implementation", None) or "eager",
        train_length=layout.train_length,
        causal=causal,
        static_cache=static_cache,
        runs=tuple(runs),
        heads=heads,
        reach_length=max(lengths),
        tolerance=default_tolerance(dtype),
    )


def stock_bytes(num_heads: int, length: int) -> int:
    """Memory in bytes that the stock code's attention takes: H x L x L scores, their mask and softmax, in float32."""
    return 3 * 4 * num_heads * length**2


def _size(count: int) -> str:
    """Bytes in words, in the largest unit of which there is one at least."""
    unit, name = next((pair for pair in _UNITS if count >= pair[0]), (1, "bytes"))
    return f"{count / unit:,.1f} {name}"


def _stock_form(layout: Layout, dtype: torch.dtype, deviation: float | None) -> StockForm:
    dialect = layout.dialect_in(dtype)
    return StockForm(
        family=layout.family,
        slopes=tuple(layout.slopes.tolist()),
        rule=_slope_rule(layout, rounds=dialect.factors_dtype == torch.bfloat16),
        score=dialect.score,
        bias=dialect.bias,
        deviation=deviation,
    )


def _slope_rule(layout: Layout, rounds: bool) -> str:
    """Which rule gives a model's slopes, in words."""
    slopes = layout.slopes
    paper = alibi_slopes(len(slopes))
    rule = "the paper's rule"
    if not torch.equal(slopes, paper):
        rule += f" with alibi_bias_max={8 * float((slopes.log() / paper.log()).mean()):.4g}"
    error = float(((slopes.bfloat16().float() - slopes) / slopes).abs().max())
    if rounds and error:
        rule += f", rounded to bfloat16: off by up to {error:.2%}"
    if layout.scaling.name != "none":
        rule += f", to be scaled as {SCALING} says: {getattr(layout.base.config, SCALING)}"
    return rule


def _run_stock(model: nn.Module, layout: Layout, tokens: Tensor, causal: bool, max_bytes: int) -> StockRun:
    """Run the stock code on all tokens (T,) and compare it with the exact form."""
    length = len(tokens)
    needed = stock_bytes(len(layout.slopes), length)
    if needed > max_bytes:
        reason = f"would take about {_size(needed)} for scores, more than the {_size(max_bytes)} allowed"
        return StockRun(length, "not run", reason)
    try:
        stock = _logits(model, tokens)
    except CRASHES as error:
        return StockRun(length, "crashes", _crash(error, layout, length))
    with _extended(model):
        exact = _logits(model, tokens)
    golden, exact_kl = exact, None
    if _narrow_tensors(model):
        with _widened(model), _extended(model):
            golden = _logits(model, tokens)
        exact_kl = _kl(golden, exact)
    kl = _kl(golden, stock)
    mistake = ""
    if kl > max(RIGHT, ROUNDING * (exact_kl or 0.0)):
        mistake = _name_mistake(model, layout, tokens, golden, stock, causal)
    elif _ignores_scaling(layout, length):
        mistake = IGNORED  # however little that changes at this length
    difference = (golden - stock).abs().max().item()
    return StockRun(length, "wrong" if mistake else "right", mistake, difference, kl, exact_kl)


def _ignores_scaling(layout: Layout, length: int) -> bool:
    """Whether the configuration says how slopes are scaled at a length, to stock code that does not look."""
    scaled = layout.scaling(layout.slopes, length)
    return not layout.heeds_scaling and not torch.equal(scaled, layout.slopes)


def _name_mistake(model: nn.Module, layout: Layout, tokens: Tensor, golden: Tensor, stock: Tensor, causal: bool) -> str:
    """What is wrong with the stock code's logits (N, V), golden being the right ones."""
    if not causal:
        return "not causal: tokens see those after them"
    if not stock.isfinite().all():
        return "logits are not finite"
    wide = stock
    if _narrow_tensors(model):
        with _widened(model):
            wide = _logits(model, tokens)
        if _kl(golden, wide) <= RIGHT:
            return _rounding(layout, len(tokens), next(model.parameters()).dtype)
    error = _kl(golden, wide)
    left: dict[str, float] = {}
    for words, reading in _mistakes(layout, len(tokens)):
        with _widened(model), _extended(model, reading):
            left[words] = _kl(_logits(model, tokens), wide)
        if left[words] <= min(RIGHT, UNEXPLAINED * error):
            return words
    best = min(left, key=lambda words: left[words])
    return best if left[best] <= UNEXPLAINED * error else "of a kind that is not known"


def _mistakes(layout: Layout, length: int) -> Iterator[tuple[str, Reading]]:
    """What the stock code may compute instead, simplest first."""
    if layout.scaling.name != "none":
        yield IGNORED, _reading(Dialect(), layout.slopes)
    yield from _bias_mistakes(layout, length, layout.scaling(layout.slopes, length))
    if layout.scaling.name != "none":
        for words, reading in _bias_mistakes(layout, length, layout.slopes):
            yield f"{IGNORED}, and {words}", reading


def _bias_mistakes(layout: Layout, length: int, slopes: Tensor) -> Iterator[tuple[str, Reading]]:
    """Known mistakes of the bias, where slopes (H,) are right: first what is cheap to try or known of the family."""
    golden = _reading(Dialect(), slopes)
    yield from strength_mistakes(golden)
    stock = _reading(layout.dialect_in(torch.float32), slopes)
    if stock.dialect.rounded:
        rounding = _rounding(layout, length, torch.float32)
        yield rounding, stock
        yield f"the bias is added twice, and {rounding}", replace(stock, strength=2.0)
    for words, reading in slope_mistakes(golden):
        if not torch.allclose(reading.slopes(len(slopes)), golden.slopes(len(slopes))):
            yield words, reading
    for words, reading in rounding_mistakes(golden):
        if reading.dialect.rounded and reading.dialect.positions != "relative":  # whose bias would be H x T x T
            yield words, reading


def _reading(dialect: Dialect, slopes: Tensor) -> Reading:
    """A dialect with slopes (H,) of a model's own."""
    return Reading(dialect, slopes=lambda num_heads: slopes.double())


def _rounding(layout: Layout, length: int, dtype: torch.dtype) -> str:
    """What the stock code of a model in this dtype does to the bias of the last keys, in words."""
    dialect = layout.dialect_in(dtype)
    if not dialect.rounded:
        return f"loses precision in {str(dtype).removeprefix('torch.')}; with float32 weights it is right"
    bias = _reading(dialect, layout.slopes).bias(len(layout.slopes), 1, length, None)
    last = bias[0, int(layout.slopes.argmax()), 0, -64:]  # [at most 64]
    different = last.unique().numel()
    if different == len(last):
        return "the bias is rounded"
    return f"the bias collapses: the last {len(last)} keys of the steepest head have {different} different biases"


def _crash(error: Exception, layout: Layout, length: int) -> str:
    """What a crash at a length is, in words."""
    where = ""
    if layout.train_length is not None and length > layout.train_length:
        where = f"past its configured length of {layout.train_length:,}: "
    return f"{where}{_first_line(error)}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _is_causal(model: nn.Module, tokens: Tensor) -> bool:
    """Whether another last token leaves the stock code's logits before it as they are; where they cannot tell, yes."""
    changed = tokens.clone()
    try:
        before = _logits(model, tokens)
        changed[-1] = (tokens[-1] + 1) % before.shape[1]
        after = _logits(model, changed)
    except CRASHES:
        return True
    moved = (before - after)[:-1].abs().max()
    return not bool(moved > 1e-3 * before.abs().max())  # NaN moves nothing


def _try_static_cache(model: Any, tokens: Tensor) -> str | None:
    """What the stock code raises when it continues tokens by two with a static cache."""
    if not hasattr(model, "generate"):
        return None
    # MPT's configurations say use_cache=False, which would leave the cache out.
    options = {"use_cache": True, "max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    try:
        prompt = tokens[None]
        model.generate(prompt, attention_mask=torch.ones_like(prompt), cache_implementation="static", **options)
    except CRASHES as error:
        return _first_line(error)
    return ""


def _deviation(model: nn.Module, layout: Layout, tokens: Tensor) -> float | None:
    """Largest difference of logits between the stock code and its family's form, on the first tokens."""
    tokens = tokens[: min(FORM_LENGTH, layout.train_length or FORM_LENGTH)]
    with _widened(model):
        try:
            stock = _logits(model, tokens)
        except CRASHES:
            return None
        slopes = layout.scaling(layout.slopes, len(tokens))
        with _extended(model, _reading(layout.dialect_in(torch.float32), slopes)):
            return (_logits(model, tokens) - stock).abs().max().item()


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the last COMPARED of tokens (T,), in at least float32: (N, V)."""
    inputs: dict[str, Any] = {"input_ids": tokens[None], "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = COMPARED
    logits: Tensor = model(**inputs).logits[0, -COMPARED:]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _kl(right: Tensor, wrong: Tensor) -> float:
    """Mean KL(right || wrong) in nats of the distributions of logits (N, V); infinite where one is not finite."""
    total = 0.0
    for p, q in zip(right.split(16), wrong.split(16), strict=True):  # doubles of a few tokens at a time
        p, q = (x.double().log_softmax(dim=-1) for x in (p, q))
        total += (p.exp() * (p - q)).sum().item()
    return max(0.0, total / len(right)) if math.isfinite(total) else math.inf  # equal ones are below 0 by rounding


@contextmanager
def _extended(model: nn.Module, reading: Reading | None = None) -> Iterator[None]:
    """The model as its configuration says in the exact form for a while, or with the bias of a reading instead."""
    if reading is None:
        extend(model)
    else:
        extension = extension_of(extend(model, scaling="none", impl="sdpa"))  # which takes slopes below 0, too
        if reading.dialect.positions == "relative" and not reading.dialect.rounded:
            slopes = reading.strength * reading.slopes(len(extension.layout.slopes))
            extension.layout = replace(extension.layout, slopes=slopes.float())
        else:
            extension.reading = reading
    try:
        yield
    finally:
        restore(model)


def _narrow_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers in a half type."""
    tensors = (*model.parameters(), *model.buffers())
    return [x for x in tensors if x.is_floating_point() and x.dtype.itemsize == 2]


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Half-type weights in float32 for a while; then the very tensors that they were."""
    narrow = [(tensor, tensor.data) for tensor in _narrow_tensors(model)]
    try:
        for tensor, data in narrow:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


def _head_reach(model: nn.Module, layout: Layout, tokens: Tensor) -> tuple[HeadReach, ...]:
    """The reach of every head in every layer, on the queries and keys that tokens (T,) give them."""
    layers: list[tuple[list[int], list[float]]] = []

    def hear(q: Tensor, k: Tensor, slopes: Tensor, scale: float) -> None:
        found = reach(q, k, slopes, scale=scale, block_m=BLOCK, block_n=BLOCK)
        ends = torch.arange(BLOCK, q.shape[2] + BLOCK, BLOCK, device=q.device).clamp(max=q.shape[2])  # [NQ]
        furthest = (ends - found.starts[0] * BLOCK).amax(dim=-1)  # [H]
        layers.append((furthest.tolist(), found.kept[0].tolist()))

    with _extended(model):
        extension_of(model).observer = hear
        _logits(model, tokens)
    furthest, kept = (zip(*per_layer, strict=True) for per_layer in zip(*layers, strict=True))
    return tuple(HeadReach(*head) for head in zip(layout.slopes.tolist(), furthest, kept, strict=True))
