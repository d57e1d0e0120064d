"""The two engines: how a router is counted and steered.

**observed** is a forward hook. With nothing to steer it only counts and returns None, so not a bit of the model's
output changes. With steering, tokens that have a steering row are routed again from the router's own logits; all others
keep the model's own ids and weights. How a router's output is read and written is its adapter's matter.

**fused** replaces the router's forward by its gate matrix and one `route` call, through a subclass made for the one
module, so that `isinstance`, `state_dict` and recorders of router logits live on.

A slot that steering leaves empty (id -1) is handed to the experts as the largest id of its row (0 where the row has
none) with weight 0, since the experts of transformers cannot take -1. It is counted as empty, never as a selection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route import ops
from moe_route.calls.token_table import on_device
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.modules.attributes import at, number
from moe_route.ops.observe_changed import observe_changed
from moe_route.patching.context import RunningCall, recomputing
from moe_route.patching.deferred import versions
from moe_route.routers.discovery import RouterInfo
from moe_route.routers.family import Gate
from moe_route.routers.output import Decision, Output

Trace = Callable[[int, Tensor, Tensor], None]
EMPTYING = frozenset(("force", "top_k", "remap"))  # steering tables that can leave a slot empty


class SteersTokens(Protocol):
    """Steering that looks at more than a token's row (`steering.TokenSteering`)."""

    trained: bool
    is_null: bool
    num_experts: int
    wide: int  # slots where a row has more than the router, else 0

    @property
    def device(self) -> torch.device: ...
    @property
    def tables(self) -> Mapping[str, object]: ...
    def to(self, device: torch.device) -> SteersTokens: ...
    def fitted(self, name: str, spec: RouterSpec) -> SteersTokens: ...
    @property
    def route(self) -> Callable[..., tuple[Tensor, Tensor, tuple[Tensor, SteeringTables, Tensor]]]: ...


Steers = SteeringTables | SteersTokens


class Choice(NamedTuple):
    """A choice, and what it was made from: tables whose rows `table` names."""

    weights: Tensor
    ids: Tensor
    logits: Tensor
    steering: SteeringTables | None
    table: Tensor | None


class Engine(ABC):
    """What both engines share: what is set at the moment, and how a steered choice is put into the model's form."""

    def __init__(self, router: RouterInfo, context: RunningCall) -> None:
        self.router, self.context = router, context
        self.spec, self.family, self.adapter, self.layer = router.spec, router.family, router.adapter, router.layer
        self.statistics: StatisticsTables | None = None
        self.steering: Steers | None = None
        self.trace: Trace | None = None
        self.cohort = -1  # engines with an equal one are counted together (`deferred`)

    def configure(self, statistics: StatisticsTables | None, steering: Steers | None, trace: Trace | None) -> None:
        """Set what is counted into, what steers, and who is told."""
        self.statistics, self.steering, self.trace = statistics, steering, trace
        for tables in (statistics, steering):
            if tables is not None:
                ops.load_kernels(self.router.num_experts, tables.device)
        self.adapter.idle = statistics is None and steering is None and trace is None
        self.adapter.may_leave_empty = steering is not None and not EMPTYING.isdisjoint(steering.tables)

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
        rows = self.adapter.rows()
        if rows is not None:
            return context.table_of(rows, logits.device, self.router.name)
        if self.adapter.patches:
            return context.table_of_patches(logits.shape[0], logits.device)
        if context.table is not None and context.num_tokens == logits.shape[0] and context.device == logits.device:
            return context.table
        return context.table_for(logits.shape[0], logits.device, self.router.name)

    def tell(self, ids: Tensor, weights: Tensor) -> None:
        """Give a choice to the trace, which is of tokens; those that the router was not given have none (ids -1)."""
        if self.trace is None or self.adapter.patches:
            return
        weights, rows = weights.detach(), self.adapter.rows()
        if rows is not None:
            shape = (self.context.num_tokens, ids.shape[1])
            ids = ids.new_full(shape, -1).index_copy(0, rows, ids)
            weights = weights.new_zeros(shape).index_copy(0, rows, weights)
        self.trace(self.layer, ids, weights)

    def route(
        self,
        logits: Tensor,
        k: int,
        table: Tensor | None,
        steering: Steers | None,
        args: tuple[object, ...],
        statistics: StatisticsTables | None,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> Choice:
        """Choose k experts per token and count them; `own` are the weights and ids that the router chose itself. The
        weights have a gradient where one is asked for; tokens left alone keep that of the router's own weights."""
        module, family = self.router.module, self.family
        model: dict[str, Any] = {
            "correction_bias": family.bias_of(module, args),
            "expert_scale": family.scale_of(module),
        }
        given: dict[str, Any] = {} if own is None else {"choice_weights": own[0], "choice": own[1]}
        if steering is None or isinstance(steering, SteeringTables):
            given |= {"steering": steering, "tokens": table, "statistics": statistics}
            weights, ids = ops.route(logits, k, self.spec, **model, **given)
            return Choice(weights, ids, logits, steering, table)
        if own is None:
            with torch.no_grad():
                given = {"choice": ops.route(logits, k, self.spec, **model)[1]}
        given |= {"tokens": table, "counter": self.counter(logits), "statistics": statistics}
        weights, ids, steered = steering.route(logits, k, self.spec, **model, **given)
        return Choice(weights, ids, *steered)

    def counter(self, logits: Tensor) -> Tensor | None:
        """What tells the tokens of the router apart, where the labels say it."""
        counters, rows, device = self.context.counters, self.adapter.rows(), logits.device
        if not counters:
            return None
        counter = on_device(counters, device)
        if self.adapter.patches:
            rows = self.context.rows_of_patches(len(logits))
            if rows is None:
                return torch.arange(len(logits), device=device)
        return counter if rows is None else counter[rows.to(device)]

    def steering_on(self, device: torch.device) -> Steers:
        """What steers, on the router's device: moved there once; trained tables, with their gradient, in every call."""
        steering = self.steering
        assert steering is not None
        if steering.device == device:
            return steering
        moved = steering.to(device)
        if not moved.trained:
            self.steering = moved
        return moved


class HookEngine(Engine):
    """A forward hook on the router.

    `keeps_output`: whether the model leaves what the router returned as it is (None: not seen yet).
    `defers`: whether the hook only keeps the output of a small call, to be counted after the call.
    """

    def __init__(self, router: RouterInfo, context: RunningCall) -> None:
        super().__init__(router, context)
        self.keeps_output: bool | None = None if self.adapter.keeps and not self.adapter.patches else False
        self.defers = False

    def configure(self, statistics: StatisticsTables | None, steering: Steers | None, trace: Trace | None) -> None:
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
        self._handles = self.adapter.listen(self.hook)

    def remove(self) -> None:
        """Remove the hook."""
        for handle in self._handles:
            handle.remove()

    def parts(self, output: Output) -> Decision:
        """Router logits [T, E], weights [T, k] and ids [T, k] of what the router returned."""
        return self.adapter.read((), output)

    def hook(self, module: nn.Module, args: tuple[object, ...], output: Output) -> Output | None:
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
        # what only counts leaves nothing for a backward: a checkpointed layer that runs again does not count again
        with torch.set_grad_enabled(self.steering is not None and torch.is_grad_enabled()):
            decision = self.adapter.read(args, output)
        table = self.table(decision.logits)  # which begins a call where there is none
        if self.steering is not None and context.steers:
            steering = self.steering_on(decision.logits.device)
            return self._reroute(args, output, decision, table, steering, counted=not again)
        if again:
            return None
        if self.statistics is not None:
            if context.small and self.keeps_output is None and not torch.compiler.is_compiling():
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
        given: Steers,
        counted: bool,
    ) -> Output:
        adapter = self.adapter
        logits, own_weights, own_ids = adapter.chosen(args, output, decision) if adapter.settles else decision
        statistics = self.statistics if counted and not adapter.settles else None
        routed = self.route(logits, own_ids.shape[1], tokens, given, args, statistics, (own_weights, own_ids))
        weights, ids, logits, steering, table = routed
        assert steering is not None  # it was given, and the table too
        assert table is not None
        if counted and not adapter.settles:
            self.tell(ids, weights)
        changed, weights, ids = adapter.write(args, output, decision, weights.to(own_weights.dtype), ids)
        if counted and adapter.settles:
            self._count_settled(decision._replace(logits=logits), weights, ids, table, steering)
        return changed

    def _count_settled(
        self, decision: Decision, weights: Tensor, ids: Tensor, table: Tensor, steering: SteeringTables
    ) -> None:
        """Count what the experts get of a steered choice, beside what they would have got without steering."""
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
