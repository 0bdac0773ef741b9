"""A conformance kit: run any implementation of ALiBi against golden values and be told what is wrong with it.

    from longreach.testing import check_alibi
    check_alibi(my_attention, slopes=my_slopes).raise_if_failed()

The golden values rest on nothing that is tested with them: slopes come from decimal arithmetic, biases from exact
distances, attention from the dense definition, all in float64. A case that fails is compared with what known mistakes
would have given, and the mistake that explains the numbers is named.
"""

from .checks import (
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
from .golden import DIALECTS, Dialect, golden_attention, golden_bias, golden_slopes

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
