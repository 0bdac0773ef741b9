"""One sequence over many ranks, on `torch.distributed`: each holds a piece of it, keys travel as far as they reach."""

from longreach.parallel.attention import context_parallel_attention
from longreach.parallel.exchange import Traffic, count_traffic
from longreach.parallel.pieces import balanced_pieces

__all__ = ["Traffic", "balanced_pieces", "context_parallel_attention", "count_traffic"]
