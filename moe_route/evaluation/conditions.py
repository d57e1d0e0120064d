"""The settings that are tried, and the conditions that are compared: each is a name and the plan that steers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from moe_route.analysis.recipes import plan_of
from moe_route.evaluation.study import ControlSettings, Study, StudyError
from moe_route.steering import ExpertSelection, Plan, PlanError
from moe_route.steering.layers import layers, show_numbers

BASE, AGAIN, NULL, STEERED = "base", "base again", "null plan", "steered"
_NOBODY = "no language at all"  # group of the null plan, which no text has


@dataclass(frozen=True)
class FoundExperts:
    """Experts by threshold, each a mapping from tau to a selection over all layers.

    Attributes:
        task: used more in task text than in general text of the reference language.
        multilingual: used more in some other language than in the reference language.
    """

    task: Mapping[float, ExpertSelection]
    multilingual: Mapping[float, ExpertSelection]


@dataclass(frozen=True)
class Setting:
    """One way to steer: which experts (`tau`), in which layers, and how."""

    tau: float
    kind: Literal["soft", "hard"]
    strength: float
    std: str
    layers: tuple[int, int]
    layer_base: int

    @property
    def range(self) -> range:
        """The steered layers, counted from 0."""
        return layers(*self.layers, base=self.layer_base)

    def plan(self, experts: ExpertSelection, where: Sequence[int] | None = None) -> Plan:
        """Steer these experts in the setting's layers, or in those given."""
        steered = self.range if where is None else where
        return plan_of(experts, steered, self.kind, strength=self.strength, correction=1 if self.std == "sample" else 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {**asdict(self), "layers": list(self.layers)}

    def __str__(self) -> str:
        how = "hard" if self.kind == "hard" else f"soft {self.strength:g}"
        return f"tau {self.tau:g}, {how}, layers {show_numbers(self.range)}"


@dataclass(frozen=True)
class Conditions:
    """What is compared.

    Attributes:
        plans: name -> plan, None for the model alone; in the order in which they are run.
        left_out: name -> why this condition cannot be run here.
    """

    plans: Mapping[str, Plan | None]
    left_out: Mapping[str, str]


ALONE = Conditions({BASE: None, AGAIN: None}, {})
"""What a study that steers nothing compares: the model with itself."""


@dataclass(frozen=True)
class Steering:
    """What a study that steers has found and chosen.

    Attributes:
        selected: experts by threshold.
        published, chosen: the study's own setting, and the one that the controls are of.
        points: accuracy of every setting of the sweep, JSON-able; empty without a sweep.
    """

    selected: FoundExperts
    published: Setting
    chosen: Setting
    points: Sequence[Mapping[str, Any]]


def published_setting(study: Study, selected: FoundExperts, num_layers: int) -> Setting:
    """The study's own setting, with the first threshold that finds a task expert in the steered layers.

    It depends on the routing of text in the reference language alone. Raises `StudyError` if none does, or if the
    model has fewer layers.
    """
    steer = study.steering
    setting = Setting(study.finding.taus[0], steer.kind, steer.strength, steer.std, steer.layers, steer.layer_base)
    _check_fits(setting, num_layers)
    for tau in study.finding.taus:
        if selected.task[tau].restrict(setting.range):
            return replace(setting, tau=tau)
    listed = ", ".join(f"{tau:g}" for tau in study.finding.taus)
    raise StudyError(
        f"no task expert in layers {show_numbers(setting.range)} at find.tau {listed}: lower it, or choose other layers"
    )


def sweep_settings(study: Study, published: Setting, selected: FoundExperts, num_layers: int) -> dict[str, Setting]:
    """Name -> setting of every point of the sweep that steers an expert, the study's own first."""
    sweep, every = study.sweep, [published]
    if not sweep:
        return {}
    for tau, strength, where in product(
        sweep.tau or (published.tau,), sweep.strength or (published.strength,), sweep.layers or (published.layers,)
    ):
        point = replace(published, tau=tau, strength=strength, layers=where)
        _check_fits(point, num_layers)
        if point not in every and selected.task[tau].restrict(point.range):
            every.append(point)
    return {str(point): point for point in every}


def conditions(
    setting: Setting,
    published: Setting,
    selected: FoundExperts,
    controls: ControlSettings,
    num_experts: Sequence[int],
    seed: int,
) -> Conditions:
    """The conditions of the main comparison; the controls are those of `setting`.

    The null plan is the whole plan for a language that no text has: all of the machinery runs and no token is steered.
    """
    task = selected.task[setting.tau]
    steered = setting.plan(task)
    plans: dict[str, Plan | None] = {BASE: None, AGAIN: None, NULL: steered.only(groups=_NOBODY), STEERED: steered}
    left_out: dict[str, str] = {}

    def add(name: str, make: Callable[[], Plan], reason: str) -> None:
        try:
            plan = make()
        except PlanError as error:
            left_out[name] = str(error)
            return
        if plan:
            plans[name] = plan
        else:
            left_out[name] = reason

    if published != setting:
        plans["as published"] = published.plan(selected.task[published.tau])
    if "other layer base" in controls.run:
        other = replace(setting, layer_base=1 - setting.layer_base)
        name = f"layers counted from {other.layer_base}"
        if other.layers[0] < other.layer_base or other.range.stop > len(num_experts):
            left_out[name] = f"the model has no layers {other.layers[0]} to {other.layers[1]} counted from there"
        elif not task.restrict(other.range):
            left_out[name] = "no task expert in these layers"
        else:
            plans[name] = other.plan(task)
    sides = {"before": range(setting.range.start), "after": range(setting.range.stop, len(num_experts))}
    for side, where in sides.items():
        if side not in controls.run:
            continue
        if task.restrict(where):
            plans[f"layers {side}"] = setting.plan(task, where)
        else:
            left_out[f"layers {side}"] = f"no task expert {f'in layers {show_numbers(where)}' if where else 'there'}"
    if "multilingual" in controls.run:
        other_experts = selected.multilingual[setting.tau].restrict(setting.range)
        if other_experts:
            plans["multilingual experts"] = setting.plan(other_experts)
        else:
            left_out["multilingual experts"] = f"none in these layers at tau {setting.tau:g}"
    for number in range(seed, seed + controls.random):
        add(f"random {number}", lambda n=number: steered.random(n, num_experts=num_experts), "no expert")  # type: ignore[misc]
    for number in range(seed, seed + controls.random_per_token):
        add(f"random per token {number}", lambda n=number: steered.random_per_token(n), "no expert")  # type: ignore[misc]
    if "deactivation" in controls.run:
        add("deactivation", lambda: -steered, "no expert")
    if "off" in controls.run:
        add("experts off", lambda: Plan.forbid(task, setting.range), "no expert")
    return Conditions(plans, left_out)


def _check_fits(setting: Setting, num_layers: int) -> None:
    if setting.range.stop > num_layers:
        raise StudyError(
            f"steer.layers is {list(setting.layers)}, counted from {setting.layer_base}, and the model has "
            f"{num_layers} MoE layers: choose layers that it has"
        )
