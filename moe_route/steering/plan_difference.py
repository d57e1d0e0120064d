"""Comparison of two plans, expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_route.base.table import ShownAsTables, Table
from moe_route.steering.layers import show_numbers
from moe_route.steering.rule import LAYER_KINDS, OPERATIONS, Rule

if TYPE_CHECKING:
    from moe_route.steering.plan import Plan

__all__ = ["PlanChange", "PlanDifference", "compare"]

_SHOWN = 60
# what a rule does, and where: kind, mode, conditions, layer (None for every layer), expert (None for the whole layer)
_Place = tuple[str, str, str, "int | None", "int | None"]


@dataclass(frozen=True)
class PlanChange:
    """Experts of one layer that two plans treat differently.

    Attributes:
        kind, where: the kind of rule, with its mode, and its conditions in words.
        layer: None for every layer.
        experts: () for rules of a whole layer.
        before, after: the strength, factor or value in each plan, "yes" for rules without one, None where the plan has
            no such rule.
    """

    kind: str
    where: str
    layer: int | None
    experts: tuple[int, ...]
    before: float | str | None
    after: float | str | None


@dataclass(frozen=True, repr=False)
class PlanDifference(ShownAsTables):
    """Differences between two plans. False if they do the same; ``model`` holds two models if those differ."""

    changes: tuple[PlanChange, ...]
    model: tuple[str, str] | None = None

    def __bool__(self) -> bool:
        return bool(self.changes or self.model)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        changes = [{**vars(change), "experts": list(change.experts)} for change in self.changes]
        return {"changes": changes, "model": None if self.model is None else list(self.model)}

    def tables(self) -> list[Table]:
        if not self:
            return [Table(("the plans are equal",), [])]
        rows = [
            (
                change.kind,
                "every" if change.layer is None else change.layer,
                show_numbers(change.experts) or "all",
                change.where or "everywhere",
                *(f"{value:+g}" if isinstance(value, float) else value for value in (change.before, change.after)),
            )
            for change in self.changes[:_SHOWN]
        ]
        more = len(self.changes) - len(rows)
        title = "" if self.model is None else f"made for another model: {self.model[0]}, {self.model[1]}"
        head = ("rule", "layer", "experts", "where", "before", "after")
        return [Table(head, rows, title, f"and {more} more rows: to_dict()" if more > 0 else "")]


def compare(before: Plan, after: Plan) -> PlanDifference:
    """See ``Plan.diff``."""
    old, new = _values(before.rules), _values(after.rules)
    grouped: dict[tuple[Any, ...], list[int]] = {}
    for place in sorted({*old, *new}, key=repr):
        if old.get(place) != new.get(place):
            *what, expert = place
            grouped.setdefault((*what, old.get(place), new.get(place)), []).extend([] if expert is None else [expert])
    changes = [
        PlanChange(f"{kind} ({mode})" if mode else kind, where, layer, tuple(sorted(experts)), was, now)
        for (kind, mode, where, layer, was, now), experts in grouped.items()
    ]
    changes.sort(key=lambda change: (-1 if change.layer is None else change.layer, change.kind, change.experts))
    models = None if before.model == after.model else (str(before.model), str(after.model))
    return PlanDifference(tuple(changes), models)


def _values(rules: Sequence[Rule]) -> dict[_Place, float | str]:
    """The combined value of all rules, by place: strengths add, factors multiply."""
    found: dict[_Place, float | str] = {}
    for rule in rules:
        operation = OPERATIONS[rule.kind]
        where = rule.shown[2]
        mode = rule.mode if len(operation.modes) > 1 else ""
        for layer, expert, value in _entries(rule):
            place = (rule.kind, mode, where, layer, expert)
            if place not in found or isinstance(value, str):
                found[place] = value if place not in found else f"{found[place]}, {value}"
            else:
                known = found[place]
                assert isinstance(known, float)
                found[place] = known * value if operation.combine == "multiply" else known + value
    return found


def _entries(rule: Rule) -> list[tuple[int | None, int | None, float | str]]:
    """(layer, expert, value) of everything that a rule changes."""
    layers: Sequence[int | None] = rule.layers or (None,)
    if rule.kind in LAYER_KINDS:
        value = rule.value or 0.0
        return [
            (layer, None, rule.effective(value) if rule.kind == "temperature" else float(value)) for layer in layers
        ]
    if rule.table is not None:
        of = rule.touched_layers
        return [
            (layer, None, f"{rule.table}, {rule.table.digest[:12]}") for layer in (of if of is not None else (None,))
        ]
    valued = bool(OPERATIONS[rule.kind].combine)
    named = rule.kind in ("remap", "replace_scores", "fix_choice")
    return [
        (layer, expert, rule.effective(c) if valued else float(c) if named else "yes")
        for layer in rule.touched_layers or ()
        for expert, c in rule.in_layer(layer)
    ]
