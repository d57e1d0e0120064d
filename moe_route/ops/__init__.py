"""Typed operators of expert routing: router logits -> `route` -> `dispatch` -> experts -> `combine`.

They are registered as ``torch.ops.moe_route.*``, so the dispatcher, ``torch.compile``, fake tensors and autograd know
them. `moe_route.reference` has the same functions in plain torch.

Errors: a value or tensor that does not fit raises ValueError with the argument's name and the mend.
"""

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from moe_route import _C  # noqa: F401  (registers the operators)
from moe_route.ops.dispatch import Dispatch, combine, dispatch, permute
from moe_route.ops.gate import observe, observe_layers, route, route_weights
from moe_route.ops.spec import RouterSpec
from moe_route.ops.tables import (
    FIXED_POINT,
    PLANES,
    SCALARS,
    Force,
    StatisticsTables,
    SteeringTables,
    token_table,
)

__all__ = [
    "FIXED_POINT",
    "PLANES",
    "SCALARS",
    "Dispatch",
    "Force",
    "RouterSpec",
    "StatisticsTables",
    "SteeringTables",
    "combine",
    "dispatch",
    "observe",
    "observe_layers",
    "permute",
    "route",
    "route_weights",
    "token_table",
]
