"""``Rule``: one operation on some experts' logits or weights, with its conditions. A plan is a collection of rules.

``kinds.py`` has a class for each kind of rule; this file has what all of them share.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache
from operator import index
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np

from moe_route.base.schema import Natural, Tagged, meant
from moe_route.calls.call import PHASES
from moe_route.steering.cell import Cell, HasExperts
from moe_route.steering.functions import RoutingFunction, function_of
from moe_route.steering.layers import as_layers, show_numbers
from moe_route.steering.model import PlanError
from moe_route.steering.tables import PlanTable

Experts = Mapping[int, Iterable[int] | Mapping[int, float]] | Iterable[int]
Strength = float | Sequence[float]  # one number, or one for each position, from 0
Spans = tuple[tuple[int, int | None], ...]  # half-open, increasing, not adjacent; None: to the end
GAINS, LOSES = "gains", "loses"  # what a rule does to tokens of its experts


Pairs = tuple[tuple[int, float], ...]  # (expert, coefficient), in increasing order


class Entry(NamedTuple):
    """One thing that a rule changes: expert (None: the whole layer) of a layer (None: every layer), and its value."""

    layer: int | None
    expert: int | None
    value: float | str


class Seen(NamedTuple):
    """Recorded tokens that a rule would act on in one layer: how many, the choices of each expert [E], and top-k.

    ``pairs`` are the experts of the rule there, and ``chosen`` their choices.
    """

    tokens: int
    counts: np.ndarray
    top_k: int
    pairs: Pairs

    @property
    def chosen(self) -> np.ndarray:
        return self.counts[[expert for expert, _ in self.pairs]]


class Forecast(NamedTuple):
    """What a rule will do to such tokens.

    Attributes:
        moved: choices that change, by expert of the rule.
        certainty: "exact", "estimate" or "at most".
        side: ``GAINS`` or ``LOSES``; "" where its experts may do either.
        note: how it was estimated.
        experts: the experts whose tokens are touched; None for all of the rule.
    """

    moved: np.ndarray
    certainty: str
    side: str = ""
    note: str = ""
    experts: tuple[int, ...] | None = None


KINDS: dict[str, type[Rule]] = {}
"""By kind, its class: every subclass of ``Rule`` with a ``kind`` of its own, in the order of ``kinds.py``."""


@dataclass(frozen=True)
class Rule(ABC):
    """One operation on some experts, under conditions. Immutable and hashable; every field is plain data.

    Attributes:
        experts: ((layer, ((expert, coefficient), ...)), ...) in increasing order; empty for rules of a whole layer and
            for those with a table. The class says what a coefficient is; 1 where it is nothing.
        strength: an additive rule uses strength * coefficient, a multiplicative rule coefficient ** strength. So
            multiplying a plan by a number multiplies ``strength`` only.
        value: the number of a rule of a whole layer, such as a temperature.
        by_position: a number for each position of the sequence, from 0, which multiplies the strength of an additive
            rule, and the factors or the temperature of a multiplicative one; past its end the rule does nothing. Empty:
            the same at all positions.
        mode: one of ``modes``.
        layers, groups, phase: conditions, None for any. Experts of layers outside ``layers`` are kept but not changed,
            so that a control can move the rule to other layers.
        positions: spans of positions in the sequence, padding not counted; None for any.
        absent: only experts that the router does not choose itself.
        draw: seed of a random control with as many experts, drawn per token, or of noise.
        table: values per token.
        function: a user's own function of the logits.

    A class of ``kinds.py`` says with these what its rules are:

    Attributes:
        kind: its name in a file.
        shows: what it does, in words; "{x}" stands for its numbers and "{mode}" for its mode.
        fields: keys that a rule of this kind has in a file, besides conditions. Any other key is refused.
        modes: by mode, what it means to the class; the first is the default.
        table_type: class of its table.
        valued: whether coefficients are values, not factors of a strength.
        unmoved: why it changes no choice, if it never does.
        ordered: whether rules of this kind act in the order in which a plan was added up; others act in any.
        served: whether engines with their own model code (vLLM) can run it.
        multiplies: whether the strength is an exponent of factors.
    """

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
    table: PlanTable | None = None
    function: RoutingFunction | None = None
    by_position: tuple[float, ...] = ()

    kind: ClassVar[str]
    shows: ClassVar[str]
    fields: ClassVar[frozenset[str]]
    modes: ClassVar[Mapping[str, Any]] = {"": None}
    table_type: ClassVar[type[PlanTable] | None] = None
    valued: ClassVar[bool] = False
    drawn: ClassVar[str] = "other experts for each token, drawn"
    unmoved: ClassVar[str] = ""
    ordered: ClassVar[bool] = False
    served: ClassVar[bool] = True
    multiplies: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    # ---- what a kind of rule says

    @abstractmethod
    def write(self, cell: Cell, pairs: Pairs) -> None:
        """Write the rule into the cell of a layer that it touches, where ``pairs`` are its experts (``in_layer``)."""

    @abstractmethod
    def forecast(self, seen: Seen) -> Forecast:
        """What the rule will do to recorded tokens of a layer that it touches."""

    def entries(self) -> Iterator[Entry]:
        """Everything that the rule changes, for comparing plans and for showing numbers."""
        for layer in self.touched_layers or ():
            for expert, coefficient in self.in_layer(layer):
                yield Entry(layer, expert, self.effective(coefficient) if self._numbered else "yes")

    @property
    def _numbered(self) -> bool:
        """Whether an expert's coefficient says something."""
        return self.valued or "strength" in self.fields

    def check(self) -> None:  # noqa: B027 (most kinds accept any value)
        """Raise ``PlanError`` for values that this kind of rule does not accept."""

    def effective(self, coefficient: float) -> float:
        """A coefficient as it acts, with the strength."""
        return coefficient

    def joined(self, one: float, other: float) -> float:
        """The value of two entries of one place."""
        return one + other

    # ---- making

    @classmethod
    def of(
        cls,
        experts: Experts | None = None,
        layers: Iterable[int] | int | None = None,
        *,
        strength: Strength = 1.0,
        factor: Strength = 1.0,
        value: Strength | None = None,
        mode: str | None = None,
        table: PlanTable | None = None,
        draw: int | None = None,
        function: RoutingFunction | None = None,
    ) -> Rule:
        """Make a checked rule from a user's arguments. ``factor`` multiplies the coefficient of every expert.

        One of ``strength``, ``factor`` and ``value`` may be numbers by position.
        """
        given: dict[str, Any] = {"strength": strength, "factor": factor, "value": value}
        tables = {name: _by_position(one) for name, one in given.items() if _is_table(one)}
        given |= dict.fromkeys(tables, 1.0)
        chosen = None if layers is None else _layers(layers)
        if chosen == ():
            raise PlanError(f"a {cls.kind} rule for no layer: name at least one layer")
        normal = () if experts is None else _experts(experts, chosen, given["factor"])
        if experts is not None and not any(chosen is None or layer in chosen for layer, _ in normal):
            where = "" if chosen is None else f" in layers {show_numbers(chosen)}"
            raise PlanError(f"the selection has no experts{where}: lower its threshold or choose other layers")
        return cls(
            experts=normal,
            strength=_finite(given["strength"], "strength"),
            value=None if value is None else _finite(given["value"], cls.kind),
            mode=next(iter(cls.modes)) if mode is None else mode,
            layers=chosen,
            table=table,
            draw=None if draw is None else index(draw),
            function=function,
            by_position=next(iter(tables.values()), ()),
        ).checked()

    def checked(self) -> Rule:
        """The rule itself; raises ``PlanError`` for values that its kind does not accept."""
        if self.mode not in self.modes:
            raise PlanError(f"{self.kind} has no mode {self.mode!r}: use one of {', '.join(map(repr, self.modes))}")
        given = {"value": self.value is not None, "experts": bool(self.experts), "table": self.table is not None}
        given["function"] = self.function is not None
        named = [name for name, present in given.items() if present]
        if len(named) != 1 or named[0] not in self.fields:
            needed = next(shown for name, shown in _NEEDED.items() if name in self.fields)
            raise PlanError(f"a {self.kind} rule needs {needed} and nothing else")
        self.check()
        if self.absent and "absent" not in self.fields:
            those = ", ".join(kind for kind, rule in KINDS.items() if "absent" in rule.fields)
            raise PlanError(
                f"a {self.kind} rule cannot be left out for experts that are chosen already: use absent=True with "
                f"{those}"
            )
        if self.draw is not None and "draw" not in self.fields:
            raise PlanError(f"a {self.kind} rule names no experts that could be drawn for each token: leave it out")
        for coefficient in [c for _, pairs in self.experts for _, c in pairs]:
            self.effective(coefficient)
        if self.by_position and "strength" not in self.fields:
            raise PlanError(f"a {self.kind} rule has no strength that could differ by position: leave by_position out")
        for number in set(self.by_position):
            self._sized(number).checked()
        return self

    # ---- where it applies

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The rules, one per position, that do the same as one with ``by_position``; the rule itself without."""
        if not self.by_position:
            return (self,)
        placed = [(number, _meeting(self.positions, ((at, at + 1),))) for at, number in enumerate(self.by_position)]
        return tuple(replace(self._sized(number), positions=positions) for number, positions in placed if positions)

    def _sized(self, number: float) -> Rule:
        """The rule at a position with this number in ``by_position``."""
        if not self.multiplies:
            return replace(self, strength=_finite(self.strength * number, "strength"), by_position=())
        experts = tuple((layer, tuple((e, c * number) for e, c in pairs)) for layer, pairs in self.experts)
        value = None if self.value is None else self.value * number
        return replace(self, experts=experts, value=value, by_position=())

    @property
    def spans(self) -> Spans | None:
        """The positions at which the rule does something; None for all."""
        return _meeting(self.positions, ((0, len(self.by_position)),)) if self.by_position else self.positions

    def in_layer(self, layer: int) -> Pairs:
        """(expert, coefficient) pairs that the rule changes in ``layer``."""
        if self.layers is not None and layer not in self.layers:
            return ()
        return dict(self.experts).get(layer, ())

    def named(self, layer: int) -> list[int]:
        """The experts that the rule names for ``layer``, in layers where it does not act too."""
        return [expert for expert, _ in dict(self.experts).get(layer, ())]

    @property
    def touched_layers(self) -> tuple[int, ...] | None:
        """Layers that the rule changes; None for every layer."""
        if not self.experts and (self.table is None or self.table.layers is None):
            return self.layers
        named = [layer for layer, _ in self.experts] if self.table is None else self.table.layers or ()
        return tuple(layer for layer in named if self.layers is None or layer in self.layers)

    def touches(self, layer: int) -> bool:
        """Whether the rule changes ``layer``."""
        if self.layers is not None and layer not in self.layers:
            return False
        if self.table is not None:
            return self.table.in_layer(layer) is not None
        return not self.experts or any(layer == named for named, _ in self.experts)

    def check_fits(self, routers: Sequence[HasExperts], groups: Sequence[str]) -> None:
        """Raise ``PlanError`` for layers, experts or groups that the model or the recording does not have."""
        unknown = [group for group in self.groups or () if group not in groups]
        if unknown:
            raise PlanError(
                f"the plan steers group {unknown[0]!r}, which is not among the groups ({', '.join(groups) or 'none'}): "
                "name it when recording starts, or use plan.only(groups=...) with these"
            )
        for layer in self.touched_layers or ():
            if layer >= len(routers):
                raise PlanError(
                    f"the plan steers layer {layer}, but the model has {len(routers)} MoE layers "
                    f"(0-{len(routers) - 1}): restrict it with plan.only(layers=...); numbers that count from 1: "
                    "moe_route.layers(8, 35, base=1)"
                )
            size = routers[layer].num_experts
            wrong = [expert for expert in self.named(layer) if expert >= size]
            if wrong:
                raise PlanError(
                    f"the plan names expert {wrong[0]} of layer {layer}, which has {size} experts (0-{size - 1}): "
                    "make it from statistics of this model"
                )
        if self.table is not None:
            self._check_table(self.table, routers)

    def _check_table(self, table: PlanTable, routers: Sequence[HasExperts]) -> None:
        if table.layers is None and table.values.shape[1] != len(routers):
            raise PlanError(
                f"the {table.what} are of {table.values.shape[1]} layers, the model has {len(routers)} MoE layers: "
                f"leave dense layers out of them, or say which layers they are of, Plan.{self.kind}(..., layers=[...])"
            )
        for layer, router in enumerate(routers):
            if self.touches(layer):
                table.check_layer(layer, router.num_experts, router.top_k)

    # ---- algebra and controls

    def scaled(self, factor: float) -> Rule:
        """The rule with its strength multiplied; raises ``PlanError`` for kinds without strength."""
        if "strength" not in self.fields:
            raise PlanError(
                f"a {self.kind} rule has no strength to scale: it holds or it does not. "
                "Scale the soft part of the plan alone and add the rest"
            )
        if self.by_position and not self.multiplies:  # number by number, as of one rule per position
            return replace(self, by_position=_by_position([number * factor for number in self.by_position])).checked()
        return replace(self, strength=_finite(self.strength * factor, "strength")).checked()

    def opposite(self) -> Rule:
        """The opposite rule: the strength negated, on and off exchanged."""
        if "strength" not in self.fields:
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
            experts.append((layer, tuple(sorted((int(to[e]), self._renamed(c, to)) for e, c in pairs))))
        return replace(self, experts=tuple(experts))

    def _renamed(self, coefficient: float, to: np.ndarray) -> float:
        """A coefficient after expert e became ``to[e]``."""
        return coefficient

    def moved(self, layers: Iterable[int] | int) -> Rule:
        """The rule in other layers, on the experts that it keeps there."""
        if self.table is not None:
            raise PlanError(
                f"a {self.kind} rule of single tokens cannot move to other layers: leave it out of the control"
            )
        experts = {layer: dict(pairs) for layer, pairs in self.experts} or None
        made = type(self).of(experts, layers, value=self.value, mode=self.mode, draw=self.draw, function=self.function)
        return self._as_before(made)

    def with_experts(self, experts: Experts) -> Rule:
        """The rule with other experts; unchanged if it names none."""
        factors = {coefficient for _, pairs in self.experts for _, coefficient in pairs}
        if len(factors) != 1 or self.valued:
            raise PlanError(f"a {self.kind} rule with a coefficient for each expert has no other experts to go to")
        return self._as_before(type(self).of(experts, self.layers, factor=min(factors), mode=self.mode))

    def _as_before(self, rule: Rule) -> Rule:
        """``rule`` with the strength and conditions of this rule, except for its layers."""
        kept = ("strength", "by_position", "groups", "phase", "positions", "absent", "draw")
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
        return None if () in (narrowed.groups, narrowed.layers, narrowed.spans) else narrowed.checked()

    # ---- content

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content without default values; a table is named by its digest."""
        content: dict[str, Any] = {"kind": self.kind}
        if self.experts:
            plain = not self.valued and all(c == 1.0 for _, pairs in self.experts for _, c in pairs)
            content["experts"] = {
                str(layer): [expert for expert, _ in pairs] if plain else {str(expert): c for expert, c in pairs}
                for layer, pairs in self.experts
            }
        neutral = {"strength": 1.0, "value": None, "mode": "", "phase": None, "absent": False, "draw": None}
        for name, value in neutral.items():
            if getattr(self, name) != value:
                content[name] = getattr(self, name)
        if self.positions is not None:
            content["positions"] = [list(span) for span in self.positions]
        if self.by_position:
            content["by_position"] = list(self.by_position)
        for name in ("layers", "groups"):
            if getattr(self, name) is not None:
                content[name] = list(getattr(self, name))
        if self.table is not None:
            content["table"] = self.table.digest
        if self.function is not None:
            content |= self.function.to_dict()
        return content

    @classmethod
    @cache
    def declared(cls) -> type:
        """The dataclass that declares the keys of such a rule in a file."""
        needed = [name for name in _NEEDED if name in cls.fields]
        keys: list[Any] = [("kind", Literal[cls.kind])]
        for name, hint in _KEYS.items():
            beside = (name == "mode" and len(cls.modes) > 1) or _BESIDE.get(name) in cls.fields
            if name in cls.fields or name in _CONDITIONS or beside:
                hint = Literal[tuple(cls.modes)] if name == "mode" else hint
                keys.append((name, hint) if needed == [name] else (name, hint, field(default=None)))
        keys.sort(key=len)  # those that are required first
        listed = (Rule.__doc__ or "").split("Attributes:")[1]
        return make_dataclass(cls.__name__, keys, namespace={"__doc__": f"{cls.__doc__}\n\n    Attributes:{listed}"})

    @classmethod
    def made(cls, content: Mapping[str, Any], said: Any, tables: Mapping[str, PlanTable]) -> Rule:
        """The rule of ``content``, whose checked values are ``said``, as ``declared`` has them."""
        table = None
        if "table" in content or cls.fields.isdisjoint(("experts", "value", "function")):
            if said.table not in tables:
                raise PlanError(f'there is no table "{said.table}": {meant(said.table, tables, "tables has")}')
            table = tables[said.table]
            if cls.table_type is None or not isinstance(table, cls.table_type):
                raise PlanError(f"a {cls.kind} rule cannot use a table of {table.field}")
        given = {name: getattr(said, name) for name in ("strength", "value", "mode", "draw") if name in content}
        made = cls.of(
            said.experts if "experts" in content or (table is None and "experts" in cls.fields) else None,
            table=table,
            function=function_of(content),
            **given,
        )
        return (
            replace(
                made,
                layers=None if said.layers is None else _layers(said.layers),
                groups=as_groups(said.groups),
                phase=said.phase,
                positions=as_positions(said.positions),
                absent="absent" in content and said.absent,
            )
            ._with_numbers(content.get("by_position"))
            .checked()
        )

    def _with_numbers(self, by_position: Sequence[float] | None) -> Rule:
        """The rule with numbers by position, if there are any; an additive rule holds its strength in them."""
        if by_position is None:
            return self
        rule = replace(self, strength=self.strength if self.multiplies else 1.0, by_position=_by_position(by_position))
        return rule if self.multiplies else rule.scaled(self.strength)

    def __str__(self) -> str:
        what, how, when = self.shown
        return f"{what}: {how}{f' [{when}]' if when else ''}"

    @property
    def shown(self) -> tuple[str, str, str]:
        """The rule in words: its target, its effect, and its conditions ("" for none)."""
        return self._what(), self._how(), self._when()

    @property
    def title(self) -> str:
        """Its kind in words."""
        return self.kind.replace("_", " ")

    def _what(self) -> str:
        layers = self.touched_layers
        where = "every layer" if layers is None else f"layers {show_numbers(layers)}" if len(layers) > 1 else ""
        where = where or (f"layer {layers[0]}" if layers else "no layer")
        if not self.experts:
            return f"{self.title} in {where}"
        count = sum(len(self.in_layer(layer)) for layer in layers or ())
        return f"{self.title} {count} expert{'' if count == 1 else 's'} in {where}"

    def _how(self) -> str:
        entries = [entry for part in self.parts for entry in part.entries()]
        values = sorted({entry.value for entry in entries if isinstance(entry.value, float)})
        ends = [f"{value:g}" for value in dict.fromkeys([*values[:1], *values[-1:]])]
        return self.shows.format(x=" to ".join(ends), mode=self.mode).replace("+ -", "- ")

    def _when(self) -> str:
        conditions = [] if self.groups is None else [f"groups {', '.join(self.groups)}"]
        conditions += [] if self.phase is None else [f"{self.phase} only"]
        differs = ", each with a number of its own" if self.by_position else ""
        conditions += [] if self.spans is None else [f"positions {_show_spans(self.spans)}{differs}"]
        conditions += ["only experts not chosen already"] if self.absent else []
        conditions += [] if self.draw is None else [f"{self.drawn} with seed {self.draw}"]
        return "; ".join(conditions)


# a rule has one of them
_NEEDED = {"experts": "experts", "value": "a value", "table": "a table", "function": "a function"}
_CONDITIONS = ("layers", "groups", "phase", "positions")
_BESIDE = {"source": "function", "by_position": "strength"}  # keys that stand beside one of ``fields``
_KEYS: Mapping[str, Any] = {  # of a rule in a file
    "experts": Mapping[Natural, tuple[Natural, ...] | Mapping[Natural, float]],
    "strength": float,
    "value": float,
    "mode": str,
    "layers": Natural | tuple[Natural, ...] | None,
    "groups": str | tuple[str, ...] | None,
    "phase": Literal[PHASES] | None,  # type: ignore[valid-type]
    "positions": Natural | tuple[Natural | tuple[Natural, Natural | None], ...] | None,
    "absent": bool,
    "draw": int | None,
    "table": str,
    "function": str,
    "source": str,
    "by_position": tuple[float, ...],
}
RuleContent = Annotated[Any, Tagged("kind", lambda: {kind: rule.declared() for kind, rule in KINDS.items()})]
"""A rule of any kind, in a file."""


def rule_of(content: Mapping[str, Any], said: Any, tables: Mapping[str, PlanTable]) -> Rule:
    """The checked rule of ``content``, as ``Rule.to_dict`` gives it; ``said`` is what was read of it (`RuleContent`).

    ``tables``: the tables of values per token, by the names that the content uses. Raises ``PlanError``.
    """
    return KINDS[said.kind].made(content, said, tables)


def power(factor: float, strength: float, kind: str) -> float:
    """``factor ** strength``; raises ``PlanError`` where a rule of ``kind`` has no such factor."""
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
    coefficients = {index(expert): _finite(coefficient * factor, "coefficient") for expert, coefficient in pairs}
    if coefficients and min(coefficients) < 0:
        raise PlanError(f"there is no expert {min(coefficients)}: experts count from 0")
    return tuple(sorted(coefficients.items()))


def _layers(layers: Iterable[int] | int) -> tuple[int, ...]:
    try:
        return as_layers(layers)
    except TypeError as error:
        raise PlanError(f"layers must be whole numbers from 0, not {layers!r}") from error
    except ValueError as error:
        raise PlanError(str(error)) from error


def _finite(value: float, name: str) -> float:
    try:
        number = float(value) + 0.0  # + 0.0 makes -0.0 and 0.0 one strength, with one hash
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name} must be a number, not {value!r}") from error
    if not math.isfinite(number):
        raise PlanError(f"{name} must be finite, not {number}: to keep an expert out for good use Plan.forbid")
    return number


def _is_table(value: Any) -> bool:
    """Whether a user gives numbers by position."""
    return (isinstance(value, Sequence) and not isinstance(value, str)) or getattr(value, "ndim", 0) == 1


def _by_position(numbers: Any) -> tuple[float, ...]:
    made = tuple(_finite(number, "a strength by position") for number in numbers)
    if not made:
        raise PlanError("strengths by position are one number at least: that of position 0 comes first")
    return made


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
    united: list[tuple[int, int | None]] = []
    for start, stop in sorted(spans, key=lambda span: span[0]):
        last = united[-1][1] if united else -1
        if not united or (last is not None and start > last):
            united.append((start, stop))
        elif last is not None and (stop is None or stop > last):
            united[-1] = (united[-1][0], stop)
    return tuple(united)


def _meeting(mine: Spans | None, theirs: Spans | None) -> Spans | None:
    """The positions that are in both."""
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    common = []
    for a, b in mine:
        for c, d in theirs:
            start, ends = max(a, c), [end for end in (b, d) if end is not None]
            if not ends or start < min(ends):
                common.append((start, min(ends) if ends else None))
    return _united(common)


def _show_spans(spans: Spans) -> str:
    shown = [f"{a}" if b == a + 1 else f"from {a}" if b is None else f"{a}-{b - 1}" for a, b in spans]
    return ", ".join(shown)


def as_phase(phase: str | None) -> str | None:
    if phase not in (None, *PHASES):
        raise PlanError(f"there is no phase {phase!r}: use {' or '.join(map(repr, PHASES))}")
    return phase
