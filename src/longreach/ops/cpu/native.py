"""Tiles by C, where it was compiled when the package was installed (hatch_build.py).

`tiles.c` computes in float32, `units.c` bfloat16 by the matrix units of AMX, `decode.c` few queries, and `near.c` finds
what bounds the reach of many. Each weight is made, used and forgotten in the first levels of cache, and a call computes
many blocks of queries while Python's lock is free. Output, LSE and gradients obey the same rule of rounding as those of
`products`.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreach.ops.cpu.plan import BLOCK_M, Block, HostVisibility, Ranges, blocks_of_heads
from longreach.ops.cpu.products import LOG2_E
from longreach.ops.cpu.totals import Totals
from longreach.ops.cpu.views import falloff
from longreach.ops.cpu.workers import address_of_region
from longreach.ops.lse_bound import ROUNDING
from longreach.ops.near_reach import SCORE_SLACK, log_mass, radius_rounding
from longreach.ops.processor import CPU
from longreach.ops.reach import LSE_ROUNDING
from longreach.ops.visibility import Visibility

_POINTERS = ["q", "k", "v", "falloff", "hidden", "out", "peak", "total", "grad_out", "grad_lse", "of_q", "of_k", "of_v"]
_ROWS = ["q", "k", "v", "out", "grad_out", "of_q", "of_k", "of_v"]
_OF_KEY_HEADS = ["k", "v", "of_k", "of_v"]
"""Fields of `struct head` of tiles.h: tensors, those whose rows lie apart, and those that query heads share."""

_HEAD = struct.Struct("13P11q2d2q2d")
"""All of it: packed, it takes a third of the time of ctypes."""

_OF_SLOPES = struct.Struct(f"{_HEAD.size - 16}x2d")
"""Its last fields, gradients of the slopes."""

_BLOCK_FIELDS = ("head", "row", "rows", "low", "high", "needed_low", "needed_high")
"""`struct block` of tiles.h, all int64."""

_NEAR = struct.Struct("7P22q6d")
"""Likewise `struct near` of near.c."""


class _Step(ctypes.Structure):
    """`struct step` of step.h, most of which C alone reads and writes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dtype", "key_length", "head_dim", "cached")),
        ("others", ctypes.c_int64 * 39),
    )


_OF_TILES = {"size_of_head": _HEAD.size, "size_of_block": 8 * len(_BLOCK_FIELDS), "most_rows": BLOCK_M}

_FACTS = {
    torch.float32: _OF_TILES | {"size_of_step": ctypes.sizeof(_Step), "size_of_near": _NEAR.size},
    torch.bfloat16: _OF_TILES | {"may_compute": True},
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
    try:
        exchange = _Exchange.from_address(pointer_of(capsule, b"dlpack_exchange_api"))
    except ValueError:  # it is no capsule of that name
        return None
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
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    for function in (found.longreach_attend, found.longreach_differentiate):
        function.argtypes, function.restype = (pointer, pointer, pointer, number, pointer, number), number
    if dtype == torch.float32:
        decode, near = found.longreach_decode, found.longreach_near
        of_decode = (ctypes.POINTER(_Step), pointer, number, ctypes.c_double, ctypes.c_double, pointer, number)
        decode.argtypes, decode.restype = of_decode, number
        near.argtypes, near.restype = (ctypes.c_char_p, pointer, number), number
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
            self._hidden = hidden[:, None].expand(-1, self.q.shape[1], -1)

    def of_heads(self, ranges: Ranges) -> dict[tuple[int, int], list[Block]]:
        """By sequence and head, what covers the keys that they need: those in their range, or all that are visible."""
        return blocks_of_heads(len(self.q), range(self.q.shape[1]), self.visibility, ranges)

    def _heads(self, others: dict[str, Tensor], *, limit: float = -1.0, slopes_learn: bool = False) -> bytearray:
        """What the C is told of each head of each sequence; `others` are (B, H or Hkv, ...)."""
        given = {"q": self.q, "k": self.k, "v": self.v, "falloff": self._falloff, "hidden": self._hidden, **others}
        places = [_place(given.get(name), self.group if name in _OF_KEY_HEADS else 1) for name in _POINTERS]
        rows = [0 if (x := given.get(name)) is None else x.stride(2) for name in _ROWS]
        seen = self.visibility
        lengths = self.q.shape[3], seen.query_length, seen.key_length
        numbers = (*rows, *lengths, self.scale, limit, seen.causal, slopes_learn, 0.0, 0.0)
        heads = bytearray()
        for sequence in range(self.q.shape[0]):
            for head in range(self.q.shape[1]):
                at = [
                    first + sequence * of_sequence + head // group * of_head
                    for first, of_sequence, of_head, group in places
                ]
                heads += _HEAD.pack(*at, *numbers)
        return heads

    def _compute(
        self, function: str, heads: bytearray, blocks: Sequence[tuple[int, Block]], ends: Sequence[int], threads: int
    ) -> Any:
        """Have threads take parts, which end after so many blocks; the fields of all blocks as that leaves them.

        Args:
            function: name in the library.
            heads: what `_heads` gave, whose last fields it writes to.
            blocks: number among these, and block.
            ends: of each part, in the order in which they are taken.
            threads: how many.
        """
        fields = [field for head, block in blocks for field in (head, *block, 0, 0)]
        given = (ctypes.c_int64 * len(fields))(*fields)
        call = getattr(library(self.dtype), function)
        at = (ctypes.c_char * len(heads)).from_buffer(heads)
        threads = min(threads, len(ends))
        if call(at, given, (ctypes.c_int64 * len(ends))(*ends), len(ends), address_of_region(), threads):
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
        if self.out.dtype != self.dtype or self.out.stride(-1) != 1:  # what is to be copied from
            self.out = self.q.new_empty(self.out.shape)
            if self.visibility.may_hide_all_keys:
                self.out.zero_()
        self.peak, self.total = (self.q.new_empty(self.q.shape[:3], dtype=torch.float32) for _ in range(2))
        if not self.visibility.sees_own_keys:  # so that there may be rows that no block holds
            self.peak.fill_(float("inf"))
            self.total.zero_()

    def compute(self, ranges: Ranges, threads: int) -> None:
        """All blocks, those of a head one after another, the last queries first: by causality they see most keys."""
        heads = self._heads({"out": self.out, "peak": self.peak, "total": self.total}, limit=self.limit)
        self._blocks = [
            (sequence * self.q.shape[1] + head, block)
            for (sequence, head), blocks in self.of_heads(ranges).items()
            for block in reversed(blocks)
        ]
        ends = range(1, len(self._blocks) + 1)
        self._fields = self._compute("longreach_attend", heads, self._blocks, ends, threads)

    def needed(self) -> tuple[Tensor, Tensor]:
        """First key and one past the last that any query of a block of BLOCK_M needs: each (B, H, blocks)."""
        num_blocks, key_length = -(-self.q.shape[2] // BLOCK_M), self.visibility.key_length
        # Rows that no block holds need no keys; visibility alone says where causal rows end.
        low = [key_length] * (self.q.shape[0] * self.q.shape[1] * num_blocks)
        high = [key_length if self.visibility.causal else 0] * len(low)
        count = len(_BLOCK_FIELDS)
        needed = (self._fields[_BLOCK_FIELDS.index(name) :: count] for name in ("needed_low", "needed_high"))
        for (head, block), first, past in zip(self._blocks, *needed, strict=True):  # which documents may share
            i = head * num_blocks + block.row // BLOCK_M
            low[i], high[i] = min(low[i], first), max(high[i], past)
        shape = (*self.q.shape[:2], num_blocks)
        of_low, of_high = (self.q.new_tensor(x, dtype=torch.int32).view(shape) for x in (low, high))
        return of_low, of_high


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
        self._rows |= {"of_q": self.totals.of_q, "of_k": self.totals.of_k, "of_v": self.totals.of_v}

    def compute(self, ranges: Ranges, threads: int) -> None:
        """The blocks of each key head, the most work first; its query heads in their order."""
        of_key_heads: dict[tuple[int, int], list[tuple[int, Block]]] = {}
        for (sequence, head), blocks in self.of_heads(ranges).items():
            part = of_key_heads.setdefault((sequence, head // self.group), [])
            part += [(sequence * self.q.shape[1] + head, block) for block in blocks]
        parts = sorted(of_key_heads.values(), key=lambda part: -sum(block.pairs for _, block in part))
        heads = self._heads(self._rows, slopes_learn=self.slopes_learn)
        ends = list(accumulate(map(len, parts)))
        self._compute("longreach_differentiate", heads, list(chain(*parts)), ends, threads)
        sums = zip(*_OF_SLOPES.iter_unpack(heads), strict=True)
        self.of_left, self.of_right = (self.peak.new_tensor(x).view(self.q.shape[:2]) for x in sums)


def near_ranges(
    q: Tensor,
    k: Tensor,
    slopes: tuple[Tensor, Tensor],
    visibility: Visibility,
    *,
    scale: float,
    tolerance: float,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    """`longreach.ops.near_reach.near_ranges`, in float32."""
    _, starts, ends = near_reach_of(q, k, slopes, visibility.causal, scale, tolerance, block_m, block_n)
    return starts, ends


def near_reach_of(
    q: Tensor,
    k: Tensor,
    slopes: tuple[Tensor, Tensor],
    causal: bool,
    scale: float,
    tolerance: float,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `largest_excess` of `near_reach` finds, and what `near_ranges` there makes of it; each (B, H, NQ)."""
    dtype = q.dtype if q.dtype in (torch.float32, torch.bfloat16) else torch.float32
    q, k = (_in_rows(x.to(dtype)) for x in (q, k))
    left, right = map(_dense, slopes)
    excess = q.new_empty(*q.shape[:2], -(-q.shape[2] // block_m), dtype=torch.float32)
    starts, ends = (torch.empty_like(excess, dtype=torch.int32) for _ in range(2))
    call = _NEAR.pack(  # in the order of its fields
        *(x.data_ptr() for x in (q, k, left, right, excess, starts, ends)),
        *(*q.shape, *q.stride(), *k.shape, *k.stride()),
        *(q.shape[1] * (x.dim() - 1) for x in (left, right)),
        *(dtype == torch.bfloat16, causal, block_m, block_n, scale, log_mass(tolerance, k.shape[2], causal)),
        *(radius_rounding(q), ROUNDING, LSE_ROUNDING, SCORE_SLACK),
    )
    threads = min(torch.get_num_threads(), k.shape[0] * k.shape[1]) if address_of_region() is not None else 1
    if _compiled().longreach_near(call, address_of_region(), threads):
        raise MemoryError("no memory for the mean of keys")
    return excess, starts, ends


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
    q, k, v = _in_rows(q), _in_rows(k), _in_rows(v)
    slopes = _dense(slopes)
    norms = None if key_norms is None else _dense(key_norms)
    hidden = None if key_padding_mask is None else key_padding_mask.contiguous()
    step = _Step()
    read = _reader()(step, *(None if x is None else id(x) for x in (q, k, v, slopes, norms, hidden, lse)))
    if read not in (_READABLE, _PLAIN):
        raise RuntimeError("these are not tensors of one step")
    return run_step(step, q, window_size, scale, tolerance)


def _dense(x: Tensor) -> Tensor:
    """In float32, all numbers beside each other; to call what would leave it as it is takes longer than to look."""
    x = x.resolve_neg()
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _in_rows(x: Tensor) -> Tensor:
    """With the numbers of a row beside each other."""
    return x if x.stride()[-1] == 1 else x.contiguous()


def _place(x: Tensor | None, group: int) -> tuple[int, int, int, int]:
    """Where a tensor (B, heads, ...) begins, how far sequences and heads lie apart, and how many heads share one."""
    if x is None:
        return 0, 0, 0, 1
    of_sequence, of_head, *_ = x.stride()
    return x.data_ptr(), of_sequence * x.element_size(), of_head * x.element_size(), group
