"""The engine that replaces a router's forward by its gate matrix and one `route` call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moe_route.calls.call import recomputing
from moe_route.modules.attributes import number
from moe_route.modules.intercept import Change, ReplacedForward
from moe_route.patching.engine import Engine
from moe_route.routers.family import gate_logits, weight_dtype


class FusedEngine(Engine):
    """Runs the router's forward as gate matrix and one `route` call."""

    def changes(self) -> Sequence[Change]:
        """Replace the router's forward by the one of this engine."""

        def forward(module: nn.Module, hidden: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.forward(module, hidden, arguments)

        return (ReplacedForward(self.router.module, forward),)

    def forward(
        self, module: nn.Module, hidden: Tensor, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route hidden [..., H]: returns router logits [T, E], weights [T, k], ids int64 [T, k]."""
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
