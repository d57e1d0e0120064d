"""What both engines share: what is counted, what steers, and how a steered choice is put into the model's form.

**hook** (`hook.HookEngine`) is a forward hook. With nothing to steer it only counts and returns None, so every bit of
the model's output stays. With steering, tokens that have a steering row are routed again from the router's own logits;
all others keep the model's own ids and weights. The router's adapter reads and writes its output.

**fused** (`fused.FusedEngine`) replaces the router's forward by its gate matrix and one `route` call, through a
subclass made for the one module, so that `isinstance`, `state_dict` and recorders of router logits live on.

A slot that steering leaves empty (id -1) is handed to the experts as the largest id of its row (0 where the row has
none) with weight 0, since the experts of transformers cannot take -1. It is counted as empty, never as a selection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_route import ops
from moe_route.calls.token_table import on_device
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.modules.intercept import Change
from moe_route.patching.context import RunningCall
from moe_route.routers.discovery import RouterInfo

ChoiceCallback = Callable[[int, Tensor, Tensor], None]
"""Called with a layer, ids [T, k] (-1: an empty slot) and weights [T, k], after steering."""

EMPTYING = frozenset(("force", "top_k", "remap"))  # steering tables that can leave a slot empty


class PerTokenSteering(Protocol):
    """Steering that looks at more than a token's row (`steering.TokenSteering`)."""

    trained: bool
    is_null: bool
    num_experts: int
    wide: int  # slots where a row has more than the router, else 0

    @property
    def replays(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...
    @property
    def tables(self) -> Mapping[str, object]: ...
    def to(self, device: torch.device) -> PerTokenSteering: ...
    def fitted(self, name: str, spec: RouterSpec) -> PerTokenSteering: ...
    @property
    def route(self) -> Callable[..., tuple[Tensor, Tensor, tuple[Tensor, SteeringTables, Tensor]]]: ...


LayerSteering = SteeringTables | PerTokenSteering


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
        self.steering: LayerSteering | None = None
        self.on_choice: ChoiceCallback | None = None
        self.cohort = -1  # engines with an equal one are counted together (`deferred`)

    def configure(
        self, statistics: StatisticsTables | None, steering: LayerSteering | None, on_choice: ChoiceCallback | None
    ) -> None:
        """Set what is counted into, what steers, and who is told."""
        self.statistics, self.steering, self.on_choice = statistics, steering, on_choice
        for tables in (statistics, steering):
            if tables is not None:
                ops.load_kernels(self.router.num_experts, tables.device)
        self.adapter.idle = statistics is None and steering is None and on_choice is None
        self.adapter.may_leave_empty = steering is not None and not EMPTYING.isdisjoint(steering.tables)

    @abstractmethod
    def changes(self) -> Sequence[Change]:
        """The changes to the model by which this engine sees the router, or takes its place."""

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
        """Give a choice to the trace, which is of tokens; those that the router was not given have none (ids -1)."""
        if self.on_choice is None or self.adapter.patches:
            return
        weights, rows = weights.detach(), self.adapter.token_subset()
        if rows is not None:
            shape = (self.context.num_tokens, ids.shape[1])
            ids = ids.new_full(shape, -1).index_copy(0, rows, ids)
            weights = weights.new_zeros(shape).index_copy(0, rows, weights)
        self.on_choice(self.layer, ids, weights)

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
        given |= {"tokens": table, "counter": self.counter(logits), "entries": self.entries(logits)}
        given |= {"statistics": statistics}
        weights, ids, steered = steering.route(logits, k, self.spec, **model, **given)
        return Choice(weights, ids, *steered)

    def counter(self, logits: Tensor) -> Tensor | None:
        """What tells the tokens of the router apart, where the labels say it."""
        counters, rows, device = self.context.counters, self.adapter.token_subset(), logits.device
        if not counters:
            return None
        counter = on_device(counters, device)
        if self.adapter.patches:
            rows = self.context.rows_of_patches(len(logits))
            if rows is None:
                return torch.arange(len(logits), device=device)
        return counter if rows is None else counter[rows.to(device)]

    def entries(self, logits: Tensor) -> Tensor | None:
        """Which recorded choices are those of the router's tokens, [T, M], where the labels say it."""
        entries, rows, device = self.context.entries, self.adapter.token_subset(), logits.device
        if not entries:
            return None
        found = on_device(entries, device)
        return found if rows is None else found[rows.to(device)]

    def steering_on(self, device: torch.device) -> LayerSteering:
        """What steers, on the router's device: moved there once; trained tables, with their gradient, in every call."""
        steering = self.steering
        assert steering is not None
        if steering.device == device:
            return steering
        moved = steering.to(device)
        if not moved.trained:
            self.steering = moved
        return moved
