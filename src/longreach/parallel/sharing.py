"""Ranks that share sequences, as the code of a model meets them."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longreach.parallel.attention import context_parallel_attention
from longreach.parallel.exchange import Traffic, count_traffic
from longreach.parallel.line import device_of_numbers, telling


@dataclass(frozen=True)
class Sharing:
    """Every sequence is cut into pieces, of which each rank of a group holds one."""

    group: dist.ProcessGroup
    """The ranks, in the order of the pieces."""
    cut: Callable[[int], tuple[int, ...]]
    """The lengths of the pieces of a sequence of so many tokens, the same on all ranks."""
    traffic: defaultdict[int, list[Traffic]] = field(default_factory=partial(defaultdict, list))
    """What this rank has sent in each layer, until somebody clears it."""

    @property
    def place(self) -> int:
        """Of this rank in the group."""
        return dist.get_rank(self.group)

    def borders(self, length: int) -> list[int]:
        """Where the pieces of a sequence begin, and its length."""
        return list(accumulate(self.cut(length), initial=0))

    def columns(self, length: int) -> slice:
        """Which tokens of a sequence are this rank's."""
        return slice(*self.borders(length)[self.place : self.place + 2])

    def attention(self, layer: int) -> Callable[..., Tensor]:
        """What is attention in a layer of a model."""
        return partial(self._attend, layer)

    @torch.compiler.disable  # ranks talk in it
    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        key_norms: Tensor | None = None,
        dropout_p: float = 0.0,
        **options: Any,
    ) -> Tensor:
        """`context_parallel_attention` in the place of `longreach.attention`, of whose arguments it refuses three."""
        for name, value, mend in (
            ("bias", bias is not None, "choose a position method without a dense bias, such as alibi"),
            ("key_norms", key_norms is not None, "leave out the cache"),
            ("dropout_p", dropout_p > 0, "set attention_dropout=0"),
        ):
            if value:
                raise ValueError(f"{name} in attention of sequences that ranks share, which has none: {mend}")
        with count_traffic(self.traffic[layer]):
            out: Tensor = context_parallel_attention(q, k, v, group=self.group, **options)
        return out

    def joined(self, x: Tensor, counts: list[int]) -> Tensor:
        """The columns (B, n) of all ranks side by side, of which each has so many, on each of them."""
        padded = F.pad(x, (0, max(counts) - x.shape[1])).contiguous().to(device_of_numbers(self.group))
        found = [torch.empty_like(padded) for _ in counts]
        with telling("gather results"):
            dist.all_gather(found, padded, group=self.group)
        return torch.cat([part[:, :count] for part, count in zip(found, counts, strict=True)], dim=1).to(x.device)
