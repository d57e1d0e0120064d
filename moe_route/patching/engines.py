"""The two engines: how a router is counted and steered.

**observed** is a forward hook. With nothing to steer it only counts and returns None, so not a bit of the model's
output changes. With steering, tokens that have a steering row are routed again from the router's own logits; all others
keep the model's own ids and weights.

**fused** replaces the router's forward by its gate matrix and one `route` call, through a subclass made for the one
module, so that `isinstance`, `state_dict` and recorders of router logits live on.

A slot that steering leaves empty (id -1) is handed to the experts as the largest id of its row (0 where the row has
none) with weight 0, since the experts of transformers cannot take -1. It is counted as empty, never as a selection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route import ops
from moe_route.ops import StatisticsTables, SteeringTables
from moe_route.patching.deferred import versions
from moe_route.patching.families import Gate, at
from moe_route.patching.sites import RouterSite
from moe_route.patching.tokens import TokenContext, recomputing

Trace = Callable[[int, Tensor, Tensor], None]
EMPTYING = frozenset(("force", "top_k", "remap"))  # steering tables that can leave a slot empty


class Engine(ABC):
    """What both engines share: what is set at the moment, and how a steered choice is put into the model's form."""

    def __init__(self, site: RouterSite, context: TokenContext) -> None:
        self.site, self.context = site, context
        self.spec, self.family, self.layer = site.spec, site.family, site.layer
        self.statistics: StatisticsTables | None = None
        self.steering: SteeringTables | None = None
        self.trace: Trace | None = None
        self.cohort = -1  # engines with an equal one are counted together (`deferred`)
        self.may_leave_empty = False

    def configure(
        self, statistics: StatisticsTables | None, steering: SteeringTables | None, trace: Trace | None
    ) -> None:
        """Set what is counted into, what steers, and who is told."""
        self.statistics, self.steering, self.trace = statistics, steering, trace
        self.may_leave_empty = steering is not None and not EMPTYING.isdisjoint(steering.tables)

    @abstractmethod
    def install(self) -> None:
        """Change the router."""

    @abstractmethod
    def remove(self) -> None:
        """Undo `install`."""

    def table(self, logits: Tensor) -> Tensor:
        """The token table for the rows of `logits`."""
        context = self.context
        context.reached = True
        if context.table is not None and context.num_tokens == logits.shape[0] and context.device == logits.device:
            return context.table
        return context.table_for(logits.shape[0], logits.device, self.site.name)

    def weights_for(
        self, logits: Tensor, ids: Tensor, weights: Tensor, table: Tensor | None, steering: SteeringTables | None
    ) -> Tensor:
        """Weights [T, k] of the choice, with a gradient where one is asked for.

        Experts merged by a remap have no differentiable weight: theirs come from `route`, without a gradient.
        """
        if not torch.is_grad_enabled() or (steering is not None and steering.packed[3] is not None):
            return weights
        scale = self.family.scale_of(self.site.module)
        return ops.route_weights(logits, ids, self.spec, expert_scale=scale, steering=steering, tokens=table)

    def filled(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Ids [T, k] that experts can take: -1 becomes the largest id of its row, or 0."""
        if self.may_leave_empty:
            ids = torch.where(ids < 0, ids.amax(dim=1, keepdim=True).clamp_(min=0), ids)
        return ids.to(dtype)


class Observed(Engine):
    """A forward hook on the router.

    `keeps_output`: whether the model leaves what the router returned as it is (None: not seen yet).
    `defers`: whether the hook only keeps the output of a small call, to be counted after the call.
    """

    def __init__(self, site: RouterSite, context: TokenContext) -> None:
        super().__init__(site, context)
        self.keeps_output: bool | None = None
        self.defers = False

    def configure(
        self, statistics: StatisticsTables | None, steering: SteeringTables | None, trace: Trace | None
    ) -> None:
        """Set what is counted into, what steers, and who is told."""
        super().configure(statistics, steering, trace)
        only_counts = statistics is not None and steering is None and trace is None
        self.defers = only_counts and self.keeps_output is True

    def settle(self, keeps_output: bool) -> None:
        """It is known now whether the model leaves the router's output as it is."""
        self.keeps_output = keeps_output
        self.configure(self.statistics, self.steering, self.trace)

    def install(self) -> None:
        """Register the hook."""
        self._handle = self.site.module.register_forward_hook(self.hook)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def parts(self, output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [T, E], weights [T, k] and ids [T, k] of what the router returned."""
        family = self.family
        logits = family.logits_of(output) if family.probabilities else output[family.logits_at]
        return logits, output[family.weights_at], output[family.ids_at]

    def hook(
        self, module: nn.Module, args: tuple[object, ...], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        """Count the router's output; return a new one only where a token is steered."""
        context = self.context
        if context.small and self.defers and not torch.compiler.is_compiling():
            context.deferred.kept.append((self, output, versions(output)))
            return None
        if context.idle:
            return None
        again = context.table is None and recomputing()
        if again and self.steering is None:
            return None
        logits, weights, ids = parts = self.parts(output)
        table = self.table(logits)
        if self.steering is not None and context.steers:
            return self._reroute(args, output, logits, table, self.steering, counted=not again)
        if again:
            return None
        if self.statistics is not None:
            if context.small and self.keeps_output is None and not torch.compiler.is_compiling():
                context.deferred.watch(self, parts)
            ops.observe(logits, ids, weights, self.spec, tokens=table, statistics=self.statistics)
        if self.trace is not None:
            self.trace(self.layer, ids, weights.detach())
        return None

    def _reroute(
        self,
        args: tuple[object, ...],
        output: tuple[Tensor, ...],
        logits: Tensor,
        table: Tensor,
        steering: SteeringTables,
        counted: bool,
    ) -> tuple[Tensor, ...]:
        family, module = self.family, self.site.module
        weights, ids = output[family.weights_at], output[family.ids_at]
        steered_weights, steered_ids = ops.route(
            logits,
            ids.shape[1],
            self.spec,
            correction_bias=family.bias_of(module, args),
            expert_scale=family.scale_of(module),
            steering=steering,
            tokens=table,
            given_ids=ids,
            given_weights=weights,
            given="natural",
            statistics=self.statistics if counted else None,
        )
        if self.trace is not None and counted:
            self.trace(self.layer, steered_ids, steered_weights)
        steered_weights = self.weights_for(logits, steered_ids, steered_weights, table, steering).to(weights.dtype)
        if steered_weights.requires_grad or weights.requires_grad:
            # the tokens left alone keep the model's own weights, gradient and all
            steered = (table[:, :1] >= 0) & (table[:, :1] < steering.rows)
            steered_weights = torch.where(steered, steered_weights, weights)
        changed = list(output)
        changed[family.weights_at], changed[family.ids_at] = steered_weights, self.filled(steered_ids, ids.dtype)
        return tuple(changed)


class Fused(Engine):
    """The router's forward as gate matrix and one `route` call."""

    def install(self) -> None:
        """Give the router a class of its own that routes through this engine."""
        original = type(self.site.module)

        def forward(module: nn.Module, hidden: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.forward(module, hidden, arguments)

        names = {"forward": forward, "__module__": original.__module__, "__doc__": original.__doc__}
        self._original = original
        self.site.module.__class__ = type(original.__name__, (original,), names)

    def remove(self) -> None:
        """Give the router its own class back."""
        self.site.module.__class__ = self._original

    def forward(
        self, module: nn.Module, hidden: Tensor, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [..., H] -> router logits [T, E], weights [T, k], ids int64 [T, k]."""
        context, family = self.context, self.family
        logits = gate_logits(module, family.gate, hidden)
        again = recomputing()
        table = None if context.idle else self.table(logits)
        steering = None if context.idle or not context.steers else self.steering
        weights, ids = ops.route(
            logits,
            at(module, family.top_k),
            self.spec,
            correction_bias=family.bias_of(module, (hidden, *arguments)),
            expert_scale=family.scale_of(module),
            steering=steering,
            tokens=table,
            statistics=None if again else self.statistics,
        )
        if self.trace is not None and not again:
            self.trace(self.layer, ids, weights)
        weights = self.weights_for(logits, ids, weights, table, steering)
        return logits, weights.to(weight_dtype(family.weights, hidden, logits)), self.filled(ids, torch.int64)


def gate_logits(module: nn.Module, gate: Gate | None, hidden: Tensor) -> Tensor:
    """Router logits [T, E] of hidden states [..., H], in the dtypes the model itself uses."""
    if gate is None:
        raise ValueError(f"{type(module).__name__} is more than a gate matrix")
    weight, bias = at(module, gate.weight), None if gate.bias is None else at(module, gate.bias)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if gate.compute == "float32":
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    elif gate.compute == "weight":
        hidden = hidden.to(weight.dtype)
    logits = F.linear(hidden, weight, bias)
    return logits.float() if gate.result == "float32" else logits


def weight_dtype(rule: str, hidden: Tensor, logits: Tensor) -> torch.dtype:
    """The dtype of the weights a router returns."""
    return {"logits": logits.dtype, "input": hidden.dtype, "float32": torch.float32}[rule]
