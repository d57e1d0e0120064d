"""The data that router, kernels and reference agree on: specifications and tables, no operator.

Mirrors the structs of `csrc/include/moe_route`. Importing needs torch and nothing of the compiled extension.
"""

from moe_route.contract.dispatch import Dispatch
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
