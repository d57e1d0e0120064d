"""The two engines: where choices are counted, what steers them, and how a steered choice is written back.

**hook** (`HookEngine`) is a forward hook. Without steering it only counts and returns None, so every bit of the
model's output stays. With steering, tokens that have a steering row are routed again from the router's own logits; all
others keep the model's own ids and weights. The router's adapter reads and writes its output.

**fused** (`FusedEngine`) replaces the router's forward by its gate matrix and one `route` call. It does so with a
subclass made for the one module, so that `isinstance`, `state_dict` and recorders of router logits still work. Where
scores are tied it chooses as `csrc/include/moe_route/gate.h` says, or leaves the whole call to the model.

The experts of transformers cannot take id -1. So a slot that steering leaves empty is passed to them with weight 0 and
the largest id of its row, or 0 if the row has none. It is counted as empty, never as a selection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from moe_route import ops
from moe_route.base.devices import CaptureRefusedError, capturing
from moe_route.calls.call import recomputing
from moe_route.calls.token_table import Tables, on_device
from moe_route.contract.experts import AddedDirections
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.contract.token_tables import TokenTables
from moe_route.modules.intercept import Change, ReplacedForward, number
from moe_route.ops.observe_changed import observe_changed
from moe_route.ops.token_rules import route_tokens
from moe_route.patching.context import RunningCall
from moe_route.patching.deferred import versions
from moe_route.reference import capped
from moe_route.routers.adapter import Decision, Output
from moe_route.routers.check import check_output, runs_alone, undecided
from moe_route.routers.discovery import RouterInfo
from moe_route.routers.family import gate_logits, weight_dtype

ChoiceCallback = Callable[[int, Tensor, Tensor], None]
"""Called with a layer, ids [T, k] (-1: an empty slot) and weights [T, k], after steering."""

LogitsCallback = Callable[[int, Tensor], None]
"""Called with a layer and the router's own logits [T, E], before any steering."""

EMPTYING = frozenset(("force", "top_k", "remap"))  # steering tables that can leave a slot empty

NOT_CHECKED = "not checked"  # begins the note of a router that has not run yet

LayerSteering = SteeringTables | TokenTables

_WAITS = (
    "ties='model' asks the host in every layer whether scores are tied, which {} cannot: attach with ties='index', "
)
_WAITS += "or with engine='hook', which keeps every bit"


class Choice(NamedTuple):
    """A choice, and its inputs: logits, and tables whose rows `table` gives per token."""

    weights: Tensor
    ids: Tensor
    logits: Tensor
    steering: SteeringTables | None
    table: Tensor | None


class Engine(ABC):
    """The base of both engines: holds the current settings and writes a steered choice in the model's form.

    `unchecked`: whether the router had no weights at attach, and was not compared with its specification since.
    """

    def __init__(self, router: RouterInfo, context: RunningCall) -> None:
        self.router, self.context = router, context
        self.spec, self.family, self.adapter, self.layer = router.spec, router.family, router.adapter, router.layer
        self.statistics: StatisticsTables | None = None
        self.steering: LayerSteering | None = None
        self.on_choice: ChoiceCallback | None = None
        self.on_logits: tuple[LogitsCallback, ...] = ()
        self.directions: AddedDirections | None = None
        self._decided: tuple[Tensor, Tensor] | None = None  # token table and logits, until the experts have run
        self.cohort = -1  # engines with equal numbers are counted together (`deferred`)
        self.unchecked = False

    def configure(
        self,
        statistics: StatisticsTables | None,
        steering: LayerSteering | None,
        on_choice: ChoiceCallback | None,
        on_logits: tuple[LogitsCallback, ...],
        directions: AddedDirections | None,
    ) -> None:
        """Set the tables to count into, the steering, the callbacks, and the directions to add to outputs."""
        self.directions, self._decided = directions, None
        self.statistics, self.steering, self.on_choice, self.on_logits = statistics, steering, on_choice, on_logits
        for tables in (statistics, steering):
            if tables is not None:
                ops.load_kernels(self.router.num_experts, tables.device)
        silent = statistics is None and steering is None and on_choice is None
        self.adapter.idle = silent and not on_logits and directions is None
        self.adapter.may_leave_empty = steering is not None and not EMPTYING.isdisjoint(steering.tables)

    def check(self, args: tuple[object, ...], output: object) -> None:
        """Compare what the model's own router returned with the specification; raises `ModelNotSupportedError`."""
        self.unchecked = not check_output(self.router, args, output)
        if not self.unchecked:
            self.router.notes = tuple(note for note in self.router.notes if not note.startswith(NOT_CHECKED))

    @abstractmethod
    def changes(self) -> Sequence[Change]:
        """Changes to the model through which this engine observes the router, or replaces it."""

    def table(self, logits: Tensor) -> Tensor:
        """The token table for the rows of `logits`."""
        context = self.context
        context.reached = True
        rows = self.adapter.token_subset()
        if rows is not None:
            return context.table_of(rows, logits.device, self.router.name)
        if self.adapter.patches:
            return context.table_of_patches(logits.shape[0], logits.device)
        if context.table is not None and context.num_tokens == logits.shape[0] and context.device == logits.device:
            return context.table
        return context.table_for(logits.shape[0], logits.device, self.router.name)

    def tell(self, ids: Tensor, weights: Tensor) -> None:
        """Pass a choice to the trace, with ids -1 for tokens that this router was not given."""
        if self.on_choice is None or self.adapter.patches:
            return
        weights, rows = weights.detach(), self.adapter.token_subset()
        if rows is not None:
            shape = (self.context.num_tokens, ids.shape[1])
            ids = ids.new_full(shape, -1).index_copy(0, rows, ids)
            weights = weights.new_zeros(shape).index_copy(0, rows, weights)
        self.on_choice(self.layer, ids, weights)

    def show(self, logits: Tensor) -> None:
        """Pass on the router's own logits, with NaN for tokens that this router was not given."""
        if not self.on_logits or self.adapter.patches:
            return
        logits, rows = capped(logits, self.spec), self.adapter.token_subset()
        if rows is not None:
            shape = (self.context.num_tokens, logits.shape[1])
            logits = logits.new_full(shape, torch.nan).index_copy(0, rows.to(logits.device), logits)
        for callback in self.on_logits:
            callback(self.layer, logits)

    def decide(self, table: Tensor, logits: Tensor) -> None:
        """Keep what `added` needs, until the experts of this router have run."""
        if self.directions is not None and self.context.steers:
            self._decided = table, capped(logits, self.spec)

    def added(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the plan adds to the experts' output (`experts.outputs.Adder`)."""
        decided, self._decided = self._decided, None
        if decided is None or self.directions is None:
            return None
        table, logits = decided
        if self.directions.vectors.device != ids.device:
            self.directions = self.directions.to(ids.device)
        if len(ids) != len(table):
            raise RuntimeError(
                f"the experts of layer {self.layer} are given {len(ids)} tokens, their router {len(table)}: directions "
                "cannot be added there; leave the layer out, plan.only(layers=[...])"
            )
        table, logits = table.to(ids.device), logits.to(ids.device)
        return self.directions.added(table, ids, weights, logits, self.spec.scale)

    def route(
        self,
        logits: Tensor,
        k: int,
        table: Tensor | None,
        steering: LayerSteering | None,
        args: tuple[object, ...],
        statistics: StatisticsTables | None,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> Choice:
        """Choose k experts per token and count them; `own` are the weights and ids that the router chose itself.

        If gradients are needed, the weights have one; tokens that are not steered keep the gradient of the router's
        weights.
        """
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
        given |= {"tokens": table, "counter": self.counter(logits)}
        given |= {"entries": self._of_tokens(self.context.entries, logits)}
        given |= {"told": self._of_tokens(self.context.told, logits)}
        given |= {"statistics": statistics}
        weights, ids, steered = route_tokens(steering, logits, k, self.spec, **model, **given)
        return Choice(weights, ids, *steered)

    def counter(self, logits: Tensor) -> Tensor | None:
        """A number per token of the router that seeds its random draws, or None if the labels have none."""
        counters, rows, device = self.context.counters, self.adapter.token_subset(), logits.device
        if not counters:
            return None
        counter = on_device(counters, device)
        if self.adapter.patches:
            rows = self.context.rows_of_patches(len(logits))
            if rows is None:
                return torch.arange(len(logits), device=device)
        return counter if rows is None else counter[rows.to(device)]

    def _of_tokens(self, labels: Tables, logits: Tensor) -> Tensor | None:
        """The labels of each token of the router, [T, M], or None if the call has none."""
        if not labels:
            return None
        of_tokens, rows = on_device(labels, logits.device), self.adapter.token_subset()
        return of_tokens if rows is None else of_tokens[rows.to(logits.device)]

    def steering_on(self, device: torch.device) -> LayerSteering:
        """The steering on the router's device: moved there once, or in every call, with gradient, if it is trained."""
        steering = self.steering
        assert steering is not None
        if steering.device == device:
            return steering
        moved = steering.to(device)
        if not moved.trained:
            self.steering = moved
        return moved


class HookEngine(Engine):
    """Counts and steers a router in a forward hook.

    `keeps_output`: whether the model leaves the router's output unchanged (None: not known yet).
    `defers`: whether the hook only keeps the output of a small call, which is counted after the call.
    `parts`: reads router logits [T, E], weights [T, k] and ids [T, k] from the router's output.
    """

    def __init__(self, router: RouterInfo, context: RunningCall) -> None:
        super().__init__(router, context)
        self.keeps_output: bool | None = None if self.adapter.output_is_complete and not self.adapter.patches else False
        self.defers = False
        self.parts = self.adapter.parts()

    def configure(
        self,
        statistics: StatisticsTables | None,
        steering: LayerSteering | None,
        on_choice: ChoiceCallback | None,
        on_logits: tuple[LogitsCallback, ...],
        directions: AddedDirections | None,
    ) -> None:
        """Set the tables to count into, the steering, the callbacks, and the directions to add to outputs."""
        super().configure(statistics, steering, on_choice, on_logits, directions)
        more = steering is not None or on_choice is not None or bool(on_logits) or directions is not None
        only_counts = statistics is not None and not more
        self.defers = only_counts and self.keeps_output is True

    def may_defer(self, keeps_output: bool) -> None:
        """Called once it is known whether the model leaves the router's output unchanged."""
        self.keeps_output = keeps_output
        self.configure(self.statistics, self.steering, self.on_choice, self.on_logits, self.directions)

    def changes(self) -> Sequence[Change]:
        """The hook, as the router's adapter installs it."""
        return self.adapter.changes(self.hook)

    def hook(self, module: nn.Module, args: tuple[object, ...], output: Output) -> Output | None:
        """Count the router's output; return a new output only if some token is steered."""
        context = self.context
        if self.unchecked and not (context.idle or is_compiling()):
            self.check(args, output)
        if context.small and self.defers and not is_compiling():
            context.deferred.kept.append((self, output, versions(output) if context.versioned else None))
            return None
        if context.idle:
            return None
        again = context.table is None and recomputing()
        if again and self.steering is None and self.directions is None:
            return None
        # without steering nothing is kept for the backward pass, so that a checkpointed layer that runs again is not
        # counted
        keeps = self.steering is not None or bool(self.on_logits) or self.directions is not None
        with torch.set_grad_enabled(keeps and torch.is_grad_enabled()):
            decision = self.adapter.read(args, output)
        table = self.table(decision.logits)  # begins a call if none is running
        if not again:
            self.show(decision.logits)
        self.decide(table, decision.logits)
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


class FusedEngine(Engine):
    """Runs the router's forward as gate matrix and one `route` call.

    `asks_model`: whether a call with a tied row is left to the model.
    """

    def __init__(self, router: RouterInfo, context: RunningCall) -> None:
        super().__init__(router, context)
        self.asks_model = False
        self.own_forward = type(router.module).forward

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
        if self.unchecked and not is_compiling() and runs_alone(self.router, hidden.device):
            self.check((hidden, *arguments), self.own_forward(module, hidden, *arguments))
        logits = gate_logits(module, family.gate, hidden)
        again = recomputing()
        table = None if context.idle else self.table(logits)
        steers = self.steering is not None and context.steers and not context.idle
        steering = self.steering_on(logits.device) if steers else None
        statistics, args = None if again else self.statistics, (hidden, *arguments)
        k = number(module, family.top_k)
        own = self._own_choice(module, args, logits, k) if self.asks_model else None
        if not again and not context.idle:
            self.show(logits)
        if table is not None:
            self.decide(table, logits)
        routed = self.route(logits, k, table, steering, args, statistics, own)
        if not again:
            self.tell(routed.ids, routed.weights)
        weights = routed.weights.to(weight_dtype(family.weights, hidden, logits))
        return logits, weights, self.adapter.filled(routed.ids).long()

    def _own_choice(
        self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor, k: int
    ) -> tuple[Tensor, Tensor] | None:
        """Weights and ids of the model's own forward if some row of the call is tied, else None. Waits for the device.

        Raises `RuntimeError` under `torch.compile` and `CaptureRefusedError` while a CUDA graph is captured.
        """
        if is_compiling():
            torch._dynamo.comptime.comptime(_refuse_compiling)  # an error here would end the graph, and be lost
        if capturing(logits.device):
            raise CaptureRefusedError(_WAITS.format("a CUDA graph"))
        with torch.no_grad():
            tied = undecided(logits, k, self.spec, self.family.bias_of(module, args), self.family.low_precision)
        if not bool(tied):
            return None
        return self.adapter.read(args, self.own_forward(module, *args))[1:]


def _refuse_compiling(_: object) -> NoReturn:
    raise RuntimeError(_WAITS.format("a compiled graph"))
