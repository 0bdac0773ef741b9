"""The attention that the swapped modules of every family run, and how a model is extended, which it goes by."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longreach.conformance.golden import Reading
from longreach.ops.alibi import dense_bias
from longreach.ops.arguments import validate_kind
from longreach.ops.attention import attention, uses_key_norms
from longreach.positions.scaling import Scaling, require_tokens
from longreach.pretrained.layout import Layout
from longreach.pretrained.masks import NOTHING, Carried, has_values, unpack
from longreach.pretrained.room import LEAST_ROOM
from longreach.pretrained.streaming import streaming_attention

ATTRIBUTE = "_longreach"
"""Name under which a module of an extended model holds its `Extension`, and a cache its `Computed`."""


Observer = Callable[[Tensor, Tensor, Tensor, float], None]
"""Told what attention is asked for: q (B, H, Tq, D), k (B, Hkv, Tk, D), slopes (H,) or (B, H), the factor of q . k."""


@dataclass(frozen=True)
class Stated:
    """One L' that is in force for several forward passes."""

    length: int
    """In tokens."""
    from_input: bool = False
    """Whether it follows from an input, padding included, and was not stated by the user."""
    generating: bool = False
    """Whether it is that of a call to `generate`, which was found to end by it."""


class Computed(NamedTuple):
    """The L' for which the keys of a cache were computed."""

    length: int
    """In tokens."""
    by_row: bool | None
    """Whether it counts without a row's padding; None as long as no row had any for which that matters."""

    def __str__(self) -> str:
        """As errors tell it."""
        return f"{self.length} less a row's padding" if self.by_row else str(self.length)


@dataclass(kw_only=True)
class Extension:
    """How one model is extended. Every swapped module refers to it."""

    layout: Layout
    """The model's parts."""
    scaling: Scaling
    """How slopes and logits depend on L'."""
    per_step: bool
    """Whether each step of cached decoding has an L' of its own."""
    length: int | None
    """L' of every forward pass, where the user stated one."""
    sinks: int | None
    """How many first tokens `generate` keeps in its cache; None for a cache that keeps all."""
    window: int | None
    """How many last tokens each token sees beside them."""
    tolerance: float | None
    """As in `longreach.attention`."""
    impl: str
    """Likewise."""
    calls: dict[tuple[int, int], Stated | None] = field(default_factory=dict)
    """`_place` -> the constant L' of the present call there, None where it has none: of `generate`, of `fixed_length`,
    or of a block, whose pass may have begun elsewhere."""
    was_stated: bool = False
    """Whether any call of `fixed_length` stated an L'."""
    modules: dict[nn.Module, type] = field(default_factory=dict)
    """The modules that refer to it, and the classes that they were of before."""
    handles: list[RemovableHandle] = field(default_factory=list)
    """Handles of the hooks that it took."""
    carrier: Tensor | None = None
    """The carrier of the present forward pass, for a base model that cannot be handed one as an argument."""
    reading: Reading | None = None
    """What is added to the scores instead, as a dense bias: how stock code computes ALiBi, for a diagnosis of it."""
    observer: Observer | None = None
    """Told of every call to attention with slopes, layer by layer."""
    known_slopes: dict[torch.device, tuple[float, float, Tensor]] = field(default_factory=dict)
    """Device -> the last L' and factor, and the slopes for them."""
    known_biases: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Device -> the slopes of the last decoding step, and the biases of a single query under them."""

    @property
    def stated(self) -> Stated | None:
        """The L' that is in force here; None where each forward pass has its own.

        Raises:
            ValueError: a backward pass computes anew what may have been computed under an L' that is not known here.
        """
        default = None if self.length is None else Stated(self.length)
        if torch.compiler.is_compiling():  # what is compiled cannot ask for its thread: it serves the one call there is
            return next(iter(self.calls.values()), None) or default
        place = _place()
        if place in self.calls:
            return self.calls[place] or default
        if place[1] != _OUTSIDE and self.was_stated and default is None and self.scaling.depends_on_length:
            raise ValueError(
                "backward() computes layers anew, whose length L' is not known any more: checkpoint by "
                "gradient_checkpointing_enable(), which remembers it, or give extend length= in place of fixed_length"
            )
        return default

    @property
    def by_row(self) -> bool:
        """Whether a row's L' counts without its padding, so that it fares the same alone and in a batch."""
        if not self.scaling.depends_on_length:
            return False
        stated = self.stated
        return stated is None or stated.from_input

    @contextmanager
    def during(self, stated: Stated | None) -> Iterator[None]:
        """Put an L' in force here, or None for none; it may be changed by `state`."""
        place = _place()
        before = {place: self.calls[place]} if place in self.calls else {}
        self.calls[place] = stated
        try:
            yield
        finally:
            del self.calls[place]
            self.calls |= before

    def state(self, length: int, *, draft: bool = False) -> None:
        """State the L' of the present call to `generate`, unless a longer one was stated around it.

        A draft of assisted decoding may go past that one's end, as its candidates may.
        """
        stated = self.stated or Stated(length, from_input=True)
        if length > stated.length and self.scaling.depends_on_length and not draft:
            raise ValueError(f"length={stated.length} is below the {length} tokens that generate may reach: state more")
        self.calls[_place()] = replace(stated, generating=True)

    def follow(self, other: "Extension") -> None:
        """State the L' of a call that this model drafts for, unless one is stated for it."""
        if self.stated is None and not self.per_step:
            self.calls[_place()] = other.stated

    def slopes(self, length: float | Tensor, device: torch.device, factor: float = 1.0) -> Tensor:
        """Slopes for L' times a factor, (H,), or (B, H) for an L' per sequence, on a device."""
        if isinstance(length, Tensor) or torch.compiler.is_compiling():
            return self.scaling(self.layout.slopes.to(device), length) * factor
        known = self.known_slopes.get(device)
        if known is None or known[:2] != (length, factor):
            with torch.inference_mode(False):  # a tensor of inference mode could not serve training later
                known = length, factor, self.scaling(self.layout.slopes.to(device), length) * factor
            if has_values(known[2]):
                self.known_slopes[device] = known
        return known[2]

    def decoding_bias(self, slopes: Tensor, key_length: int, dtype: torch.dtype) -> Tensor:
        """Bias of a single query on key_length keys, (H, 1, Tk), or (B, H, 1, Tk) for slopes (B, H).

        It is the end of a longer one, which serves all layers and the steps to come: there, making it takes as long as
        anything but the reading of weights, keys and values.
        """
        known = self.known_biases.get(slopes.device)
        if known is None or known[0] is not slopes or known[1].dtype != dtype or known[1].shape[-1] < key_length:
            with torch.inference_mode(False):
                bias = dense_bias(slopes, None, 1, key_length + LEAST_ROOM, dtype)
            assert bias is not None, "there are slopes"
            self.known_biases[slopes.device] = known = slopes, bias
        return known[1].narrow(-1, known[1].shape[-1] - key_length, key_length)

    def total_length(self, key_length: int, cache: Any, *, continues: bool, padded: bool) -> int:
        """L' of a forward pass that sees key_length keys, padding included, and may continue a cache.

        Raises:
            ValueError: L' is below key_length, or not stated although a cache holds keys, or not the one for which
                those keys were computed.
        """
        if not self.scaling.depends_on_length:
            return key_length
        stated = self.stated
        total = key_length if stated is None else stated.length
        # Candidates of assisted decoding may go past the end of what was asked for, with no say in what comes before.
        if stated is not None and total < key_length and not stated.generating:
            raise ValueError(f"length={total} is below the {key_length} tokens of this input: state at least those")
        if self.per_step or cache is None:
            return total
        # Keys of deeper layers were computed under the slopes of their time: one L' must hold for a cache's whole life.
        train_length = self.scaling.train_length or 0
        now = Computed(max(total, train_length), self.by_row if padded and total > train_length else None)
        if continues:
            if stated is None:
                raise ValueError(
                    "the length L' of a cached forward pass is not stated: use generate, "
                    "longreach.fixed_length, or give extend length= or per_step=True"
                )
            known = None if isinstance(cache, tuple) else getattr(cache, ATTRIBUTE, None)
            # A cache that was made elsewhere, as a trained prefix is, says nothing: what the user states is for it too.
            trusted = isinstance(cache, tuple) or (known is None and not stated.from_input)
            if known is not None and None in (known.by_row, now.by_row):  # they differ in no row so far
                now = now._replace(by_row=known.by_row if now.by_row is None else now.by_row)
                known = known._replace(by_row=now.by_row)
            if known != now and not trusted:
                raise ValueError(
                    f"past_key_values were computed for L'={known or 'unknown'}, this call has L'={now}: give extend "
                    "one length= for all calls that share a cache"
                )
        if not isinstance(cache, tuple):
            setattr(cache, ATTRIBUTE, now)
        return total


_OUTSIDE = -1
"""What torch numbers no backward pass."""


def _place() -> tuple[int, int]:
    """Thread, and the backward pass that it is within: what is stated in one place is not in force in another."""
    return threading.get_ident(), torch._C._current_graph_task_id()


def extension_of(model: nn.Module) -> Extension:
    """How a model is extended; ValueError where it is not."""
    validate_kind("model", model, nn.Module, "a model that longreach.extend was given")
    extension = find_extension(model)
    if extension is None:
        raise ValueError(f"{type(model).__name__} is not extended: call longreach.extend(model) first")
    return extension


def find_extension(model: Any) -> Extension | None:
    """How a model is extended, None where it is not, or is no model."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if ATTRIBUTE in vars(module):
            extension: Extension = vars(module)[ATTRIBUTE]
            return extension
    return None


@contextmanager
def fixed_length(model: nn.Module, length: int) -> Iterator[None]:
    """State the one L' of all forward passes of this thread within, for a decoding loop of one's own.

    A cache must be filled and used under one L'; `generate` takes this L' too, in place of its own. Gradients may be
    taken later: what `gradient_checkpointing_enable` has computed anew for them is computed under the same L'.

    Args:
        model: an extended model.
        length: L' in tokens, of every row, however much of it is padding; no input, its cache and padding counted, may
            be longer.

    Raises:
        ValueError: the model is not extended, or length is not a positive integer.
    """
    require_tokens("length", length, 1)
    extension = extension_of(model)
    extension.was_stated = True
    with extension.during(Stated(length)):
        yield


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carrier: Tensor | None,
    cache: Any,
    *,
    scale: float,
    bias_scale: float = 1.0,
    dropout_p: float = 0.0,
    weights: bool | None = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a swapped module, as its model's `Extension` has it.

    Args:
        module: the attention module.
        q: (B, H, Tq, D).
        k: (B, Hkv, Tk, D), all keys that the cache gave, the new ones last, or a static cache's whole buffer.
        v: (B, Hkv, Tk, D).
        carrier: what the base model was handed for a mask, see `longreach.pretrained.masks`.
        cache: the cache that k and v came from, a tuple for one without an identity, or None.
        scale: factor of q . k.
        bias_scale: factor of the slopes, for a family that scales the bias too.
        dropout_p: probability with which attention weights are dropped in training.
        weights: whether attention weights are wanted, which take memory that grows with the square of length.

    Returns:
        The output (B, H, Tq, D), and where they are wanted the weights (B, H, Tq, Tk).
    """
    extension: Extension = getattr(module, ATTRIBUTE)
    end: int | Tensor = k.shape[2]  # of the keys that there are
    if getattr(cache, "is_compileable", False):  # a static cache, of which the rest is not yet written
        end = cache.get_seq_length(module.layer_idx)
        if not isinstance(end, Tensor) or has_values(end):
            end = int(end)
            if not weights:
                k, v = k[:, :, :end], v[:, :, :end]
    carried = unpack(carrier).over(k.shape[2])
    window = getattr(cache, "sink_window", None)  # of a SinkCache
    unknown = isinstance(end, Tensor)  # how much of a static cache is written, where that is compiled
    if unknown and extension.per_step:
        raise ValueError("per_step=True: compiled steps with a static cache have no L' of their own, state one length=")
    filled = q.shape[2] if isinstance(end, Tensor) else end  # at least
    in_view = filled if window is None else min(filled, sum(window))
    continues, padded = unknown or filled > q.shape[2], carried.padding is not None
    total = extension.total_length(in_view, cache, continues=continues, padded=padded)
    dropout_p = dropout_p if module.training else 0.0
    arguments: dict[str, Any] = {"bias_scale": bias_scale, "scale": scale, "dropout_p": dropout_p}
    if window is not None and (carried.padding is not None or weights):
        asked = "output_attentions=True" if weights else "attention_mask has padding, which would become sinks"
        raise ValueError(f"{asked}: a cache of sinks takes prompts of one length, and gives no weights")
    if carried.borders is not None:
        return _attend_documents(extension, q, k, v, carried.borders, total, weights, arguments)
    length: int | Tensor = total
    if carried.padding is not None and extension.by_row:
        length = (total - carried.padding.sum(dim=1)).clamp(min=1)  # [B]
    if weights or carried.mask is not None or unknown or torch.compiler.is_exporting():
        return _attend_densely(extension, q, k, v, carried, end, length, weights, **arguments)
    norms = _key_norms(module, cache, q, k) if window is None else None
    return _attend(extension, q, k, v, carried, length, **arguments, window=window, key_norms=norms), None


def _under(
    extension: Extension, q: Tensor, length: int | Tensor, scale: float, bias_scale: float
) -> tuple[Tensor, Tensor, float]:
    """Queries, slopes (H,) or (B, H), and the factor of q . k under one L', or one per sequence."""
    slopes = extension.slopes(length if extension.scaling.by_length else 1, q.device, bias_scale)
    factor = extension.scaling.logit_factor(length)
    if isinstance(factor, Tensor):
        return (q * factor[:, None, None, None]).to(q.dtype), slopes, scale
    return q, slopes, scale * factor


def _attend(
    extension: Extension,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carried: Carried,
    length: int | Tensor,
    *,
    scale: float,
    bias_scale: float,
    dropout_p: float,
    window: tuple[int, int] | None = None,
    key_norms: Tensor | None = None,
) -> Tensor:
    if window is not None and isinstance(length, int):  # no key is seen from further away than the cache is large
        length = min(length, sum(window))
    q, slopes, scale = _under(extension, q, length, scale, bias_scale)
    padding = carried.padding
    options: dict[str, Any] = {"scale": scale, "tolerance": extension.tolerance, "impl": extension.impl}
    if window is not None and k.shape[2] > sum(window):
        return streaming_attention(q, k, v, slopes, *window, **options)
    if extension.reading is not None:
        bias = bias_scale * _dense_bias(extension.reading, q, k, padding)
        return attention(q, k, v, bias=bias, key_padding_mask=padding, dropout_p=dropout_p, **options)
    if extension.observer is not None:
        extension.observer(q, k, slopes, options["scale"])
    if not carried.counted:
        positions = carried.positions(k.shape[2], k.device)
        options["bias"] = slopes[..., None, None] * (positions - positions[:, -1:])[:, None, None]  # [B, H, 1, Tk]
    elif q.shape[2] == 1 and key_norms is None and extension.impl == "auto" and not torch.compiler.is_compiling():
        options["bias"] = extension.decoding_bias(slopes, k.shape[2], torch.promote_types(q.dtype, torch.float32))
    else:
        options |= {"slopes": slopes, "key_norms": key_norms}
    return attention(q, k, v, key_padding_mask=padding, dropout_p=dropout_p, **options)


def _key_norms(module: nn.Module, cache: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """What a growing cache knows of the norms of keys k; None for other caches, and where it would not be used."""
    impl = getattr(module, ATTRIBUTE).impl
    if not hasattr(cache, "layers") or not uses_key_norms(impl, q, k):
        return None
    layer = cache.layers[module.layer_idx]
    return layer.key_norms() if hasattr(layer, "key_norms") else None


def _attend_documents(
    extension: Extension,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: Tensor,
    length: int,
    weights: bool | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention within each packed document by itself, whose own length is its L' unless one is stated."""
    stated = extension.stated is not None
    ends = borders.tolist()
    if ends[-1] != k.shape[2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"packed documents end at {ends[-1]}, the input has {k.shape[2]} tokens: pack without a cache")
    pieces = []
    squares = q.new_zeros(*q.shape[:3], k.shape[2]) if weights else None
    for start, stop in pairwise(ends):
        q_part, k_part, v_part = (x[:, :, start:stop] for x in (q, k, v))
        part_length = length if stated else stop - start
        if squares is None:
            pieces.append(_attend(extension, q_part, k_part, v_part, NOTHING, part_length, **arguments))
        else:
            within = (extension, q_part, k_part, v_part, NOTHING, stop - start, part_length, True)
            piece, shares = _attend_densely(*within, **arguments)
            squares[:, :, start:stop, start:stop] = shares  # type: ignore[assignment]  # which are wanted
            pieces.append(piece)
    return torch.cat(pieces, dim=2), squares


def _attend_densely(
    extension: Extension,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carried: Carried,
    end: int | Tensor,
    length: int | Tensor,
    weights: bool | None,
    *,
    scale: float,
    bias_scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention by all of its scores, whose last query stands at end - 1.

    It serves masks of four axes and weights that are wanted; and static caches that are compiled and what is exported,
    where nothing may be decided by how many keys there are.
    """
    q, slopes, scale = _under(extension, q, length, scale, bias_scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    index = torch.arange(k.shape[2], device=k.device)
    queries = torch.arange(q.shape[2], device=k.device) + (end - q.shape[2])  # [Tq]
    positions = carried.positions(k.shape[2], k.device)  # [B or 1, Tk]
    distance = positions[:, queries, None] - positions[:, None]  # [B or 1, Tq, Tk]
    bias = -slopes.to(wide)[..., None, None] * distance[:, None].to(wide)  # [B or 1, H, Tq, Tk]
    hidden = index > queries[:, None]
    if carried.padding is not None:
        hidden = hidden | carried.padding[:, None, None]
    if carried.mask is not None and carried.mask.dtype == torch.bool:
        hidden = carried.mask
    elif carried.mask is not None:
        bias, hidden = bias + carried.mask, torch.zeros_like(hidden)
    # As in the stock code, a query from which all is hidden sees everything alike.
    bias = bias.masked_fill(hidden, torch.finfo(wide).min).clamp(min=torch.finfo(wide).min)
    if not weights and not torch.compiler.is_exporting():
        options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "impl": extension.impl}
        return attention(q, k, v, bias=bias, causal=False, **options), None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # Scaled first, as products may be beyond float16; by a power of two, which rounds nothing, and then by the rest.
    rest, exponent = math.frexp(scale)
    scores = rest * (math.ldexp(1.0, exponent) * q @ k.mT).to(wide)
    shares = (scores + bias).softmax(dim=-1).to(q.dtype)  # [B, H, Tq, Tk]
    shares = F.dropout(shares, dropout_p)
    return shares @ v, shares if weights else None


def _dense_bias(reading: Reading, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor:
    """The bias of a reading, (B, H, Tq, Tk) or (B, H, 1, Tk), in the dtype of q."""
    bias = reading.bias(q.shape[1], q.shape[2], k.shape[2], None if padding is None else padding.cpu())
    if reading.dialect.positions != "relative":
        bias = bias[:, :, :1]  # the same for every query
    return bias.to(q.device, q.dtype)
