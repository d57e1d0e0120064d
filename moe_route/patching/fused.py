"""The engine that replaces a router's forward by its gate matrix and one `route` call."""

from __future__ import annotations

from typing import Any, SupportsIndex

from torch import Tensor, nn

from moe_route.modules.attributes import number
from moe_route.patching.context import recomputing
from moe_route.patching.engine import Engine
from moe_route.routers.family import gate_logits, weight_dtype


class FusedEngine(Engine):
    """The router's forward as gate matrix and one `route` call."""

    def install(self) -> None:
        """Give the router a class of its own that routes through this engine."""
        original = type(self.router.module)

        def forward(module: nn.Module, hidden: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.forward(module, hidden, arguments)

        def reduce(module: nn.Module, protocol: SupportsIndex) -> object:
            reduced: Any = original.__reduce_ex__(module, protocol)
            function, (_, *arguments), *rest = reduced
            return function, (original, *arguments), *rest  # a copy is of the original class

        names = {
            "forward": forward,
            "__reduce_ex__": reduce,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
        }
        self._original = original
        self.router.module.__class__ = type(original.__name__, (original,), names)

    def remove(self) -> None:
        """Give the router its own class back."""
        self.router.module.__class__ = self._original

    def forward(
        self, module: nn.Module, hidden: Tensor, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [..., H] -> router logits [T, E], weights [T, k], ids int64 [T, k]."""
        context, family = self.context, self.family
        logits = gate_logits(module, family.gate, hidden)
        again = recomputing()
        table = None if context.idle else self.table(logits)
        steers = self.steering is not None and context.steers and not context.idle
        steering = self.steering_on(logits.device) if steers else None
        statistics, args = None if again else self.statistics, (hidden, *arguments)
        routed = self.route(logits, number(module, family.top_k), table, steering, args, statistics)
        if not again:
            self.tell(routed.ids, routed.weights)
        weights = routed.weights.to(weight_dtype(family.weights, hidden, logits))
        return logits, weights, self.adapter.filled(routed.ids).long()
