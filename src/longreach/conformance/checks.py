"""The checks: cases, what they are compared with, and the report."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from longreach.conformance.golden import Dialect, from_own_key, golden_slopes, reading_of
from longreach.conformance.mistakes import SLOPE_MISTAKES, attention_mistakes, bias_mistakes, group_mistakes
from longreach.ops.alibi import MOST_DISTANCES, alibi_distance, validate_heads
from longreach.ops.arguments import shown, validate_integer
from longreach.ops.visibility import without_padding

SlopesFunction = Callable[[int], Tensor | Sequence[float]]
"""num_heads -> slopes (H,), positive."""
ShardFunction = Callable[[int, int, int], Tensor | Sequence[float]]
"""(num_heads, rank, world_size) -> slopes (H / world_size,) of the query heads that this rank holds."""
BiasFunction = Callable[[int, int, int, Tensor | None], Tensor]
"""(num_heads, query_length, key_length, key_padding_mask) -> bias, broadcastable to (B, H, Tq, Tk)."""
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, D), key_padding_mask (B, Tk) or None) -> out (B, H, Tq, D)."""

HEAD_COUNTS = (4, 6, 12)
"""Numbers of heads that biases and attention are checked at: a power of two and two others."""

MOST_TOKENS = math.isqrt(MOST_DISTANCES)
"""The longest case that is taken for no mistake."""

_SLOPE_ERROR = 2.0**-20
"""Largest relative error of a slope that passes: float32 reaches it by any way of computing powers."""


@dataclass(frozen=True)
class Case:
    """What became of one input."""

    name: str
    """What was asked."""
    outcome: Literal["passed", "failed", "not offered"]
    """Not offered: the function raised NotImplementedError."""
    error: float
    """Largest error: relative for slopes, absolute for biases and outputs; infinite where nothing could be compared."""
    tolerance: float
    """The largest error that passes."""
    diagnosis: str = ""
    """Of a failed case, what kind of mistake it looks like."""

    def __str__(self) -> str:
        if self.outcome == "not offered":
            return f"{self.outcome}: {self.name}"
        line = f"{self.outcome}: {self.name}: error {self.error:.2g}, tolerance {self.tolerance:.2g}"
        return f"{line}: {self.diagnosis}" if self.diagnosis else line


@dataclass(frozen=True)
class Report:
    """Every case of a check. As text: a count, then a line for each."""

    cases: tuple[Case, ...]
    """In the order in which they were run."""

    @property
    def failures(self) -> tuple[Case, ...]:
        """The cases that failed."""
        return tuple(case for case in self.cases if case.outcome == "failed")

    @property
    def passed(self) -> bool:
        """Whether a case passed and none failed."""
        return not self.failures and any(case.outcome == "passed" for case in self.cases)

    def raise_if_failed(self) -> None:
        """Raise AssertionError, whose text is the report's failures, unless it passed."""
        if not self.passed:
            raise AssertionError("\n".join([self._count(), *map(str, self.failures)]))

    def _count(self) -> str:
        passed = sum(case.outcome == "passed" for case in self.cases)
        return f"{passed} of {len(self.cases)} cases passed, {len(self.failures)} failed"

    def __str__(self) -> str:
        return "\n".join([self._count(), *map(str, self.cases)])


def check_alibi(
    attention: AttentionFunction,
    *,
    slopes: SlopesFunction | None = None,
    shard_slopes: ShardFunction | None = None,
    bias: BiasFunction | None = None,
    dialect: Dialect | None = None,
    dtype: torch.dtype = torch.float32,
    head_counts: Sequence[int] = HEAD_COUNTS,
    length: int = 600,
) -> Report:
    """Check attention, and those of its parts that are given, in one report.

    Args:
        attention: see `AttentionFunction` and `check_attention`.
        slopes: see `SlopesFunction` and `check_slopes`.
        shard_slopes: see `ShardFunction` and `check_shards`.
        bias: see `BiasFunction` and `check_bias`.
        dialect: of attention and bias; the paper's equation when None.
        dtype: of q, k and v.
        head_counts: the numbers of heads that attention and bias are asked for.
        length: Tk of their long cases; take one beyond any table that is kept.
    """
    for name, fn in (("attention", attention), ("slopes", slopes), ("shard_slopes", shard_slopes), ("bias", bias)):
        if fn is not None or name == "attention":
            _require_function(name, fn)
    reports = []
    if slopes is not None:
        reports.append(check_slopes(slopes))
    if shard_slopes is not None:
        reports.append(check_shards(shard_slopes))
    if bias is not None:
        reports.append(check_bias(bias, dialect=dialect, head_counts=head_counts, length=length))
    reports.append(check_attention(attention, dialect=dialect, dtype=dtype, head_counts=head_counts, length=length))
    return Report(tuple(case for report in reports for case in report.cases))


def check_slopes(fn: SlopesFunction, *, head_counts: Iterable[int] = range(1, 129)) -> Report:
    """Check slopes to 2^-20 of each, which float32 reaches by any way of computing powers.

    Args:
        fn: see `SlopesFunction`.
        head_counts: the numbers of heads to ask for.

    Raises:
        ValueError: fn is no function, or head_counts is empty or holds no positive integers.
    """

    def case(num_heads: int) -> _Judged:
        mistakes = [(words, partial(rule, num_heads)) for words, rule in SLOPE_MISTAKES]
        expected = golden_slopes(num_heads)
        return _judge(
            f"slopes of {num_heads} heads", lambda: fn(num_heads), expected, _SLOPE_ERROR, mistakes, _relative_error
        )

    _require_function("fn", fn)
    return _report([case(num_heads) for num_heads in _head_counts(head_counts)])


def check_shards(fn: ShardFunction) -> Report:
    """Check the slopes of tensor-parallel shards: a slice of the rule for all heads, not the rule for the slice.

    Args:
        fn: see `ShardFunction`; ranks hold consecutive heads.
    """

    def case(num_heads: int, rank: int, world_size: int) -> _Judged:
        size, whole = num_heads // world_size, golden_slopes(num_heads)
        mistakes = [
            ("the rule is applied to the shard's own number of heads", lambda: golden_slopes(size)),
            ("every rank has the slopes of rank 0", lambda: whole[:size]),
            ("heads are dealt out in turn, not in consecutive runs", lambda: whole[rank::world_size]),
        ]
        name = f"slopes of rank {rank} of {world_size}, {num_heads} heads"
        expected = whole[rank * size : (rank + 1) * size]
        return _judge(name, lambda: fn(num_heads, rank, world_size), expected, _SLOPE_ERROR, mistakes, _relative_error)

    _require_function("fn", fn)
    worlds = ((8, 2), (12, 2), (12, 4), (40, 8), (112, 8))
    return _report([case(heads, rank, size) for heads, size in worlds for rank in range(size)])


def check_bias(
    fn: BiasFunction,
    *,
    dialect: Dialect | None = None,
    head_counts: Sequence[int] = HEAD_COUNTS,
    length: int = 600,
) -> Report:
    """Check a dense bias where queries may look: neither on padding nor, where the dialect is causal, on the future.

    A relative bias must have the golden values. Of an absolute one only the differences between keys count, to what
    float32 holds of them; of a rounded one every bit, save where a slope off by 2^-20 rounds the other way.

    Args:
        fn: see `BiasFunction`; it gives the bias as it is added, before the scale if that is the dialect.
        dialect: the paper's equation when None.
        head_counts: the numbers of heads to ask for.
        length: Tk of the long cases; take one beyond any table that is kept.

    Raises:
        ValueError: fn is no function, dialect no dialect, head_counts is empty or holds no positive integers, or length
            is below 1.
    """
    _require_function("fn", fn)
    golden = reading_of(dialect)

    def case(num_heads: int, shape: _Shape) -> _Judged:
        padding = shape.padding()
        arguments = num_heads, shape.query_length, shape.key_length, padding
        expected = golden.bias(*arguments)
        below, above = (
            replace(golden, slopes=partial(_scaled_slopes, 1 + off)).bias(*arguments)
            for off in (-_SLOPE_ERROR, _SLOPE_ERROR)
        )
        compared = shape.visible(golden.dialect.causal) & shape.real_queries()

        def error(actual: Tensor, wanted: Tensor) -> float:
            if golden.dialect.rounded:
                near = (torch.minimum(below, above) <= actual) & (actual <= torch.maximum(below, above))
                actual = torch.where(near, expected, actual)
            elif golden.dialect.positions != "relative":
                actual, wanted = from_own_key(actual), from_own_key(wanted)
            return _largest(actual - wanted, compared)

        mistakes = [(words, partial(reading.bias, *arguments)) for words, reading in bias_mistakes(golden)]
        tolerance = 0.0 if golden.dialect.rounded else _SLOPE_ERROR * float(expected.abs().max())
        name = f"bias of {num_heads} heads, {shape.name}"
        return _judge(name, lambda: fn(*arguments), expected, tolerance, mistakes, error)

    return _report([case(*asked) for asked in _asked(golden.dialect.causal, head_counts, length)])


def check_attention(
    fn: AttentionFunction,
    *,
    dialect: Dialect | None = None,
    dtype: torch.dtype = torch.float32,
    head_counts: Sequence[int] = HEAD_COUNTS,
    length: int = 600,
) -> Report:
    """Check attention: full, decoding and in chunks, with padding, grouped-query, and at length.

    Padding holds large numbers, and what comes out at queries that are padding is not looked at. An error passes up to
    twice that of the dense definition computed in the same dtype, plus what float32 loses of absolute positions.

    Args:
        fn: see `AttentionFunction`. Queries are aligned with the last keys; D is 16. Tensors are on the CPU: move them
            if need be. Raise NotImplementedError for what is not offered, such as padding.
        dialect: the paper's equation when None.
        dtype: of q, k and v.
        head_counts: the numbers of heads to ask for.
        length: Tk of the long cases; take one beyond any table that is kept.

    Raises:
        ValueError: fn is no function, dialect no dialect, head_counts is empty or holds no positive integers, or length
            is below 1.
    """
    _require_function("fn", fn)
    golden = reading_of(dialect)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={shown(dtype)}: give torch.float64, torch.float32, torch.bfloat16 or torch.float16")

    def case(num_heads: int, shape: _Shape, group: int = 1) -> _Judged:
        q, k, v = shape.inputs(num_heads, num_heads // group, dtype)
        padding = shape.padding()
        compared = shape.real_queries()
        expected = golden.attention(q, k, v, padding)
        mistakes = [
            (words, partial(reading.attention, q, k, v, padding))
            for words, reading in (*attention_mistakes(golden), *group_mistakes(golden, group))
        ]
        plain = golden.plain_attention(q, k, v, padding)
        lost = golden.loss_of_positions(num_heads, without_padding(k, v, padding)[1])
        tolerance = 2 * _largest(plain - expected, compared) + lost
        name = f"attention of {num_heads} heads, {shape.name}{', grouped-query' if group > 1 else ''}"
        return _judge(
            name,
            lambda: fn(q, k, v, padding),
            expected,
            tolerance,
            mistakes,
            lambda actual, wanted: _largest(actual - wanted, compared),
        )

    cases = []
    for num_heads, shape in _asked(golden.dialect.causal, head_counts, length):
        cases.append(case(num_heads, shape))
        if shape == _WHOLE and num_heads % 2 == 0:
            cases.append(case(num_heads, shape, group=2))
    return _report(cases)


@dataclass(frozen=True)
class _Shape:
    """Lengths and padding of one case."""

    name: str
    query_length: int
    key_length: int
    left_padding: tuple[int, ...] = ()
    right_padding: tuple[int, ...] = ()

    def padding(self) -> Tensor | None:
        """The key padding mask (B, Tk)."""
        keys = torch.arange(self.key_length)
        if self.left_padding:
            return keys < torch.tensor(self.left_padding)[:, None]
        if self.right_padding:
            return keys >= self.key_length - torch.tensor(self.right_padding)[:, None]
        return None

    def real_queries(self) -> Tensor:
        """Which queries are no padding, (B, 1, Tq, 1)."""
        padding = self.padding()
        if padding is None:
            return torch.ones(1, 1, self.query_length, 1, dtype=torch.bool)
        return ~padding[:, None, self.key_length - self.query_length :, None]

    def visible(self, causal: bool) -> Tensor:
        """Which keys each query may see, (B, 1, Tq, Tk)."""
        padding = self.padding()
        distance = alibi_distance(self.query_length, self.key_length)
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        return visible[None, None] if padding is None else visible & ~padding[:, None, None]

    def inputs(self, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same random q, k and v each time, large where keys are padding so that a leak is seen."""
        generator = torch.Generator().manual_seed(0)
        padding = self.padding()
        batch = 1 if padding is None else len(padding)
        q = torch.randn(batch, num_heads, self.query_length, 16, generator=generator)
        k, v = torch.randn(2, batch, num_kv_heads, self.key_length, 16, generator=generator)
        if padding is not None:
            k, v = (torch.where(padding[:, None, :, None], 50 * x, x) for x in (k, v))
        return q.to(dtype), k.to(dtype), v.to(dtype)


_WHOLE = _Shape("33 queries over 33 keys", 33, 33)
_PADS = (0, 5, 12)
_SHAPES = (
    _WHOLE,
    _Shape("33 queries over 33 keys, left padding", 33, 33, left_padding=_PADS),
    _Shape("33 queries over 33 keys, right padding", 33, 33, right_padding=_PADS),
)
_CACHED_SHAPES = (
    _Shape("decoding, 1 query over 33 keys", 1, 33),
    _Shape("decoding, 1 query over 33 keys, left padding", 1, 33, left_padding=_PADS),
    _Shape("a chunk, 7 queries over 33 keys", 7, 33),
    _Shape("a chunk, 7 queries over 33 keys, left padding", 7, 33, left_padding=_PADS),
)


def _asked(causal: bool, head_counts: Sequence[int], length: int) -> Iterator[tuple[int, _Shape]]:
    """The number of heads and the shape of every case."""
    head_counts = _head_counts(head_counts)
    length = validate_integer("length", length, 1, "at least 1, in tokens")
    if length > MOST_TOKENS:
        raise ValueError(f"length={length}: give at most {MOST_TOKENS}, a case has a table of length x length")
    shapes: tuple[_Shape, ...] = _SHAPES
    if causal:
        shapes = (*shapes, *_CACHED_SHAPES, _Shape(f"decoding, 1 query over {length} keys", 1, length))
    for num_heads in head_counts:
        for shape in shapes:
            yield num_heads, shape
    yield head_counts[0], _Shape(f"{length} queries over {length} keys", length, length)


def _head_counts(head_counts: Iterable[int]) -> tuple[int, ...]:
    """At least one positive integer."""
    if isinstance(head_counts, str | bytes | Mapping) or not isinstance(head_counts, Iterable):
        raise ValueError(f"head_counts={shown(head_counts)}: give a list of numbers of heads")
    try:
        counts = tuple(head_counts)
    except TypeError:  # of a tensor without axes, which is iterable by its class
        counts = (head_counts,)  # type: ignore[assignment]
    if not counts:
        raise ValueError("head_counts is empty: give at least one number of heads")
    return tuple(validate_heads("head_counts", count, "positive integers, one a case") for count in counts)


def _require_function(name: str, fn: object) -> None:
    if not callable(fn):
        raise ValueError(f"{name}={shown(fn)}: give a function")


@dataclass(frozen=True)
class _Judged:
    """A case, and the mistakes that would explain its failure, fully or in part."""

    case: Case
    explanations: Mapping[str, bool] = field(default_factory=dict)


def _judge(
    name: str,
    call: Callable[[], Tensor | Sequence[float]],
    expected: Tensor,
    tolerance: float,
    mistakes: Iterable[tuple[str, Callable[[], Tensor]]],
    error_of: Callable[[Tensor, Tensor], float],
) -> _Judged:
    """Run one case and, if it fails, find the mistakes that explain it."""

    def failed(error: float, diagnosis: str = "", explanations: Mapping[str, bool] | None = None) -> _Judged:
        return _Judged(Case(name, "failed", error, tolerance, diagnosis), explanations or {})

    try:
        actual = torch.as_tensor(call()).detach().cpu().double()
    except NotImplementedError:
        return _Judged(Case(name, "not offered", math.inf, tolerance))
    except Exception as raised:  # whatever another's code raises is a finding
        message = str(raised).strip().split("\n")[0]
        return failed(math.inf, f"raises {type(raised).__name__}: {message}")
    try:
        actual = actual.expand(expected.shape)
    except RuntimeError:
        return failed(math.inf, f"gives shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    error = error_of(actual, expected)
    if error <= tolerance:
        return _Judged(Case(name, "passed", error, tolerance))
    if not math.isfinite(error):
        return failed(math.inf, "NaN or infinity where there should be numbers")
    left: dict[str, float] = {}
    for words, mistaken in mistakes:
        left[words] = min(error_of(actual, mistaken()), left.get(words, math.inf))
    fully = max(min(tolerance, error / 1.5), error / 10)
    return failed(
        error, explanations={words: rest <= fully for words, rest in left.items() if rest <= max(fully, error / 3)}
    )


def _report(judged: Sequence[_Judged]) -> Report:
    """Where several mistakes explain a failure, name the one that explains most failures."""
    counts = Counter(words for judgement in judged for words in judgement.explanations)
    sure = {words for judgement in judged for words, fully in judgement.explanations.items() if fully}
    cases = []
    for judgement in judged:
        case = judgement.case
        if case.outcome == "failed" and not case.diagnosis:
            found = sorted(
                judgement.explanations, key=lambda words: (not judgement.explanations[words], -counts[words])
            )
            words = found[0] if found else "no known mistake gives these numbers"
            # Roundings do not repeat exactly, so a mistake that is sure elsewhere need not explain all of it here.
            case = replace(case, diagnosis=words if words in sure or not found else f"perhaps {words}")
        cases.append(case)
    return Report(tuple(cases))


def _largest(difference: Tensor, compared: Tensor) -> float:
    """The largest absolute value where `compared` says so; NaN if any is there."""
    return float(difference.abs().masked_fill(~compared, 0.0).max())


def _scaled_slopes(factor: float, num_heads: int) -> Tensor:
    return factor * golden_slopes(num_heads)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected) / expected).abs().max())
