"""What the ranks must agree on before anything travels: an error of one is an error of all, and nobody waits.

What they agreed on last is known to all ranks of a group, and so is the size of the first message that each awaits from
the others. A rank to which something is new sends one of that size too, with the word that it is new; then all compare
what they are to compute. As long as nothing changes, that word is all that agreement costs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from longreach.ops.arguments import shown
from longreach.parallel.line import Line, device_of_numbers, telling
from longreach.parallel.meeting import meet


@dataclass(frozen=True)
class _Agreement:
    """What the ranks of a group have agreed on."""

    words: Mapping[str, str]
    """Name -> value of what is alike."""
    lengths: tuple[int, ...]
    """Tokens of each piece."""
    silence: Tensor
    """Zeros, as many as each rank tells of its piece."""


_agreements: WeakKeyDictionary[dist.ProcessGroup, _Agreement] = WeakKeyDictionary()
"""The last one of each group."""


def agree(
    group: dist.ProcessGroup | None,
    length: Callable[[], int],
    said: Callable[[], Mapping[str, str]],
    opening: Callable[[], Tensor],
) -> tuple[Line, Tensor]:
    """The ranks with the lengths of their pieces, once all have said the same, and what each tells, (ranks, n).

    Args:
        group: the process group; None for all processes.
        length: gives the tokens of this rank's piece.
        said: gives name -> value of what must be alike on all ranks, or raises.
        opening: gives what the others must know of this piece, (n,) floating point, n being alike where all that is
            said is.

    Raises:
        ValueError: on all ranks, where `said` raised on one, or they do not agree, or give groups in which they would
            wait for each other; or there is no such group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("there is no process group: start it by torchrun, and call torch.distributed first")
    group = dist.group.WORLD if group is None else group
    assert group is not None  # as it is initialized
    place = dist.get_rank(group)
    if place < 0:
        raise ValueError(f"group of other ranks than this, {dist.get_rank()}: give one that it is in")
    last = _agreements.get(group)
    error, words, tokens, told = None, {}, 0, None
    try:
        words, tokens = dict(said()), length()
        if last is not None and words == last.words and tokens == last.lengths[place]:
            told = opening()
    except Exception as mistake:  # whatever it is, the others wait to hear of it
        error = str(mistake) if isinstance(mistake, ValueError) else repr(mistake)
    if last is not None:
        line = Line(group, last.lengths, place)
        openings = _told(line, last.silence if told is None else told, is_new=told is None)
        if openings is not None:
            return line, openings
    else:
        meet(group)
    line = Line(group, _compared(group, error, words, tokens), place)
    told = opening()
    _agreements[group] = _Agreement(words, line.lengths, torch.zeros_like(told))
    openings = _told(line, told, is_new=False)
    assert openings is not None  # all ranks have come here, to whom nothing is new any more
    return line, openings


def _told(line: Line, opening: Tensor, is_new: bool) -> Tensor | None:
    """What each rank tells of its piece, by place; None where something is new to one of them."""
    gathered = line.gather(torch.cat([opening.new_full((1,), float(is_new)), opening]))
    return None if gathered[:, 0].any() else gathered[:, 1:]


def _compared(group: dist.ProcessGroup, error: str | None, words: dict[str, str], tokens: int) -> tuple[int, ...]:
    """The tokens of all pieces, once it is sure that all ranks have the same words and none an error."""
    digest = int.from_bytes(blake2b(repr(words).encode(), digest_size=7).digest())
    mine = torch.tensor([tokens, error is not None, digest], device=device_of_numbers(group))
    found = mine.new_empty(dist.get_world_size(group), 3)
    with telling("agree on what is computed"):
        dist.all_gather(list(found), mine, group=group)
    lengths, failed, digests = zip(*found.tolist(), strict=True)
    if any(failed) or len(set(digests)) > 1:
        everyone: list[tuple[str | None, dict[str, str]]] = [(None, {})] * len(found)
        with telling("tell a mistake"):
            dist.all_gather_object(everyone, (error, words), group=group)
        raise ValueError(_mistake(everyone))
    return tuple(lengths)


def _mistake(everyone: list[tuple[str | None, dict[str, str]]]) -> str:
    for rank, (error, _) in enumerate(everyone):
        if error is not None:
            return f"{error} (rank {rank} of the group)"
    first = everyone[0][1]
    for rank, (_, words) in enumerate(everyone):
        for name, value in words.items():
            if value != first[name]:
                return f"{name}={_bare(value)} on rank {rank} of the group and {_bare(first[name])} on rank 0: give one"
    return "the ranks do not agree"


def _bare(value: str) -> str:
    return shown(value)[1:-1]
