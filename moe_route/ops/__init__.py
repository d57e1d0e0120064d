"""Typed operators of expert routing: router logits -> `route` -> `dispatch` -> experts -> `combine`.

They are registered as ``torch.ops.moe_route.*``, so they work with the dispatcher, ``torch.compile``, fake tensors and
autograd. `moe_route.reference` has the same functions in plain torch.

Devices: an operator runs where its first tensor is; all other tensors must be there too. A CPU and CUDA devices have
kernels, with the same bits on both. Every other device, and every device where the compiled library is missing, is
served by torch: the same choices and counts, weights within 1e-6, slower (`backend` says which serves). On CUDA a call
only enqueues work on torch's current stream and never waits, so it can be captured into a CUDA graph. Call
`load_kernels` before a capture, since the first launch of a kernel loads it and has it checked. float64 logits on CUDA
are torch's. Autocast casts no argument.

Errors: an argument of a wrong type raises TypeError. A value or tensor that does not fit raises ValueError. Both name
the argument and how to fix it.
"""

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
from moe_route.ops.library import backend
from moe_route.ops.self_check import load_kernels

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
    "backend",
    "combine",
    "dispatch",
    "expert_activation",
    "expert_rows",
    "load_kernels",
    "observe",
    "observe_layers",
    "pack_experts",
    "permute",
    "route",
    "route_weights",
    "token_table",
]
