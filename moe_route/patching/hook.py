"""The engine that observes a router through a forward hook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from moe_route import ops
from moe_route.calls.call import recomputing
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.modules.intercept import Change
from moe_route.ops.observe_changed import observe_changed
from moe_route.patching.context import RunningCall
from moe_route.patching.deferred import versions
from moe_route.patching.engine import ChoiceCallback, Engine, LayerSteering
from moe_route.routers.adapter import Decision, Output
from moe_route.routers.discovery import RouterInfo


class HookEngine(Engine):
    """Counts and steers a router in a forward hook.

    `keeps_output`: whether the model leaves the router's output unchanged (None: not known yet).
    `defers`: whether the hook only keeps the output of a small call, which is counted after the call.
    """

    def __init__(self, router: RouterInfo, context: RunningCall) -> None:
        super().__init__(router, context)
        self.keeps_output: bool | None = None if self.adapter.output_is_complete and not self.adapter.patches else False
        self.defers = False

    def configure(
        self, statistics: StatisticsTables | None, steering: LayerSteering | None, on_choice: ChoiceCallback | None
    ) -> None:
        """Set the tables to count into, the steering, and the callback for choices."""
        super().configure(statistics, steering, on_choice)
        only_counts = statistics is not None and steering is None and on_choice is None
        self.defers = only_counts and self.keeps_output is True

    def may_defer(self, keeps_output: bool) -> None:
        """Called once it is known whether the model leaves the router's output unchanged."""
        self.keeps_output = keeps_output
        self.configure(self.statistics, self.steering, self.on_choice)

    def changes(self) -> Sequence[Change]:
        """The hook, as the router's adapter installs it."""
        return self.adapter.changes(self.hook)

    def parts(self, output: Output) -> Decision:
        """Read router logits [T, E], weights [T, k] and ids [T, k] from the router's output."""
        return self.adapter.read((), output)

    def hook(self, module: nn.Module, args: tuple[object, ...], output: Output) -> Output | None:
        """Count the router's output; return a new output only if some token is steered."""
        context = self.context
        if context.small and self.defers and not is_compiling():
            context.deferred.kept.append((self, output, versions(output) if context.versioned else None))
            return None
        if context.idle:
            return None
        again = context.table is None and recomputing()
        if again and self.steering is None:
            return None
        # without steering nothing is kept for the backward pass, so that a checkpointed layer that runs again is not
        # counted
        with torch.set_grad_enabled(self.steering is not None and torch.is_grad_enabled()):
            decision = self.adapter.read(args, output)
        table = self.table(decision.logits)  # begins a call if none is running
        if self.steering is not None and context.steers:
            steering = self.steering_on(decision.logits.device)
            return self._reroute(args, output, decision, table, steering, counted=not again)
        if again:
            return None
        if self.statistics is not None:
            if context.small and self.keeps_output is None and not is_compiling():
                context.deferred.watch(self, decision)
            logits, weights, ids = decision
            ops.observe(logits, ids, weights, self.spec, tokens=table, statistics=self.statistics)
        self.tell(decision.ids, decision.weights)
        return None

    def _reroute(
        self,
        args: tuple[object, ...],
        output: Output,
        decision: Decision,
        tokens: Tensor,
        given: LayerSteering,
        counted: bool,
    ) -> Output:
        adapter = self.adapter
        logits, own_weights, own_ids = adapter.chosen(args, output, decision) if adapter.changes_choice else decision
        statistics = self.statistics if counted and not adapter.changes_choice else None
        routed = self.route(logits, own_ids.shape[1], tokens, given, args, statistics, (own_weights, own_ids))
        weights, ids, logits, steering, table = routed
        assert steering is not None  # there is steering, and so a table
        assert table is not None
        if counted and not adapter.changes_choice:
            self.tell(ids, weights)
        changed, weights, ids = adapter.write(args, output, decision, weights.to(own_weights.dtype), ids)
        if counted and adapter.changes_choice:
            self._count_changed(decision._replace(logits=logits), weights, ids, table, steering)
        return changed

    def _count_changed(
        self, decision: Decision, weights: Tensor, ids: Tensor, table: Tensor, steering: SteeringTables
    ) -> None:
        """Count the steered choice that the experts used, and compare it with the one without steering."""
        if self.statistics is not None:
            observe_changed(
                decision.logits,
                ids,
                weights,
                self.spec,
                natural_ids=decision.ids,
                steering=steering,
                tokens=table,
                statistics=self.statistics,
            )
        self.tell(ids, weights)
