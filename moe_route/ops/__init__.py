"""Typed operators of expert routing: router logits -> `route` -> `dispatch` -> experts -> `combine`.

They are registered as ``torch.ops.moe_route.*``, so the dispatcher, ``torch.compile``, fake tensors and autograd know
them. `moe_route.reference` has the same functions in plain torch.

Device: that of the first tensor, CPU or CUDA; all others must be there too. Results have the same bits on both. On CUDA
a call only enqueues on torch's current stream of that device and never waits, so it may be captured into a graph
(`load_kernels` first, since a first launch loads its kernel). There float64 logits are refused. Autocast casts none of
the arguments.

Errors: an argument of a wrong type raises TypeError, a value or tensor that does not fit ValueError, with its name and
how to fix it; CUDA tensors where the build has no CUDA kernels raise RuntimeError.
"""

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from moe_route import _C  # noqa: F401  (registers the operators)
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
from moe_route.ops.dispatch import combine, dispatch, permute
from moe_route.ops.gate import observe, observe_layers, route, route_weights
from moe_route.ops.kernels import load_kernels
from moe_route.ops.registration import register as _register

_register("moe_route")

__all__ = [
    "FIXED_POINT",
    "METRICS",
    "SCALARS",
    "Dispatch",
    "Force",
    "RouterSpec",
    "StatisticsTables",
    "SteeringTables",
    "combine",
    "dispatch",
    "load_kernels",
    "observe",
    "observe_layers",
    "permute",
    "route",
    "route_weights",
    "token_table",
]
