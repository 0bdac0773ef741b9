"""What the ranks must agree on before anything travels: an error of one is an error of all, and nobody waits."""

from collections.abc import Callable, Mapping
from hashlib import blake2b

import torch
import torch.distributed as dist

from longreach.ops.arguments import shown
from longreach.parallel.line import Line, device_of_numbers, telling


def agree(group: dist.ProcessGroup | None, length: Callable[[], int], said: Callable[[], Mapping[str, str]]) -> Line:
    """The ranks with the lengths of their pieces, once all have said the same.

    It costs one exchange of three numbers in each call. To do that for new shapes alone would not do: where they are
    new to one rank and known to another, the two would wait for different things.

    Args:
        group: the process group; None for all processes.
        length: gives the tokens of this rank's piece.
        said: gives name -> value of what must be alike on all ranks, or raises.

    Raises:
        ValueError: on all ranks, where `said` raised on one, or they do not agree; or there is no such group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("there is no process group: start it by torchrun, and call torch.distributed first")
    place = dist.get_rank(group)
    if place < 0:
        raise ValueError(f"group of other ranks than this, {dist.get_rank()}: give one that it is in")
    error, words, tokens = None, {}, 0
    try:
        words, tokens = dict(said()), length()
    except Exception as mistake:  # whatever it is, the others wait to hear of it
        error = str(mistake)
    digest = int.from_bytes(blake2b(repr(words).encode(), digest_size=7).digest())
    mine = torch.tensor([tokens, error is not None, digest], device=device_of_numbers(group))
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with telling("agree on what is computed"):
        dist.all_gather(found, mine, group=group)
    lengths, failed, digests = zip(*(numbers.tolist() for numbers in found), strict=True)
    if any(failed) or len(set(digests)) > 1:
        everyone: list[tuple[str | None, dict[str, str]]] = [(None, {})] * len(found)
        with telling("tell a mistake"):
            dist.all_gather_object(everyone, (error, words), group=group)
        raise ValueError(_mistake(everyone))
    return Line(group, lengths, place)


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
