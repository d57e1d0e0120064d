"""Data that routers, kernels and the reference share: specifications and tables, but no operators.

Mirrors the structs of `csrc/include/moe_route`. Importing it needs torch, but not the compiled extension.
"""

from moe_route.contract.experts import Dispatch
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import (
    FIXED_POINT,
    METRICS,
    SCALARS,
    Force,
    StatisticsTables,
    SteeringTables,
    token_table,
)

__all__ = [
    "FIXED_POINT",
    "METRICS",
    "SCALARS",
    "Dispatch",
    "Force",
    "RouterSpec",
    "StatisticsTables",
    "SteeringTables",
    "token_table",
]
