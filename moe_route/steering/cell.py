"""``Cell``: what rules do to one row in one layer, and the steering tables that the cells of a layer become."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from moe_route.contract.experts import AddedDirections
from moe_route.contract.limits import MAX_CHOSEN
from moe_route.contract.tables import NEUTRAL, Force, SteeringTables
from moe_route.contract.token_tables import BY_TOKEN, NAMED, Applied, Part, TokenTables
from moe_route.steering.functions import RoutingFunction
from moe_route.steering.model import PlanError
from moe_route.steering.tables import SequenceTable

_log = logging.getLogger(__name__)


class HasExperts(Protocol):
    """The part of a layer's description that a plan uses; ``RouterInfo`` and ``LayerShape`` have it."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...


class LayerShape(NamedTuple):
    """Number of experts of one MoE layer, and number of experts per token."""

    num_experts: int
    top_k: int


class Plane(NamedTuple):
    """A plane of ``SteeringTables``, and the row parameter (one value for all experts of a row) that goes with it."""

    name: str
    parameter: str = ""
    value: float = 0.0


# what a rule depends on per token: (only experts that the router did not choose, seed of a random draw)
View = tuple[bool, "int | None"]


class Direction(NamedTuple):
    """What is added to the output of an expert: the vector [H], and whether the full softmax weighs it."""

    expert: int
    full: bool
    vector: tuple[float, ...]


PLAIN: View = (False, None)
LAYER = -1  # in place of an expert: a number of the whole layer


@dataclass(eq=False)
class Cell:
    """The effect of one row in one layer; falsy if there is none. Rules write into it, and ``settled`` combines them.

    Strengths add exactly and factors multiply in increasing order, so the order of rules has no effect.

    Attributes:
        layer, router: the layer, and its experts.
        sources: tables of values per token, in the order of ``CompiledPlan.sequence_tables``.
        tables: by view and name: a plane float32 [E], "remap" int32 [E], and those of ``NAMED``.
        parameters: row parameters by name.
        functions: functions of the logits, by the number of their rule in the plan.
        directions: strength of each direction that is added to the output of an expert.
        rule: number of the rule that is writing.
    """

    layer: int
    router: HasExperts
    sources: Sequence[SequenceTable] = ()
    tables: dict[tuple[View, str], np.ndarray] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)
    functions: dict[int, RoutingFunction] = field(default_factory=dict)
    directions: dict[Direction, float] = field(default_factory=dict)
    rule: int = -1
    _terms: dict[tuple[View, str], dict[int, list[float]]] = field(default_factory=dict)
    _planes: dict[str, dict[tuple[str, str], Plane]] = field(default_factory=dict)
    _claims: dict[str, set[tuple[object, ...]]] = field(default_factory=dict)

    def add(self, name: str, values: Mapping[int, float], view: View = PLAIN) -> None:
        """Add terms by expert: of a plane, force codes, or targets of a remap; by ``LAYER`` a number of the layer."""
        terms = self._terms.setdefault((view, name), {})
        for expert, value in values.items():
            terms.setdefault(expert, []).append(value)

    def add_plane(self, plane: Plane, values: Mapping[int, float], view: View, by: tuple[str, str]) -> None:
        """Add terms to a plane; ``by`` is the kind of rule with its mode, of which a row can have one."""
        self.add(plane.name, values, view)
        self._planes.setdefault(plane.name, {})[by] = plane

    def put(self, name: str, value: Any, what: str, by: tuple[object, ...], view: View = PLAIN) -> None:
        """Set a table of ``NAMED``; raises ``PlanError`` if a token gets two ``what``, told apart by ``by``."""
        claims = self._claims.setdefault(what, set())
        claims.add(by)
        if len(claims) > 1:
            raise PlanError(
                f"a token of layer {self.layer} gets two {what}: keep one, or separate them with plan.only(...) "
                "(choices of several sequences go into one Plan.replay, by item)"
            )
        self.tables[view, name] = np.asarray(value, NAMED[name].dtype)

    def apply(self, function: RoutingFunction) -> None:
        """Add a function of the logits; several run in the order of the plan."""
        self.functions[self.rule] = function

    def add_direction(self, direction: Direction, strength: float) -> None:
        """Add a direction to the output of an expert; strengths of equal directions add."""
        self.directions[direction] = self.directions.get(direction, 0.0) + strength

    def settled(self) -> Cell:
        """The cell with its terms combined; raises ``PlanError`` for terms that contradict each other."""
        for (view, name), terms in self._terms.items():
            self._laws.get(name, Cell._sum)(self, view, name, terms)
        self._check_forces()
        self._check_choices()
        return self

    def __bool__(self) -> bool:
        return bool(self.tables or self.parameters or self.functions or self.directions)

    @property
    def slots(self) -> int:
        """Number of slots that a top_k asks for; 0 for the router's own k."""
        return int(self.parameters.get("top_k", 0))

    @property
    def names(self) -> set[str]:
        return {name for _, name in self.tables} | self.parameters.keys() | ({"apply"} if self.functions else set())

    @property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for cells with the same effect."""
        tables = sorted((repr(at), table.tobytes()) for at, table in self.tables.items())
        more = tuple(self.functions.items()), tuple(sorted(self.directions.items()))
        return tuple(tables), tuple(sorted(self.parameters.items())), *more

    # ---- how terms combine, by name

    def _sum(self, view: View, name: str, terms: Mapping[int, Sequence[float]]) -> None:
        """A plane, float32 [E]; its row parameter counts only where it has an effect."""
        plane = np.full(self.router.num_experts, NEUTRAL[name])
        for expert, values in terms.items():
            plane[expert] = math.prod(sorted(values)) if NEUTRAL[name] == 1 else math.fsum(values)
        with np.errstate(over="ignore"):
            narrow = plane.astype(np.float32)
        if not np.isfinite(narrow).all():
            raise PlanError(f"the strengths on layer {self.layer} add up to more than float32 holds: use smaller ones")
        if (narrow != NEUTRAL[name]).any():
            self.tables[view, name] = narrow
            self.parameters |= self._parameter(name)

    def _parameter(self, name: str) -> dict[str, float]:
        """The row parameter of a plane, if it is not neutral."""
        users = self._planes[name]
        settings = {(plane.parameter, plane.value) for plane in users.values() if plane.parameter}
        if len(settings) > 1:
            shown = " and ".join(sorted(repr(mode) for _, mode in users))
            raise PlanError(
                f"{next(iter(users))[0]} rules with modes {shown} meet on layer {self.layer}: a token can have one; "
                "use the same mode, or separate them with plan.only(...)"
            )
        return {parameter: value for parameter, value in settings if value != NEUTRAL[parameter]}

    def _force(self, view: View, name: str, terms: Mapping[int, Sequence[float]]) -> None:
        """``Force`` codes, float32 [E]; forbid wins over off, and off over on."""
        force = np.zeros(self.router.num_experts, dtype=np.float32)
        for expert, codes in terms.items():
            force[expert] = self._strongest({Force(int(code)) for code in codes}, expert)
        allowed, layer, k = int((force != Force.FORBID).sum()), self.layer, self.router.top_k
        if allowed == 0:
            raise PlanError(f"the plan forbids all {len(force)} experts of layer {layer}: leave at least one")
        if allowed < k:
            _log.warning("layer %d: %d experts are allowed for %d slots; the others stay empty", layer, allowed, k)
        if int((force > 0).sum()) > k:
            _log.warning("layer %d: more experts are forced on than its top-%d can choose", layer, k)
        self.tables[view, name] = force

    def _strongest(self, codes: set[Force], expert: int) -> Force:
        if Force.FORBID in codes:
            return Force.FORBID
        strongest = {code for code in codes if code < 0} or codes
        if len(strongest) > 1:
            shown = " and ".join(code.name.lower() for code in sorted(strongest))
            raise PlanError(
                f"expert {expert} of layer {self.layer} is forced with two weights ({shown}): keep one of them"
            )
        return min(strongest)

    def _remap(self, view: View, name: str, terms: Mapping[int, Sequence[float]]) -> None:
        remap = _neutral(name, self.router)
        for expert, targets in terms.items():
            if len(set(targets)) > 1:
                raise PlanError(f"expert {expert} of layer {self.layer} is remapped to two experts: keep one of them")
            remap[expert] = targets[0]
        if (remap != _neutral(name, self.router)).any():
            self.tables[view, name] = remap

    def _temperature(self, view: View, name: str, terms: Mapping[int, Sequence[float]]) -> None:
        temperature = np.float32(math.prod(sorted(terms[LAYER])))
        if temperature != NEUTRAL[name]:
            self.parameters[name] = float(temperature)

    def _top_k(self, view: View, name: str, terms: Mapping[int, Sequence[float]]) -> None:
        wanted, most = {int(k) for k in terms[LAYER]}, min(self.router.num_experts, MAX_CHOSEN)
        if len(wanted) > 1:
            raise PlanError(
                f"layer {self.layer} is asked for top-{min(wanted)} and top-{max(wanted)} at once: keep one of them"
            )
        (k,) = wanted
        if k > most:
            raise PlanError(f"top_k {k} is more than the {most} of layer {self.layer}")
        if k != self.router.top_k:
            self.parameters[name] = float(k)

    _laws: ClassVar[Mapping[str, Callable[[Cell, View, str, Mapping[int, Sequence[float]]], None]]] = {
        "force": _force,
        "remap": _remap,
        "temperature": _temperature,
        "top_k": _top_k,
    }

    # ---- rules that may meet with an undefined result

    def _check_forces(self) -> None:
        """Raise ``PlanError`` if forced experts of several views, which are known per token only, may contradict."""
        views = [terms for (_, name), terms in self._terms.items() if name == "force"]
        if len(views) < 2:
            return
        modes: dict[str, set[str]] = {}
        for kind, mode in self._planes["force"]:
            modes.setdefault(kind, set()).add(mode)
        for kind, several in sorted(modes.items(), reverse=True):
            if len(several) > 1:
                raise PlanError(
                    f"{kind} rules of layer {self.layer} with weights {' and '.join(map(repr, sorted(several)))} may "
                    "meet on one expert: use one weight"
                )
        forbidden = sum(list(codes).count(Force.FORBID) for terms in views for codes in terms.values())
        if forbidden >= self.router.num_experts:
            raise PlanError(
                f"the plan may forbid all {self.router.num_experts} experts of layer {self.layer}: leave at least one"
            )

    def _check_choices(self) -> None:
        by_id = sorted(self.names & _CHOICES)
        if not by_id:
            return
        other = "a remap" if "remap" in self.names else ""
        other = other or ("a top_k above the router's own" if self.slots > self.router.top_k else "")
        if other:
            raise PlanError(
                f"a {by_id[0]} rule and {other} meet on layer {self.layer}: separate them with plan.only(...)"
            )


_CHOICES = frozenset(("reserve_slot", "fix_choice", "replay", "gumbel"))  # tables that choose experts by id


def tables_of(
    cells: Sequence[Cell], layer: int, router: HasExperts, sources: Sequence[SequenceTable]
) -> SteeringTables | TokenTables | None:
    """One layer's cells as tables, one row per cell, with those tables that some cell uses."""
    if not any(cell.names for cell in cells):
        return None
    names: dict[View, list[str]] = {PLAIN: []}
    for view, name in dict.fromkeys(key for cell in cells for key in cell.tables):
        names.setdefault(view, []).append(name)
    plain = names.pop(PLAIN)
    by_name = [name for name in plain if name in NAMED]
    given: dict[str, Any] = _stacked(cells, PLAIN, [name for name in plain if name not in NAMED], router)
    for name in dict.fromkeys(name for cell in cells for name in cell.parameters):
        given[name] = torch.tensor([cell.parameters.get(name, NEUTRAL[name]) for cell in cells])
    wide = max(cell.slots for cell in cells)
    wide = wide if wide > router.top_k else 0
    numbers = sorted({number for cell in cells for number in cell.functions})
    functions = [_applied(cells, number) for number in numbers]
    if not names and not by_name and not wide and not functions:
        return SteeringTables(len(cells), router.num_experts, **given)
    parts = [_part(cells, PLAIN, by_name, router)] if by_name else []
    parts += [_part(cells, view, of_view, router) for view, of_view in sorted(names.items(), key=repr)]
    recorded, scored = (
        {
            number: torch.from_numpy(sources[number].rows_of(layer, router.num_experts, router.top_k))
            for number in _used(cells, name)
        }
        for name in BY_TOKEN
    )
    return TokenTables(
        layer,
        router.num_experts,
        SteeringTables(len(cells), router.num_experts, **{"temperature": torch.ones(len(cells))} | given),
        parts,
        recorded=recorded,
        scored=scored,
        anew=_flags("replace_scores" in cell.names or cell.slots > router.top_k for cell in cells),
        by_token_only=_flags(bool(cell.names) and cell.names <= {*BY_TOKEN} for cell in cells),
        wide=wide,
        functions=functions,
        functions_only=_flags(cell.names == {"apply"} for cell in cells),
    )


def directions_of(cells: Sequence[Cell]) -> AddedDirections | None:
    """One layer's directions, with their strength in the row of each cell; None if there are none."""
    found = sorted({direction for cell in cells for direction in cell.directions})
    if not found:
        return None
    return AddedDirections(
        torch.tensor([direction.expert for direction in found]),
        torch.tensor([direction.full for direction in found]),
        torch.tensor([direction.vector for direction in found], dtype=torch.float32),
        torch.tensor([[cell.directions.get(d, 0.0) for d in found] for cell in cells], dtype=torch.float32),
    )


def _applied(cells: Sequence[Cell], number: int) -> Applied:
    """The function of one rule, with the rows that it acts on."""
    function = next(cell.functions[number] for cell in cells if number in cell.functions)
    return Applied(function.function, torch.tensor([number in cell.functions for cell in cells]))


def _used(cells: Iterable[Cell], name: str) -> list[int]:
    """Numbers of the tables of values per token that a table of this name names."""
    return sorted({int(number) for cell in cells for (_, own), number in cell.tables.items() if own == name})


def _flags(rows: Iterable[bool]) -> torch.Tensor | None:
    """bool [rows], or None if false for all rows."""
    flags = list(rows)
    return torch.tensor(flags) if any(flags) else None


def _part(cells: Sequence[Cell], view: View, names: Sequence[str], router: HasExperts) -> Part:
    tables = _stacked(cells, view, names, router)
    named = {name: tables.pop(name) for name in NAMED if name in tables}
    return Part(*view, tables, named)


def _stacked(cells: Sequence[Cell], view: View, names: Sequence[str], router: HasExperts) -> dict[str, torch.Tensor]:
    """Tables by name, one row per cell."""
    neutral = {name: _neutral(name, router) for name in names}
    return {
        name: torch.from_numpy(np.stack([cell.tables.get((view, name), neutral[name]) for cell in cells]))
        for name in names
    }


def _neutral(name: str, router: HasExperts) -> np.ndarray:
    """A row of a table without effect."""
    if name in NAMED:
        dtype, width, value = NAMED[name]
        return np.full({"E": (router.num_experts,), "k": (router.top_k,), "": ()}[width], value, dtype)
    if name in NEUTRAL:
        return np.full(router.num_experts, NEUTRAL[name], np.float32)
    return np.arange(router.num_experts, dtype=np.int32)  # of a remap
