"""Typed operators of expert routing: router logits -> `route` -> `dispatch` -> experts -> `combine`.

They are registered as ``torch.ops.moe_route.*``, so they work with the dispatcher, ``torch.compile``, fake tensors and
autograd. `moe_route.reference` has the same functions in plain torch.

Devices: an operator runs where its first tensor is, on the CPU or a CUDA device; all other tensors must be there too.
Results have the same bits on both. On CUDA a call only enqueues work on torch's current stream and never waits, so it
can be captured into a CUDA graph. Call `load_kernels` before a capture, since the first launch of a kernel loads it.
CUDA refuses float64 logits. Autocast casts no argument.

Errors: an argument of a wrong type raises TypeError. A value or tensor that does not fit raises ValueError. Both name
the argument and how to fix it. CUDA tensors raise RuntimeError if this build has no CUDA kernels.
"""

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from moe_route import _C  # noqa: F401  (registers the operators)
from moe_route.contract.experts import Activation, Dispatch, PackedExperts
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
from moe_route.ops.experts import expert_activation, expert_rows, pack_experts
from moe_route.ops.gate import observe, observe_layers, route, route_weights
from moe_route.ops.kernels import has_kernels, load_kernels
from moe_route.ops.registration import register as _register

_register("moe_route")

__all__ = [
    "FIXED_POINT",
    "METRICS",
    "SCALARS",
    "Activation",
    "Dispatch",
    "Force",
    "PackedExperts",
    "RouterSpec",
    "StatisticsTables",
    "SteeringTables",
    "combine",
    "dispatch",
    "expert_activation",
    "expert_rows",
    "has_kernels",
    "load_kernels",
    "observe",
    "observe_layers",
    "pack_experts",
    "permute",
    "route",
    "route_weights",
    "token_table",
]
