"""Tiles by C, where it was compiled when the package was installed (hatch_build.py).

`tiles.c` computes in float32, `units.c` bfloat16 by the matrix units of AMX, `decode.c` few queries, and `near.c` finds
what bounds the reach of many. Each weight is made, used and forgotten in the first levels of cache, and a call computes
many blocks of queries while Python's lock is free. Output, LSE and gradients obey the same rule of rounding as those of
`products`.
"""

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreach.ops.cpu.plan import BLOCK_M, Block, HostVisibility, Ranges, blocks_of_heads
from longreach.ops.cpu.products import LOG2_E
from longreach.ops.cpu.totals import Totals
from longreach.ops.cpu.views import falloff
from longreach.ops.cpu.workers import Job, address_of_region
from longreach.ops.lse_bound import ROUNDING
from longreach.ops.near_reach import SCORE_SLACK, radius_rounding
from longreach.ops.processor import CPU
from longreach.ops.reach import LSE_ROUNDING

JOB_PAIRS = {torch.float32: 2**18, torch.bfloat16: 2**20}
"""Dtype -> pairs of a query and a key that a thread computes in it at a time, forward: about half a millisecond."""

_POINTERS = "q k v falloff hidden out peak total grad_out grad_lse of_q of_k of_v"
_NUMBERS = "q_row k_row v_row out_row grad_out_row of_q_row of_k_row of_v_row head_dim query_length key_length"


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in _NUMBERS.split()),
        ("scale", ctypes.c_double),
        ("limit", ctypes.c_double),
        ("causal", ctypes.c_int64),
        ("slopes_learn", ctypes.c_int64),
        ("of_left", ctypes.c_double),
        ("of_right", ctypes.c_double),
    )


class _Block(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ["row", "rows", "low", "high", "needed_low", "needed_high"])


_NEAR = struct.Struct("3P18q5d")
"""`struct near` of near.c: packed, it takes a third of the time of ctypes."""


class _Step(ctypes.Structure):
    """`struct step` of step.h, most of which C alone reads and writes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "key_length", "head_dim", "cached")),
        ("others", ctypes.c_int64 * 39),
    )


_SIZES = {name: ctypes.sizeof(x) for name, x in (("size_of_head", _Head), ("size_of_step", _Step))}
_SIZES["size_of_near"] = _NEAR.size

_FACTS = {
    torch.float32: {**_SIZES, "most_rows": BLOCK_M},
    torch.bfloat16: {"size_of_head": ctypes.sizeof(_Head), "most_rows": BLOCK_M, "may_compute": True},
}
"""What a library for a dtype says of itself unless it was compiled from another version's source."""


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1, functions of PyTorch: the last but one describes a tensor to C."""

    _fields_ = (
        *(("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("older", ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("allocate", "export", "take_in", "describe", "stream")),
    )


@cache
def _describer() -> int | None:
    """Where that function is; None without one."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes, pointer_of.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    exchange = _Exchange.from_address(pointer_of(capsule, b"dlpack_exchange_api"))
    described: int | None = exchange.describe if exchange.major == 1 else None
    return described


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """What was compiled to compute in float32 by this processor's vectors, in bfloat16 by its units; None for none."""
    name = f"tiles-{torch.backends.cpu.get_cpu_capability().lower()}" if dtype == torch.float32 else "units-amx"
    if dtype not in _FACTS or (dtype == torch.bfloat16 and CPU != "AMX") or _describer() is None:
        return None
    try:
        found = ctypes.CDLL(str(Path(__file__).with_name(f"{name}.so")))
        for fact, expected in _FACTS[dtype].items():
            function = getattr(found, f"longreach_{fact}")
            function.restype = ctypes.c_int64
            if function() != expected:
                return None
    except (OSError, AttributeError):
        return None
    for function in (found.longreach_attend, found.longreach_differentiate):
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
    if dtype == torch.float32:
        decode, near, number, pointer = found.longreach_decode, found.longreach_near, ctypes.c_int64, ctypes.c_void_p
        of_decode = (ctypes.POINTER(_Step), pointer, number, ctypes.c_double, ctypes.c_double, pointer, number)
        decode.argtypes, decode.restype = of_decode, number
        near.argtypes, near.restype = (ctypes.c_char_p,), number
    return found


@dataclass
class _Blocks:
    """Blocks of the queries of each head of each sequence, computed in float32 unless there is more for the dtype."""

    q: Tensor
    """(B, H, Tq, D)."""
    k: Tensor
    """(B, Hkv, Tk, D)."""
    v: Tensor
    """(B, Hkv, Tk, D)."""
    left: Tensor
    """(H,) or (B, H) slopes of past keys."""
    right: Tensor
    """(H,) or (B, H) slopes of future keys."""
    scale: float
    """Factor of q . k."""
    visibility: HostVisibility
    """What hides keys."""

    def __post_init__(self) -> None:
        self.group = self.q.shape[1] // self.k.shape[1]
        self.dtype = torch.float32 if library(self.q.dtype) is None else self.q.dtype
        self.q, self.k, self.v = (_in_rows(x.to(self.dtype)) for x in (self.q, self.k, self.v))
        # The last vector of a block of queries may be read past its end.
        bias = falloff(self.left, self.right, self.visibility, torch.float32, unused=BLOCK_M).mul_(LOG2_E)
        self._falloff = bias.expand(len(self.q), -1, -1)
        self._hidden, holes = None, self.visibility.holes
        if holes is not None:
            hidden = self.q.new_zeros(holes.shape, dtype=torch.float32).masked_fill_(holes, float("-inf"))
            self._hidden = hidden[:, None]
        seen = self.visibility
        lengths = {"query_length": seen.query_length, "key_length": seen.key_length}
        self._alike = _Head(head_dim=self.q.shape[3], **lengths, scale=self.scale, limit=-1.0, causal=seen.causal)

    def of_heads(self, heads: Sequence[int], ranges: Ranges) -> dict[tuple[int, int], list[Block]]:
        """By sequence and head, what covers the keys that they need."""
        return blocks_of_heads(len(self.q), heads, self.visibility, ranges)

    def head(self, sequence: int, head: int, **others: Tensor) -> _Head:
        """What the C is told of one head; `others` are (B, H, ...)."""
        at = _Head.from_buffer_copy(self._alike)
        for name, x in (("q", self.q), ("falloff", self._falloff), *others.items()):
            _point(at, name, x, sequence, head)
        for name, x in (("k", self.k), ("v", self.v)):
            _point(at, name, x, sequence, head // self.group)
        if self._hidden is not None:
            _point(at, "hidden", self._hidden, sequence, 0)
        return at

    def call(self, name: str, at: _Head, blocks: Sequence[Block]) -> Any:
        """Call a function of the library; the blocks as it leaves them."""
        given = (_Block * len(blocks))(*(_Block(b.row, b.rows, b.low, b.high) for b in blocks))
        if getattr(library(self.dtype), name)(ctypes.byref(at), given, len(given)):
            raise MemoryError("no memory for a block of queries")
        return given


@dataclass
class NativeForward(_Blocks):
    """Output, largest scores and sums of weights, as `Products` has them, and what the backward pass needs."""

    out: Tensor
    """(B, H, Tq, D), which is written to, zeros where no key is seen."""
    limit: float
    """The share of a row's weights to leave out at either end; less than 0 asks for no such ranges."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.out = _in_rows(self.out.to(self.dtype))  # itself or, to be copied from, another
        self.peak = self.q.new_full(self.q.shape[:3], float("inf"), dtype=torch.float32)
        self.total = torch.zeros_like(self.peak)
        self._needed: list[tuple[int, int, Any]] = []

    def jobs(self, heads: Sequence[int], ranges: Ranges) -> list[Job]:
        """All blocks of some heads, the most work first."""
        least = JOB_PAIRS[self.dtype]
        parts = [
            (pairs, sequence, head, part)
            for (sequence, head), blocks in self.of_heads(heads, ranges).items()
            for pairs, part in _cut(blocks, least)
        ]
        parts.sort(key=lambda part: -part[0])
        return [partial(self._attend, sequence, head, part) for _, sequence, head, part in parts]

    def _attend(self, sequence: int, head: int, blocks: Sequence[Block]) -> None:
        at = self.head(sequence, head, out=self.out, peak=self.peak, total=self.total)
        at.limit = self.limit
        self._needed.append((sequence, head, self.call("longreach_attend", at, blocks)))

    def needed(self) -> tuple[Tensor, Tensor]:
        """First key and one past the last that any query of a block of BLOCK_M needs: each (B, H, blocks)."""
        shape = (*self.q.shape[:2], -(-self.q.shape[2] // BLOCK_M))
        # Rows that no block holds need no keys; visibility alone says where causal rows end.
        low = self.q.new_full(shape, self.visibility.key_length, dtype=torch.int32)
        high = torch.full_like(low, self.visibility.key_length if self.visibility.causal else 0)
        lows, highs = low.tolist(), high.tolist()
        for sequence, head, blocks in self._needed:
            of_low, of_high = lows[sequence][head], highs[sequence][head]
            for block in blocks:  # which documents may share
                i = block.row // BLOCK_M
                of_low[i] = min(of_low[i], block.needed_low)
                if not self.visibility.causal:
                    of_high[i] = max(of_high[i], block.needed_high)
        return low.new_tensor(lows).view(shape), high.new_tensor(highs).view(shape)


@dataclass
class NativeGradients(_Blocks):
    """The gradients of q, k and v, added to `totals`, and of the slopes."""

    out: Tensor
    """(B, H, Tq, D)."""
    peak: Tensor
    """(B, H, Tq)."""
    total: Tensor
    """(B, H, Tq)."""
    grad_out: Tensor
    """(B, H, Tq, D)."""
    grad_lse: Tensor
    """(B, H, Tq)."""
    totals: Totals
    """What they are added to."""
    slopes_learn: bool
    """Whether those of the slopes are wanted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rows = {name: _in_rows(getattr(self, name).to(self.dtype)) for name in ("out", "grad_out")}
        self._rows |= {name: _in_rows(getattr(self, name).to(torch.float32)) for name in ("peak", "total", "grad_lse")}
        self._rows["of_q"] = self.totals.of_q
        self.of_left, self.of_right = (torch.zeros(self.q.shape[:2]) for _ in range(2))

    def jobs(self, heads: Sequence[int], ranges: Ranges) -> list[Job]:
        """The blocks of each key head, the most work first; its query heads in their order."""
        of_key_head: dict[tuple[int, int], list[tuple[int, list[Block]]]] = {}
        for (sequence, head), blocks in self.of_heads(heads, ranges).items():
            of_key_head.setdefault((sequence, head // self.group), []).append((head, blocks))
        parts = [(sequence, members) for (sequence, _), members in of_key_head.items()]
        parts.sort(key=lambda part: -sum(_pairs(blocks) for _, blocks in part[1]))
        return [partial(self._add, *part) for part in parts]

    def _add(self, sequence: int, members: list[tuple[int, list[Block]]]) -> None:
        for head, blocks in members:
            at = self.head(sequence, head, **self._rows)
            for name, total in (("of_k", self.totals.of_k), ("of_v", self.totals.of_v)):
                _point(at, name, total, sequence, head // self.group)
            at.slopes_learn = self.slopes_learn
            self.call("longreach_differentiate", at, blocks)
            self.of_left[sequence, head], self.of_right[sequence, head] = at.of_left, at.of_right


def largest_excess(q: Tensor, k: Tensor, scale: float, block_m: int) -> Tensor:
    """`longreach.ops.near_reach.largest_excess`, in float32; Tq <= Tk, each query having a key at its position."""
    dtype = q.dtype if q.dtype in (torch.float32, torch.bfloat16) else torch.float32
    q, k = (_in_rows(x.to(dtype).resolve_neg()) for x in (q, k))
    excess = q.new_empty(*q.shape[:2], -(-q.shape[2] // block_m), dtype=torch.float32)
    call = _NEAR.pack(  # in the order of its fields
        *(q.data_ptr(), k.data_ptr(), excess.data_ptr(), *q.shape, *q.stride(), *k.shape, *k.stride()),
        *(dtype == torch.bfloat16, block_m, scale, radius_rounding(q), ROUNDING, LSE_ROUNDING, SCORE_SLACK),
    )
    if _compiled().longreach_near(call):
        raise MemoryError("no memory for the mean of keys")
    return excess


def _compiled() -> ctypes.CDLL:
    """The library for float32, which whoever calls this has asked for."""
    found = library(torch.float32)
    assert found is not None, "nobody asked whether there is one"
    return found


@cache
def _reader() -> Callable[..., int]:
    """`longreach_read_step`, with what describes tensors to it.

    Python's lock is held while it is called, as who looks at objects of Python has to.
    """
    read = ctypes.PyDLL(_compiled()._name).longreach_read_step
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.POINTER(_Step), *(ctypes.c_void_p,) * 7), ctypes.c_int64
    return partial(read, _describer())


STEP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of q, k and v in a decoding step."""

SHARED_NUMBERS = 2**18
"""Numbers of keys from which on their heads are shared out among threads for few queries."""

_READABLE, _PLAIN = 1, 2
"""What `longreach_read_step` says of tensors that it has read."""


def plain_step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, key_norms: Tensor | None) -> Any:
    """What `run_step` takes, where tensors of whatever kind are those of a step as they are; else None.

    Args:
        q: (B, H, Tq, D) in one of STEP_DTYPES, its last stride 1; on the CPU, not empty, as all of them.
        k: (B, Hkv, Tk, D), likewise.
        v: (B, Hkv, Tk, D), likewise.
        slopes: (H,) in float32, dense, finite and not negative.
        key_norms: (B, Hkv, ceil(Tk / KEY_BLOCK)) in float32.
    """
    if q.is_neg() or k.is_neg() or v.is_neg() or slopes.is_neg() or (key_norms is not None and key_norms.is_neg()):
        return None
    step, norms = _Step(), None if key_norms is None else id(key_norms)
    try:
        read = _reader()(step, id(q), id(k), id(v), id(slopes), norms, None, None)
    except RuntimeError:  # one lies on no device, or has another layout
        return None
    return step if read == _PLAIN else None


def run_step(step: Any, q: Tensor, window_size: int | None, scale: float, tolerance: float) -> Tensor:
    """The output of a step that was read, of which this is q; the rest as for `decode`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads() if step.cached >= SHARED_NUMBERS else 1
    window = step.key_length if window_size is None else window_size
    if _compiled().longreach_decode(step, out.data_ptr(), window, scale, tolerance, address_of_region(), threads):
        raise MemoryError("no memory for a decoding step")
    return out


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    key_norms: Tensor | None,
    *,
    window_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float,
    tolerance: float,
    lse: Tensor | None = None,
) -> Tensor:
    """The output of few queries that see no key after them, of one document each sequence.

    Keys are read from the nearest on, until the rest has no more than `tolerance` of the weights by the bound in
    decode.c, where their norms are known; what is padding is not read. PyTorch's threads share out key heads or, where
    these are fewer, the queries of each.

    Args:
        q: (B, H, Tq, D) in one of STEP_DTYPES.
        k: (B, Hkv, Tk, D), at least one key.
        v: (B, Hkv, Tk, D).
        slopes: (H,) or (B, H).
        key_norms: (B, Hkv, ceil(Tk / KEY_BLOCK)), as in `longreach.attention`.
        window_size: how many of the nearest keys a query sees, itself included.
        key_padding_mask: (B, Tk), True where a key is padding.
        scale: factor of q . k.
        tolerance: the share of weights that may be left out.
        lse: (B, H, Tq) float32 and dense, which the LSE is written to; None where it is not wanted.
    """
    q, k, v = _in_rows(q.resolve_neg()), _in_rows(k.resolve_neg()), _in_rows(v.resolve_neg())
    slopes = _dense(slopes)
    norms = None if key_norms is None else _dense(key_norms)
    hidden = None if key_padding_mask is None else key_padding_mask.contiguous()
    step = _Step()
    read = _reader()(step, *(None if x is None else id(x) for x in (q, k, v, slopes, norms, hidden, lse)))
    assert read in (_READABLE, _PLAIN), "these are not tensors of one step"
    return run_step(step, q, window_size, scale, tolerance)


def _dense(x: Tensor) -> Tensor:
    """In float32, all numbers beside each other; to call what would leave it as it is takes longer than to look."""
    x = x.resolve_neg()
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _in_rows(x: Tensor) -> Tensor:
    """With the numbers of a row beside each other."""
    return x if x.stride()[-1] == 1 else x.contiguous()


def _point(at: _Head, name: str, x: Tensor, sequence: int, head: int) -> None:
    """Have a field point to the part of x, (B, H, rows, numbers) or (B, H, numbers), that one head has."""
    strides = x.stride()
    setattr(at, name, x.data_ptr() + (sequence * strides[0] + head * strides[1]) * x.element_size())
    if len(strides) == 4:
        setattr(at, f"{name}_row", strides[2])


def _pairs(blocks: Sequence[Block]) -> int:
    return sum(block.rows * (block.high - block.low) for block in blocks)


def _cut(blocks: list[Block], least: int) -> Iterator[tuple[int, list[Block]]]:
    """Cut into parts of at least so many pairs, but for the last; how many each has, and the part."""
    first, pairs = 0, 0
    for past, block in enumerate(blocks, start=1):
        pairs += block.rows * (block.high - block.low)
        if pairs >= least or past == len(blocks):
            yield pairs, blocks[first:past]
            first, pairs = past, 0
