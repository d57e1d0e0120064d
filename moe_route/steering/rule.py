"""``Rule``: one operation on some experts' logits or weights, with its conditions. A plan is a collection of rules.

``OPERATIONS`` has one line per kind of rule. ``compiled.py`` turns rules into the planes of ``SteeringTables``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_route.calls.call import PHASES
from moe_route.contract.limits import MAX_CHOSEN
from moe_route.steering.layers import as_layers, show_numbers
from moe_route.steering.model import PlanError
from moe_route.steering.replay import ReplayTable
from moe_route.steering.score_table import ScoreTable
from moe_route.steering.sequence_table import SequenceTable

__all__ = ["OPERATIONS", "Operation", "PlanError", "Rule", "rule_from_dict"]

Experts = Mapping[int, Iterable[int] | Mapping[int, float]] | Iterable[int]


class Operation(NamedTuple):
    """Properties of a kind of rule: how strengths combine ("add", "multiply" or not at all), and its modes.

    The first mode is the default.
    """

    combine: Literal["add", "multiply", ""]
    modes: tuple[str, ...]
    shows: str


OPERATIONS = {
    "activate": Operation("add", ("population", "sample"), "logit + {x} * std(logits)"),
    "bias": Operation("add", ("logit", "score", "choice"), "{mode} + {x}"),
    "magnitude": Operation("add", ("",), "logit + {x} * |logit|"),
    "scale_logits": Operation("multiply", ("",), "logit * {x}"),
    "scale_weights": Operation("multiply", ("before", "after"), "weight * {x} ({mode} renormalization)"),
    "temperature": Operation("multiply", ("",), "logits / {x}"),
    "force_on": Operation("", ("paper", "steermoe", "natural"), "chosen first, weight as {mode}"),
    "force_off": Operation("", ("paper", "steermoe", "natural"), "chosen last, weight as {mode}"),
    "forbid": Operation("", ("",), "never chosen"),
    "top_k": Operation("", ("",), "{x} experts per token"),
    "remap": Operation("", ("",), "chosen expert replaced"),
    "replace_scores": Operation("", ("",), "router scores replaced by {x}"),
    "reserve_slot": Operation("", ("",), "takes the last slot where not chosen"),
    "fix_choice": Operation("", ("",), "exactly these experts chosen, in this order"),
    "replay": Operation("", ("",), "exactly the recorded experts of {x}"),
    "gumbel": Operation("", ("",), "chosen by logit + {x} * Gumbel noise"),
}
# rules that apply to a whole layer, with a value in place of experts
LAYER_KINDS = ("temperature", "top_k", "gumbel")
# rules whose coefficients are values (scores, or indices of slots), not factors of a strength
VALUED_KINDS = ("replace_scores", "fix_choice")
# kinds whose values may be given per token, and the class of the table that holds them
TABLES: Mapping[str, type[SequenceTable]] = {"replay": ReplayTable, "replace_scores": ScoreTable}
# rules that act on each expert separately, so that single experts can be left out
EXPERT_KINDS = (
    "activate",
    "bias",
    "magnitude",
    "scale_logits",
    "scale_weights",
    "force_on",
    "force_off",
    "forbid",
)
Spans = tuple[tuple[int, int | None], ...]  # half-open, increasing, not adjacent; None: to the end


@dataclass(frozen=True, slots=True)
class Rule:
    """One operation on some experts, under conditions. Immutable and hashable; every field is plain data.

    Attributes:
        kind: a key of ``OPERATIONS``.
        experts: ((layer, ((expert, coefficient), ...)), ...) in increasing order; empty for "replay" and for kinds of a
            whole layer. The coefficient multiplies the strength of an additive rule and is the factor of a
            multiplicative rule. It is the target expert of "remap", the score of "replace_scores", the slot (from 0) of
            "fix_choice", and 1 otherwise.
        strength: an additive rule uses strength * coefficient, a multiplicative rule coefficient ** strength. So
            multiplying a plan by a number multiplies ``strength`` only.
        value: temperature (also of "gumbel"), or experts per token, for kinds of a whole layer.
        mode: a mode of the operation.
        layers, groups, phase: conditions, None for any. Experts of layers outside ``layers`` are kept but not changed,
            so that a control can move the rule to other layers.
        positions: spans of positions in the sequence, padding not counted; None for any.
        absent: only experts that the router does not choose itself.
        draw: seed of a random control with as many experts, drawn per token, or of the noise of "gumbel".
        table: values per token: the choices of "replay", or scores of "replace_scores" that depend on the token.
    """

    kind: str
    experts: tuple[tuple[int, tuple[tuple[int, float], ...]], ...] = ()
    strength: float = 1.0
    value: float | None = None
    mode: str = ""
    layers: tuple[int, ...] | None = None
    groups: tuple[str, ...] | None = None
    phase: str | None = None
    positions: Spans | None = None
    absent: bool = False
    draw: int | None = None
    table: SequenceTable | None = None

    def in_layer(self, layer: int) -> tuple[tuple[int, float], ...]:
        """(expert, coefficient) pairs that the rule changes in ``layer``."""
        if self.layers is not None and layer not in self.layers:
            return ()
        return dict(self.experts).get(layer, ())

    @property
    def touched_layers(self) -> tuple[int, ...] | None:
        """Layers that the rule changes; None for every layer."""
        if self.kind in LAYER_KINDS or (self.table is not None and self.table.layers is None):
            return self.layers
        named = [layer for layer, _ in self.experts] if self.table is None else self.table.layers or ()
        return tuple(layer for layer in named if self.layers is None or layer in self.layers)

    def touches(self, layer: int) -> bool:
        """Whether the rule changes ``layer``."""
        if self.layers is not None and layer not in self.layers:
            return False
        if self.table is not None:
            return self.table.in_layer(layer) is not None
        return self.kind in LAYER_KINDS or any(layer == named for named, _ in self.experts)

    def applies(self, phase: str, group: str | None) -> bool:
        """Whether the rule applies to tokens of ``group`` in ``phase``, at some position."""
        return self.phase in (None, phase) and (self.groups is None or group in self.groups)

    def effective(self, coefficient: float) -> float:
        """The number that is added, or multiplied or divided by, computed from strength and coefficient."""
        if OPERATIONS[self.kind].combine == "add":
            return self.strength * coefficient
        return _power(coefficient, self.strength, self.kind)

    def scaled(self, factor: float) -> Rule:
        """The rule with its strength multiplied; raises ``PlanError`` for kinds without strength."""
        if not OPERATIONS[self.kind].combine:
            raise PlanError(
                f"a {self.kind} rule has no strength to scale: it holds or it does not. "
                "Scale the soft part of the plan alone and add the rest"
            )
        return checked(replace(self, strength=_finite(self.strength * factor, "strength")))

    def opposite(self) -> Rule:
        """The opposite rule: the strength negated, on and off exchanged."""
        flipped = {"force_on": "force_off", "force_off": "force_on"}
        if self.kind in flipped:
            return replace(self, kind=flipped[self.kind])
        if not OPERATIONS[self.kind].combine:
            raise PlanError(f"a {self.kind} rule has no opposite: leave it out of the control")
        return self.scaled(-1.0)

    def relabeled(self, order: Callable[[int, int], np.ndarray]) -> Rule:
        """The rule with expert e of each layer renamed to ``order(layer, largest)[e]``.

        ``largest`` is the largest expert that the rule names in the layer.
        """
        if self.table is not None:
            return replace(self, table=self.table.relabeled(order))
        experts = []
        for layer, pairs in self.experts:
            to = order(layer, pairs[-1][0])
            remaps = self.kind == "remap"
            new = {int(to[e]): float(to[int(c)]) if remaps and c >= 0 else c for e, c in pairs}
            experts.append((layer, tuple(sorted(new.items()))))
        return replace(self, experts=tuple(experts))

    def moved(self, layers: Iterable[int] | int) -> Rule:
        """The rule in other layers, on the experts that it keeps there."""
        if self.table is not None:
            raise PlanError(
                f"a {self.kind} rule of single tokens cannot move to other layers: leave it out of the control"
            )
        experts = None if self.kind in LAYER_KINDS else {layer: dict(pairs) for layer, pairs in self.experts}
        return self._as_before(make_rule(self.kind, experts, layers, value=self.value, mode=self.mode, draw=self.draw))

    def with_experts(self, experts: Experts) -> Rule:
        """The rule with other experts; unchanged if it names none."""
        if self.kind in LAYER_KINDS or self.kind == "remap":
            return self
        factors = {coefficient for _, pairs in self.experts for _, coefficient in pairs}
        if len(factors) != 1 or self.kind in VALUED_KINDS:
            raise PlanError(f"a {self.kind} rule with a coefficient for each expert has no other experts to go to")
        return self._as_before(make_rule(self.kind, experts, self.layers, factor=min(factors), mode=self.mode))

    def _as_before(self, rule: Rule) -> Rule:
        """``rule`` with the strength and conditions of this rule, except for its layers."""
        kept = ("strength", "groups", "phase", "positions", "absent", "draw")
        return replace(rule, **{name: getattr(self, name) for name in kept})

    def restricted(
        self,
        groups: tuple[str, ...] | None,
        phase: str | None,
        layers: tuple[int, ...] | None,
        positions: Spans | None = None,
        absent: bool = False,
    ) -> Rule | None:
        """The rule under further conditions, or None if it can then never apply."""
        if phase is not None and self.phase not in (None, phase):
            return None
        narrowed = replace(
            self,
            groups=_both(self.groups, groups),
            phase=phase if phase is not None else self.phase,
            layers=_both(self.layers, layers),
            positions=_meeting(self.positions, positions),
            absent=self.absent or absent,
        )
        return None if () in (narrowed.groups, narrowed.layers, narrowed.positions) else checked(narrowed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content without default values; a table is named by its digest."""
        content: dict[str, Any] = {"kind": self.kind}
        if self.experts:
            plain = self.kind not in VALUED_KINDS and all(c == 1.0 for _, pairs in self.experts for _, c in pairs)
            content["experts"] = {
                str(layer): [expert for expert, _ in pairs] if plain else {str(expert): c for expert, c in pairs}
                for layer, pairs in self.experts
            }
        neutral = {"strength": 1.0, "value": None, "mode": "", "phase": None, "absent": False, "draw": None}
        for field, value in neutral.items():
            if getattr(self, field) != value:
                content[field] = getattr(self, field)
        if self.positions is not None:
            content["positions"] = [list(span) for span in self.positions]
        for field in ("layers", "groups"):
            if getattr(self, field) is not None:
                content[field] = list(getattr(self, field))
        if self.table is not None:
            content["table"] = self.table.digest
        return content

    def __str__(self) -> str:
        what, how, when = self.shown
        return f"{what}: {how}{f' [{when}]' if when else ''}"

    @property
    def shown(self) -> tuple[str, str, str]:
        """The rule in words: its target, its effect, and its conditions ("" for none)."""
        return self._what(), self._how(), self._when()

    def _what(self) -> str:
        layers = self.touched_layers
        where = "every layer" if layers is None else f"layers {show_numbers(layers)}" if len(layers) > 1 else ""
        where = where or (f"layer {layers[0]}" if layers else "no layer")
        name = self.kind.replace("_", " ")
        if self.kind in LAYER_KINDS or self.table is not None:
            return f"{name} in {where}"
        if self.kind == "activate" and self.strength < 0:
            name = "deactivate"
        count = sum(len(self.in_layer(layer)) for layer in layers or ())
        return f"{name} {count} expert{'' if count == 1 else 's'} in {where}"

    def _how(self) -> str:
        operation = OPERATIONS[self.kind]
        if self.kind == "top_k":
            return operation.shows.format(x=f"{self.value:g}")
        if self.table is not None:
            return operation.shows.format(x=f"{self.table}" if self.kind == "replay" else f"those of {self.table}")
        values = {self.effective(self.value)} if self.value is not None else set()
        coefficients = {c for layer in self.touched_layers or () for _, c in self.in_layer(layer)}
        if operation.combine and self.value is None:
            values = {self.effective(c) for c in coefficients}
        elif self.kind == "replace_scores":
            values = coefficients
        ends = [f"{value:g}" for value in sorted({min(values), max(values)})] if values else []
        shown = operation.shows.format(x=" to ".join(ends), mode=self.mode).replace("+ -", "- ")
        return shown + (" (sample std)" if self.mode == "sample" else "")

    def _when(self) -> str:
        conditions = [] if self.groups is None else [f"groups {', '.join(self.groups)}"]
        conditions += [] if self.phase is None else [f"{self.phase} only"]
        conditions += [] if self.positions is None else [f"positions {_show_spans(self.positions)}"]
        conditions += ["only experts not chosen already"] if self.absent else []
        what = "drawn for each token" if self.kind == "gumbel" else "other experts for each token, drawn"
        conditions += [] if self.draw is None else [f"{what} with seed {self.draw}"]
        return "; ".join(conditions)


def make_rule(
    kind: str,
    experts: Experts | None,
    layers: Iterable[int] | int | None,
    *,
    strength: float = 1.0,
    factor: float = 1.0,
    value: float | None = None,
    mode: str = "",
    table: SequenceTable | None = None,
    draw: int | None = None,
) -> Rule:
    """Make a checked rule from a user's arguments. ``factor`` multiplies the coefficient of every expert."""
    chosen = None if layers is None else _layers(layers)
    if chosen == ():
        raise PlanError(f"a {kind} rule for no layer: name at least one layer")
    normal = () if experts is None else _experts(experts, chosen, factor)
    if experts is not None and not any(chosen is None or layer in chosen for layer, _ in normal):
        where = "" if chosen is None else f" in layers {show_numbers(chosen)}"
        raise PlanError(f"the selection has no experts{where}: lower its threshold or choose other layers")
    return checked(
        Rule(
            kind=kind,
            experts=normal,
            strength=_finite(strength, "strength"),
            value=None if value is None else _finite(value, kind),
            mode=mode or OPERATIONS[kind].modes[0],
            layers=chosen,
            table=table,
            draw=None if draw is None else index(draw),
        )
    )


def checked(rule: Rule) -> Rule:
    """The rule itself; raises ``PlanError`` for values that its operation does not accept."""
    operation = OPERATIONS[rule.kind]
    if rule.mode not in operation.modes:
        raise PlanError(f"{rule.kind} has no mode {rule.mode!r}: use one of {', '.join(map(repr, operation.modes))}")
    given = {"a value": rule.value is not None, "experts": bool(rule.experts), "a table": rule.table is not None}
    needed = "a value" if rule.kind in LAYER_KINDS else "a table" if rule.kind == "replay" else "experts"
    allowed = [[needed]] + ([["a table"]] if rule.kind in TABLES else [])
    if [name for name, present in given.items() if present] not in allowed:
        raise PlanError(f"a {rule.kind} rule needs {needed} and nothing else")
    if rule.kind == "top_k" and (rule.value is None or rule.value < 1 or rule.value != int(rule.value)):
        raise PlanError(
            f"top_k must be a whole number from 1 to the experts of the layer (at most {MAX_CHOSEN}), not {rule.value}"
        )
    if rule.kind in ("temperature", "gumbel") and (rule.value is None or rule.value <= 0):
        raise PlanError(f"temperature must be above 0, not {rule.value}")
    if rule.kind == "gumbel" and rule.draw is None:
        raise PlanError("a gumbel rule needs the seed of its noise: Plan.gumbel(seed)")
    _check_values(rule)
    if rule.absent and rule.kind not in EXPERT_KINDS:
        raise PlanError(
            f"a {rule.kind} rule cannot be left out for experts that are chosen already: use absent=True with "
            f"{', '.join(EXPERT_KINDS)}"
        )
    if rule.draw is not None and rule.kind in ("remap", "temperature", "top_k"):
        raise PlanError(f"a {rule.kind} rule names no experts that could be drawn for each token: leave it out")
    if operation.combine == "multiply":
        for factor in [c for _, pairs in rule.experts for _, c in pairs] + ([rule.value] if rule.value else []):
            _power(factor, rule.strength, rule.kind)
    return rule


def _check_values(rule: Rule) -> None:
    """Raise ``PlanError`` for invalid scores, and for slots other than 0, 1, 2, ... ."""
    for layer, pairs in rule.experts:
        values = sorted(value for _, value in pairs)
        if rule.kind == "replace_scores" and (values[0] < 0 or values[-1] <= 0):
            raise PlanError(f"the scores of layer {layer} must be 0 or more, and one of them above 0")
        if rule.kind == "fix_choice" and values != list(range(len(values))):
            raise PlanError(f"the fixed experts of layer {layer} need the slots 0 to {len(values) - 1}, one each")


def _power(factor: float, strength: float, kind: str) -> float:
    if factor < 0:
        raise PlanError(f"{kind} needs factors of 0 or more, not {factor:g}")
    if factor == 0 and strength < 0:
        raise PlanError(f"{kind} by 0 cannot be inverted: leave it out or use a small factor")
    try:
        return factor**strength
    except OverflowError as error:
        raise PlanError(f"{kind}: {factor:g} to the power {strength:g} is too large") from error


def _experts(experts: Experts, layers: tuple[int, ...] | None, factor: float) -> tuple[tuple[int, Any], ...]:
    factor = _finite(factor, "factor")
    try:
        if not isinstance(experts, Mapping):
            if layers is None:
                raise PlanError("experts without layers: pass layers=..., or a mapping from layer to experts")
            same = list(experts)
            experts = dict.fromkeys(layers, same)
        normal = {index(layer): _coefficients(of_layer, factor) for layer, of_layer in experts.items()}
    except TypeError as error:
        raise PlanError(
            f"experts must be a mapping from layer to expert ids (or to {{expert: coefficient}}): {error}"
        ) from error
    negative = [layer for layer in normal if layer < 0]
    if negative:
        raise PlanError(f"there is no layer {negative[0]}: layers count from 0")
    return tuple((layer, normal[layer]) for layer in sorted(normal) if normal[layer])


def _coefficients(of_layer: Iterable[int] | Mapping[int, float], factor: float) -> tuple[tuple[int, float], ...]:
    pairs = of_layer.items() if isinstance(of_layer, Mapping) else ((expert, 1.0) for expert in of_layer)
    found = {index(expert): _finite(coefficient * factor, "coefficient") for expert, coefficient in pairs}
    if found and min(found) < 0:
        raise PlanError(f"there is no expert {min(found)}: experts count from 0")
    return tuple(sorted(found.items()))


def _layers(layers: Iterable[int] | int) -> tuple[int, ...]:
    try:
        return as_layers(layers)
    except (TypeError, ValueError) as error:
        raise PlanError(str(error)) from error


def _finite(value: float, name: str) -> float:
    try:
        number = float(value) + 0.0  # + 0.0 makes -0.0 and 0.0 one strength, with one hash
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name} must be a number, not {value!r}") from error
    if not math.isfinite(number):
        raise PlanError(f"{name} must be finite, not {number}: to keep an expert out for good use Plan.forbid")
    return number


def _both(mine: tuple[Any, ...] | None, theirs: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    return tuple(entry for entry in mine if entry in theirs)


def as_groups(groups: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Sort group names and remove repeats; a single name may be given alone."""
    if groups is None:
        return None
    names = (groups,) if isinstance(groups, str) else tuple(groups)
    if not names or not all(isinstance(name, str) for name in names):
        raise PlanError(f"groups must be group names, at least one, not {groups!r}")
    return tuple(sorted(set(names)))


def as_positions(positions: Any) -> Spans | None:
    """Spans from a user's positions: a position, positions, a range, a slice, or pairs (start, stop).

    A stop of None means the end of the sequence.
    """
    if positions is None:
        return None
    if isinstance(positions, (int, slice, range)):
        positions = [positions]
    try:
        spans = [_span(entry) for entry in positions]
    except TypeError as error:
        raise PlanError(f"positions must be numbers, ranges, slices or (start, stop) pairs: {error}") from error
    if not spans:
        raise PlanError("positions must be named, at least one")
    return _united(spans)


def _span(entry: Any) -> tuple[int, int | None]:
    if isinstance(entry, (slice, range)):
        if entry.step not in (None, 1):
            raise PlanError(f"positions go in steps of 1, not {entry.step}: list them")
        entry = (entry.start or 0, entry.stop)
    start, stop = (entry, index(entry) + 1) if not isinstance(entry, (tuple, list)) else entry
    start, stop = index(start), None if stop is None else index(stop)
    if start < 0 or (stop is not None and stop <= start):
        raise PlanError(
            f"there are no positions {start} to {stop}: they count from 0 (padding left out), and end after"
        )
    return start, stop


def _united(spans: Iterable[tuple[int, int | None]]) -> Spans:
    """Sort spans and join those that overlap or are adjacent."""
    found: list[tuple[int, int | None]] = []
    for start, stop in sorted(spans, key=lambda span: span[0]):
        last = found[-1][1] if found else -1
        if not found or (last is not None and start > last):
            found.append((start, stop))
        elif last is not None and (stop is None or stop > last):
            found[-1] = (found[-1][0], stop)
    return tuple(found)


def _meeting(mine: Spans | None, theirs: Spans | None) -> Spans | None:
    """The positions that are in both."""
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    found = []
    for a, b in mine:
        for c, d in theirs:
            start, ends = max(a, c), [end for end in (b, d) if end is not None]
            if not ends or start < min(ends):
                found.append((start, min(ends) if ends else None))
    return _united(found)


def _show_spans(spans: Spans) -> str:
    shown = [f"{a}" if b == a + 1 else f"from {a}" if b is None else f"{a}-{b - 1}" for a, b in spans]
    return ", ".join(shown)


def as_phase(phase: str | None) -> str | None:
    if phase not in (None, *PHASES):
        raise PlanError(f"there is no phase {phase!r}: use {' or '.join(map(repr, PHASES))}")
    return phase


def rule_from_dict(content: Mapping[str, Any], tables: Mapping[str, SequenceTable] | None = None) -> Rule:
    """Rebuild a rule from ``Rule.to_dict`` and check it; raises ``PlanError`` for anything else.

    ``tables``: the tables of values per token, by the names that the content uses.
    """
    try:
        kind = content["kind"]
        if kind not in OPERATIONS:
            raise PlanError(f"this version knows no {kind!r} rule: upgrade moe-route")
        table = None
        if kind == "replay" or "table" in content:
            table = (tables or {})[content["table"]]
            if not isinstance(table, TABLES.get(kind, ())):
                raise PlanError(f"a {kind} rule cannot use a table of {table.field}")
        experts = {
            int(layer): {int(expert): c for expert, c in of.items()} if isinstance(of, Mapping) else of
            for layer, of in content.get("experts", {}).items()
        }
        made = make_rule(
            kind,
            experts if kind not in LAYER_KINDS and table is None else None,
            None,
            table=table,
            strength=content.get("strength", 1.0),
            value=content.get("value"),
            mode=content.get("mode", ""),
            draw=content.get("draw"),
        )
        layers, phase = content.get("layers"), as_phase(content.get("phase"))
        return checked(
            replace(
                made,
                layers=None if layers is None else _layers(layers),
                groups=as_groups(content.get("groups")),
                phase=phase,
                positions=as_positions(content.get("positions")),
                absent=bool(content.get("absent", False)),
            )
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"this is not a rule of a plan ({error!r}): pass what to_dict gave") from error
