"""Read the weights of the routers of a live model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from moe_route.modules.intercept import resident

if TYPE_CHECKING:
    from moe_route.routed import RoutedModel

__all__ = ["router_weights"]


def router_weights(routed: RoutedModel) -> list[np.ndarray]:
    """The gate matrix of every router, float64 [E, H], in forward order; for ``analysis.geometry``.

    Raises ``ValueError`` for a router whose logits are not one matrix product of its input, with the reason.
    """
    found = []
    for router in routed.routers:
        gate = router.family.gate
        weight = None if gate is None else resident(router.module, gate.weight)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            why = "its weight is packed or sharded" if gate is not None else router.family.unfused
            raise ValueError(
                f"{type(router.module).__name__} of layer {router.layer} has no gate matrix to read: {why}. Leave "
                "weights= out"
            )
        found.append(weight.detach().double().cpu().numpy())
    return found
