"""The operators of `moe_route.ops` in plain torch: the oracle the native backends are tested against.

Same functions, same signatures, any device. float64 logits are computed in float64 (the oracle proper), every other
floating dtype in float32. Written to be read against `csrc/include/moe_route/gate.h`; speed is no concern here.
`route_weights` is differentiable by plain autograd, and the native operator's backward recomputes through it.
`observe_steered` has no native twin: it is for the few models that change a choice after their router.
"""

from moe_route.reference.dispatch import combine, dispatch, permute
from moe_route.reference.gate import observe, observe_steered, route, route_weights

__all__ = ["combine", "dispatch", "observe", "observe_steered", "permute", "route", "route_weights"]
