"""A conformance kit: run any implementation of ALiBi against golden values and be told what is wrong with it.

    from longreach.conformance import check_alibi
    check_alibi(my_attention, slopes=my_slopes).raise_if_failed()

Golden slopes come from decimal arithmetic, golden biases from exact distances, both apart from longreach's own. Golden
attention is the dense definition `longreach.ops.reference`, in float64 and given such a bias: longreach's other
implementations are tested on that function too, and a check of the function itself says nothing. A case that fails is
compared with what known mistakes would have given, and the mistake that explains the numbers is named.
"""

from longreach.conformance.checks import (
    HEAD_COUNTS,
    AttentionFunction,
    BiasFunction,
    Case,
    Report,
    ShardFunction,
    SlopesFunction,
    check_alibi,
    check_attention,
    check_bias,
    check_shards,
    check_slopes,
)
from longreach.conformance.golden import DIALECTS, Dialect, golden_attention, golden_bias, golden_slopes

__all__ = [
    "DIALECTS",
    "HEAD_COUNTS",
    "AttentionFunction",
    "BiasFunction",
    "Case",
    "Dialect",
    "Report",
    "ShardFunction",
    "SlopesFunction",
    "check_alibi",
    "check_attention",
    "check_bias",
    "check_shards",
    "check_slopes",
    "golden_attention",
    "golden_bias",
    "golden_slopes",
]
