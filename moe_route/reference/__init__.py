"""The operators of `moe_route.ops` in plain torch, against which the native backends are tested.

The functions have the same signatures and run on any device. float64 logits are computed in float64, which makes this
the oracle of the tests; every other floating dtype is computed in float32. The code follows
`csrc/include/moe_route/gate.h` and is not optimized. `route_weights` is differentiable by plain autograd, and the
native operator's backward recomputes through it. `observe_steered` has no native counterpart: it serves the few models
that change a choice after their router.
"""

from moe_route.reference.dispatch import combine, dispatch, permute
from moe_route.reference.experts import expert_activation, expert_rows
from moe_route.reference.gate import capped, observe, observe_steered, probabilities, route, route_weights

__all__ = [
    "capped",
    "combine",
    "dispatch",
    "expert_activation",
    "expert_rows",
    "observe",
    "observe_steered",
    "permute",
    "probabilities",
    "route",
    "route_weights",
]
