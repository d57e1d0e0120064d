"""Learned routing: a few numbers per layer that are trained while the model stays frozen, and the plan that they give.

"Rewiring Experts on the Fly" (arXiv 2510.14853) adds a vector delta_l to the logits of selected layers and trains it on
the context by cross-entropy: ``z' = z + delta_l``. A factor per expert and a temperature per layer are trained alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moe_route.base.table import ShownAsTables, Table, data_frame
from moe_route.calls.call import PHASES
from moe_route.contract.tables import SteeringTables
from moe_route.steering.compile import CompiledPlan
from moe_route.steering.layers import as_layers, show_numbers
from moe_route.steering.model import PlanError
from moe_route.steering.plan import Plan
from moe_route.steering.rule import as_groups

if TYPE_CHECKING:
    import pandas as pd

What = Literal["bias", "scale", "temperature"]
_KINDS = ("bias", "scale", "temperature")
_SHOWN = 6  # experts that are printed per layer


class Learnable(Protocol):
    """The part of a router's description that is used (``RouterInfo``)."""

    @property
    def num_experts(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def steerable(self) -> bool: ...


@dataclass(frozen=True, eq=False, repr=False)
class LearnedRouting(ShownAsTables):
    """What learning gave.

    Attributes:
        plan: the learned numbers as a plan, which ``steer`` uses like any other.
        losses: the loss at each step, before its update.
        what: "bias", "scale" or "temperature".
        layers: the layers that were trained.
        groups: groups with numbers of their own, in the order of ``values``; () if all tokens share them.
        values: by layer, float32 [G, E] ([G] for "temperature"; G is 1 without groups): the learned numbers.
    """

    plan: Plan
    losses: tuple[float, ...]
    what: str
    layers: tuple[int, ...]
    groups: tuple[str, ...]
    values: dict[int, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {
            "plan": self.plan.hash,
            "losses": list(self.losses),
            "what": self.what,
            "layers": list(self.layers),
            "groups": list(self.groups),
            "values": {str(layer): values.tolist() for layer, values in self.values.items()},
        }

    def to_pandas(self) -> pd.DataFrame:
        """A data frame with a row per step: step, loss. Needs pandas."""
        return data_frame({"step": range(len(self.losses)), "loss": self.losses})

    def tables(self) -> list[Table]:
        rows = []
        for layer, values in self.values.items():
            for group, row in zip(self.groups or ("all",), values, strict=True):
                if self.what == "temperature":
                    rows.append((layer, group, f"{row:.3f}"))
                    continue
                neutral = 1.0 if self.what == "scale" else 0.0
                order = np.argsort(-np.abs(row - neutral), kind="stable")[:_SHOWN]
                rows.append((layer, group, ", ".join(f"{e}: {row[e]:+.3f}" for e in order.tolist())))
        steps = len(self.losses)
        title = (
            f"Learned {self.what} in layers {show_numbers(self.layers)}: loss {self.losses[0]:.4f} at the first of "
            f"{steps} steps, {self.losses[-1]:.4f} at the last"
        )
        return [Table(("layer", "group", f"largest {self.what}"), rows, title)]


class RoutingParameters:
    """The numbers that are trained, as steering tables of the live model.

    Args:
        routers: the routers of the model, in order.
        layers: layers to train; by default all that can be steered.
        groups: groups with numbers of their own; tokens of other groups are not steered. None: all tokens share them.
        what: "bias" (added to the logits, starts at 0), "scale" (multiplies them, starts at 1 and stays positive) or
            "temperature" (divides all logits of the layer, starts at 1 and stays positive).

    Raises ``PlanError`` for unknown names and for layers that the model lacks or that cannot be steered.
    """

    def __init__(
        self,
        routers: Sequence[Learnable],
        layers: Iterable[int] | int | None = None,
        groups: Sequence[str] | str | None = None,
        what: str = "bias",
    ) -> None:
        if what not in _KINDS:
            raise PlanError(f"what to learn must be one of {', '.join(map(repr, _KINDS))}, not {what!r}")
        self.routers, self.what = list(routers), what
        self.groups = as_groups(groups) or ()
        self.layers = _layers(self.routers, layers)
        rows = max(len(self.groups), 1)
        self.values: dict[int, nn.Parameter] = {}
        for layer in self.layers:
            router = self.routers[layer]
            shape = (rows,) if what == "temperature" else (rows, router.num_experts)
            self.values[layer] = nn.Parameter(torch.zeros(shape, device=router.device))

    def numbers(self, layer: int) -> Tensor:
        """The learned numbers of a layer, with a gradient: the parameter itself, or its exponential."""
        value = self.values[layer]
        return value if self.what == "bias" else value.exp()

    def compiled(self) -> CompiledPlan:
        """Steering tables with a gradient to the parameters, for one forward and backward pass."""
        tables: list[Any] = [None] * len(self.routers)
        for layer in self.layers:
            given: dict[str, Any] = {self.what: self.numbers(layer)}
            value = self.values[layer]
            tables[layer] = SteeringTables(len(value), self.routers[layer].num_experts, device=value.device, **given)
        rows = torch.zeros(len(PHASES), len(self.groups) + 1, 1, dtype=torch.int32)
        if self.groups:
            rows[:] = torch.arange(-1, len(self.groups), dtype=torch.int32)[:, None]
        return CompiledPlan(tables, rows, self.groups, "learning")

    def found(self) -> dict[int, np.ndarray]:
        """By layer, float32 [G, E] ([G] for "temperature")."""
        return {layer: self.numbers(layer).detach().cpu().numpy().copy() for layer in self.layers}

    def plan(self) -> Plan:
        """The numbers as a plan; experts without effect are left out."""
        learned, plans = self.found(), []
        for row, group in enumerate(self.groups or (None,)):
            mine = {layer: values[row] for layer, values in learned.items()}
            plans += [plan if group is None else plan.only(groups=group) for plan in self._plans(mine)]
        return sum(plans, Plan())

    def _plans(self, values: dict[int, np.ndarray]) -> list[Plan]:
        if self.what == "temperature":
            return [Plan.temperature(float(value), layers=layer) for layer, value in values.items() if value != 1]
        neutral = 0.0 if self.what == "bias" else 1.0
        experts = {
            layer: {e: float(value) for e, value in enumerate(row.tolist()) if value != neutral}
            for layer, row in values.items()
        }
        if not any(experts.values()):
            return []
        return [Plan.bias(experts) if self.what == "bias" else Plan.scale_logits(experts)]


def fit(
    parameters: RoutingParameters,
    loss: Callable[[], Tensor],
    steer: Callable[[CompiledPlan], None],
    *,
    steps: int,
    lr: float,
) -> list[float]:
    """Train the parameters by Adam; returns the loss at each step, before its update.

    ``steer`` is called with fresh tables before each step. Raises ``PlanError`` for a loss that is not a finite number
    with a gradient to the tables.
    """
    if index(steps) < 1 or not lr > 0:
        raise PlanError(f"learning takes at least one step and a learning rate above 0, not steps={steps}, lr={lr}")
    optimizer = torch.optim.Adam(list(parameters.values.values()), lr=lr)
    losses: list[float] = []
    for step in range(steps):
        steer(parameters.compiled())
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss()
        _check_loss(value, step)
        value.backward()
        if all(value.grad is None for value in parameters.values.values()):
            raise PlanError(
                "the loss does not depend on the routing of these layers: run the attached model inside loss(), in the "
                "layers and groups that are learned"
            )
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of the model take a gradient inside the block."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _layers(routers: Sequence[Learnable], layers: Iterable[int] | int | None) -> tuple[int, ...]:
    if layers is None:
        chosen = tuple(layer for layer, router in enumerate(routers) if router.steerable)
        if not chosen:
            raise PlanError("no router of this model can be steered, so there is nothing to learn: mr.describe(model)")
        return chosen
    chosen = as_layers(layers)
    for layer in chosen:
        if layer >= len(routers):
            raise PlanError(f"there is no layer {layer} to learn: the model has {len(routers)} MoE layers, from 0")
        if not routers[layer].steerable:
            raise PlanError(f"layer {layer} cannot be steered, so it cannot be learned: leave it out")
    if not chosen:
        raise PlanError("there is no layer to learn: name at least one")
    return chosen


def _check_loss(loss: Any, step: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise PlanError(f"loss() must return a tensor with one number, not {type(loss).__name__}")
    if not loss.requires_grad:
        raise PlanError("the loss has no gradient: run the model inside loss() without no_grad and inference_mode")
    if not bool(loss.isfinite()):
        raise PlanError(f"the loss is {float(loss.detach())} at step {step}: use a smaller lr")
