"""Compile rules into steering tables: the effect of each row in each layer, and the row that each token takes."""

from __future__ import annotations

import bisect
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from moe_route.calls.call import PHASES
from moe_route.contract.limits import MAX_CHOSEN
from moe_route.contract.tables import NEUTRAL, Force, SteeringTables
from moe_route.contract.token_tables import Part, TokenTables, stream_of
from moe_route.steering.model import PlanError
from moe_route.steering.replay import ReplayTable
from moe_route.steering.rule import OPERATIONS, Rule
from moe_route.steering.score_table import ScoreTable
from moe_route.steering.sequence_table import SequenceTable

__all__ = ["CompiledPlan", "HasExperts", "LayerShape", "compile_rules"]

_log = logging.getLogger(__name__)

_FORCES = {
    ("force_on", "paper"): Force.ON_PAPER,
    ("force_on", "steermoe"): Force.ON_STEERMOE,
    ("force_on", "natural"): Force.ON_NATURAL,
    ("force_off", "paper"): Force.OFF_PAPER,
    ("force_off", "steermoe"): Force.OFF_STEERMOE,
    ("force_off", "natural"): Force.OFF_NATURAL,
    ("forbid", ""): Force.FORBID,
}
_FORCED = {kind for kind, _ in _FORCES}
# kind of rule -> plane of SteeringTables; "bias" on a score becomes score_bias
_PLANES = {
    "activate": "std",
    "bias": "bias",
    "magnitude": "magnitude",
    "scale_logits": "scale",
    "scale_weights": "weight_scale",
}
# mode of a rule -> row parameter that carries it, one value for all experts of a row
_ROW_MODES = {
    ("activate", "sample"): ("std_correction", 1.0),
    ("activate", "population"): ("std_correction", 0.0),
    ("bias", "score"): ("score_bias_weighs", 1.0),
    ("bias", "choice"): ("score_bias_weighs", 0.0),
    ("scale_weights", "after"): ("weight_scale_after", 1.0),
    ("scale_weights", "before"): ("weight_scale_after", 0.0),
}


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


@dataclass(frozen=True, slots=True, eq=False)
class CompiledPlan:
    """A plan as tables.

    Attributes:
        tables: one ``SteeringTables`` per MoE layer, or ``TokenTables`` where a rule depends on more than the token's
            row, or None where the plan leaves the layer alone. All have the same number of rows.
        rows: int32 [2, G + 1, C]: the steering row of a token by phase ("prefill", "decode"), group, and class of
            positions. Column 0 is for tokens without a group, column g + 1 for group g. -1 where no rule applies.
        groups: names of the G groups.
        plan_hash: ``Plan.hash`` of the plan.
        bounds: the C - 1 positions at which a new class of positions begins.
        draws: whether a rule draws experts per token.
        sequence_tables: tables of values per token, in the order of the columns of ``Labels.entries``.
    """

    tables: list[SteeringTables | TokenTables | None]
    rows: torch.Tensor
    groups: tuple[str, ...]
    plan_hash: str
    bounds: tuple[int, ...] = ()
    draws: bool = False
    sequence_tables: tuple[SequenceTable, ...] = ()

    @property
    def is_null(self) -> bool:
        """Whether no token of any layer is steered."""
        return all(table is None for table in self.tables)

    def row(self, phase: str, group: int = -1, position: int = 0) -> int:
        """The steering row of a token of ``group`` (-1: none) at ``position`` in ``phase``; -1 where none applies."""
        if phase not in PHASES or not -1 <= group < len(self.groups):
            raise PlanError(f"no row for phase {phase!r}, group {group}: there are {len(self.groups)} groups")
        return int(self.rows[PHASES.index(phase), group + 1, bisect.bisect_right(self.bounds, position)])

    def to(self, device: torch.device | str) -> CompiledPlan:
        """The same tables on another device."""
        device = torch.device(device)
        tables = [None if table is None else table.to(device) for table in self.tables]
        return replace(self, tables=tables, rows=self.rows.to(device))


# what a rule depends on per token: (only experts that the router did not choose, seed of a random draw)
_View = tuple[bool, "int | None"]
_PLAIN: _View = (False, None)


@dataclass(slots=True)
class _Cell:
    """The effect of one row in one layer; falsy if there is none.

    Attributes:
        tables: by view and name: a plane float32 [E], "remap" int32 [E], "replace_scores" float32 [E], "fix_choice"
            int64 [k], "reserve_slot" int64 [] (an expert), "replay" and "score_table" int64 [] (index into
            ``CompiledPlan.sequence_tables``), "gumbel" float64 [] (a temperature), "gumbel_stream" int64 [] (seed and
            layer of its noise).
        parameters: row parameters by name.
    """

    tables: dict[tuple[_View, str], np.ndarray] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tables or self.parameters)

    @property
    def slots(self) -> int:
        """Number of slots that a top_k asks for; 0 for the router's own k."""
        return int(self.parameters.get("top_k", 0))

    @property
    def names(self) -> set[str]:
        return {name for _, name in self.tables} | self.parameters.keys()

    @property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for cells with the same effect."""
        tables = sorted((repr(at), table.tobytes()) for at, table in self.tables.items())
        return tuple(tables), tuple(sorted(self.parameters.items()))


def compile_rules(
    rules: Sequence[Rule], routers: Sequence[HasExperts], groups: tuple[str, ...], plan_hash: str
) -> CompiledPlan:
    """Compile rules to tables; see ``Plan.compile``."""
    if len(set(groups)) != len(groups):
        raise PlanError(f"group names repeat: {', '.join(groups)}")
    for rule in rules:
        _check_fits(rule, routers, groups)
    by_token = tuple(dict.fromkeys(rule.table for rule in rules if rule.table is not None))
    found: dict[tuple[object, ...], int] = {}
    kept: list[list[_Cell]] = []
    known: dict[tuple[int, ...], int] = {}
    bounds = _bounds(rules)
    rows = np.full((len(PHASES), len(groups) + 1, len(bounds) + 1), -1, dtype=np.int32)
    for p, phase in enumerate(PHASES):
        for g, group in enumerate((None, *groups)):
            for c, active in enumerate(_active(rules, phase, group, bounds)):
                if active not in known:
                    here = [rules[i] for i in active]
                    cells = [_cell(here, layer, router, by_token) for layer, router in enumerate(routers)]
                    known[active] = _row(found, kept, cells)
                rows[p, g, c] = known[active]
    tables = [_tables([row[layer] for row in kept], layer, router, by_token) for layer, router in enumerate(routers)]
    draws = any(rule.draw is not None for rule in rules)
    return CompiledPlan(tables, torch.from_numpy(rows), groups, plan_hash, bounds, draws, by_token)


def _bounds(rules: Sequence[Rule]) -> tuple[int, ...]:
    """Positions above 0 at which some rule begins or ends to apply."""
    ends = {end for rule in rules for span in rule.positions or () for end in span if end}
    return tuple(sorted(ends))


def _active(rules: Sequence[Rule], phase: str, group: str | None, bounds: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """For each class of positions, the indices of the rules that apply, in increasing order."""
    begin, end = defaultdict(set), defaultdict(set)
    for number, rule in enumerate(rules):
        if rule.applies(phase, group):
            for start, stop in ((0, None),) if rule.positions is None else rule.positions:
                begin[start].add(number)
                end[stop].add(number)
    active: set[int] = set()
    for first in (0, *bounds):
        active = (active - end[first]) | begin[first]
        yield tuple(sorted(active))


def _row(found: dict[tuple[object, ...], int], kept: list[list[_Cell]], cells: list[_Cell]) -> int:
    """Index of the row with these cells, added if it is new; -1 if no cell has an effect."""
    if not any(cells):
        return -1
    key = tuple(cell.key for cell in cells)
    if key not in found:
        found[key] = len(kept)
        kept.append(cells)
    return found[key]


def _check_fits(rule: Rule, routers: Sequence[HasExperts], groups: tuple[str, ...]) -> None:
    unknown = [group for group in rule.groups or () if group not in groups]
    if unknown:
        raise PlanError(
            f"the plan steers group {unknown[0]!r}, which is not among the groups "
            f"({', '.join(groups) or 'none'}): name it when recording starts, or use plan.only(groups=...) with these"
        )
    for layer in rule.touched_layers or ():
        if layer >= len(routers):
            raise PlanError(
                f"the plan steers layer {layer}, but the model has {len(routers)} MoE layers (0-{len(routers) - 1}): "
                "restrict it with plan.only(layers=...); numbers that count from 1: moe_route.layers(8, 35, base=1)"
            )
        size = routers[layer].num_experts
        wrong = [expert for expert, target in rule.in_layer(layer) if expert >= size]
        wrong += [int(target) for _, target in rule.in_layer(layer) if rule.kind == "remap" and target >= size]
        if wrong:
            raise PlanError(
                f"the plan names expert {wrong[0]} of layer {layer}, which has {size} experts (0-{size - 1}): "
                "make it from statistics of this model"
            )
    if rule.table is not None:
        _check_table(rule, rule.table, routers)


def _check_table(rule: Rule, table: SequenceTable, routers: Sequence[HasExperts]) -> None:
    """Raise ``PlanError`` for values of layers or experts that the model lacks."""
    what = "replayed ids" if rule.kind == "replay" else "scores"
    if table.layers is None and table.values.shape[1] != len(routers):
        raise PlanError(
            f"the {what} are of {table.values.shape[1]} layers, the model has {len(routers)} MoE layers: leave dense "
            f"layers out of them, or say which layers they are of, Plan.{rule.kind}(..., layers=[...])"
        )
    check = _check_ids if isinstance(table, ReplayTable) else _check_scores
    for layer in range(len(routers)):
        values = table.in_layer(layer) if rule.touches(layer) else None
        if values is not None:
            check(values, layer, routers[layer])


def _check_ids(ids: np.ndarray, layer: int, router: HasExperts) -> None:
    size, slots = router.num_experts, router.top_k
    if int(ids.max()) >= size:
        raise PlanError(
            f"the plan replays expert {int(ids.max())} of layer {layer}, which has {size} experts (0-{size - 1}): "
            "replay what was recorded with this model"
        )
    if (ids[:, slots:] >= 0).any():
        raise PlanError(
            f"the plan replays more than {slots} experts for a token of layer {layer}, which has {slots} slots: "
            "replay what was recorded with the model's own top-k, or leave the layer out, plan.only(layers=[...])"
        )


def _check_scores(scores: np.ndarray, layer: int, router: HasExperts) -> None:
    size, width = router.num_experts, scores.shape[1]
    if width < size or np.nan_to_num(scores[:, size:]).any():
        raise PlanError(
            f"the plan has scores of {width} experts for layer {layer}, which has {size}: give scores of all its "
            "experts, in order, and 0 behind them where another layer has more"
        )


def _cell(rules: Sequence[Rule], layer: int, router: HasExperts, by_token: Sequence[SequenceTable]) -> _Cell:
    """The combined effect of the rules in one layer."""
    here = [rule for rule in rules if rule.touches(layer)]
    if not here:
        return _Cell()
    cell = _Cell(parameters=_layer_parameters(here, layer, router))
    views = {_view(rule) for rule in here}
    for view in sorted(views, key=repr):
        seen = [rule for rule in here if _view(rule) == view]
        for name in dict.fromkeys(_plane(rule) for rule in seen if rule.kind in _PLANES):
            plane = _sum_plane([rule for rule in seen if _plane(rule) == name], name, layer, router.num_experts)
            if (plane != NEUTRAL[name]).any():
                cell.tables[view, name] = plane
                cell.parameters |= _row_mode([rule for rule in here if _plane(rule) == name], layer)
        if any(rule.kind in _FORCED for rule in seen):
            cell.tables[view, "force"] = _force(seen, layer, router)
    _check_forces(here, views, layer, router)
    if any(rule.kind == "remap" for rule in here):
        remap = _remap(here, layer, router.num_experts)
        if (remap != np.arange(router.num_experts)).any():
            cell.tables[_PLAIN, "remap"] = remap
    cell.tables |= _by_name(here, layer, router, by_token)
    _check_by_name(cell, layer, router)
    return cell


def _view(rule: Rule) -> _View:
    return rule.absent, rule.draw


def _check_forces(rules: Sequence[Rule], views: set[_View], layer: int, router: HasExperts) -> None:
    """Raise ``PlanError`` if rules may meet on one expert with an undefined result.

    This can happen where experts are drawn at random, or left out when the router chose them.
    """
    forced = [rule for rule in rules if (rule.kind, rule.mode) in _FORCES]
    if len({_view(rule) for rule in forced}) < 2:
        return
    for kind in ("force_on", "force_off"):
        modes = sorted({rule.mode for rule in forced if rule.kind == kind})
        if len(modes) > 1:
            raise PlanError(
                f"{kind} rules of layer {layer} with weights {' and '.join(map(repr, modes))} may meet on one expert: "
                "use one weight"
            )
    forbidden = sum(len(rule.in_layer(layer)) for rule in forced if rule.kind == "forbid")
    if forbidden >= router.num_experts:
        raise PlanError(f"the plan may forbid all {router.num_experts} experts of layer {layer}: leave at least one")


# kinds that replace scores or choose experts by id, and the name of what a token can have only one of
_BY_NAME = {
    "replace_scores": "replaced scores",
    "score_table": "replaced scores",
    "reserve_slot": "own experts",
    "fix_choice": "fixed, replayed or drawn choices",
    "replay": "fixed, replayed or drawn choices",
    "gumbel": "fixed, replayed or drawn choices",
}
_BY_NAME_TABLES = (*_BY_NAME, "gumbel_stream")
_BY_TOKEN = ("replay", "score_table")  # those that have no effect on a token without an entry in their table


def _by_name(
    rules: Sequence[Rule], layer: int, router: HasExperts, by_token: Sequence[SequenceTable]
) -> dict[tuple[_View, str], np.ndarray]:
    """The replaced scores, and the choices made by expert id."""
    tables: dict[tuple[_View, str], np.ndarray] = {}
    asked: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for rule in rules:
        if rule.kind not in _BY_NAME:
            continue
        pairs, what = rule.in_layer(layer), _BY_NAME[rule.kind]
        asked[what].add((rule.kind, rule.draw, pairs, rule.table, rule.value))
        if len(asked[what]) > 1 or (rule.kind == "reserve_slot" and len(pairs) > 1):
            raise PlanError(
                f"a token of layer {layer} gets two {what}: keep one, or separate them with plan.only(...) (choices of "
                "several sequences go into one Plan.replay, by item)"
            )
        if rule.kind == "gumbel":  # tokens with other seeds share one part, which draws once
            assert rule.value is not None
            assert rule.draw is not None
            tables[_PLAIN, "gumbel"] = np.asarray(rule.value, np.float64)
            tables[_PLAIN, "gumbel_stream"] = np.asarray(stream_of(rule.draw, layer), np.int64)
            continue
        name = "score_table" if isinstance(rule.table, ScoreTable) else rule.kind
        number = -1 if rule.table is None else by_token.index(rule.table)
        tables[(False, rule.draw), name] = _named(name, pairs, number, layer, router)
    return tables


def _named(kind: str, pairs: Sequence[tuple[int, float]], table: int, layer: int, router: HasExperts) -> np.ndarray:
    if kind in _BY_TOKEN:
        return np.asarray(table, np.int64)
    if kind == "reserve_slot":
        return np.asarray(pairs[0][0], np.int64)
    if kind == "replace_scores":
        scores = np.zeros(router.num_experts, dtype=np.float32)
        for expert, score in pairs:
            scores[expert] = score
        return scores
    if len(pairs) > router.top_k:
        raise PlanError(f"{len(pairs)} experts are fixed in layer {layer}, which has {router.top_k} slots")
    ids = np.full(router.top_k, -1, dtype=np.int64)
    for expert, slot in pairs:
        ids[int(slot)] = expert
    return ids


def _check_by_name(cell: _Cell, layer: int, router: HasExperts) -> None:
    by_name = sorted(cell.names & {"reserve_slot", "fix_choice", "replay", "gumbel"})
    if not by_name:
        return
    other = "a remap" if "remap" in cell.names else ""
    other = other or ("a top_k above the router's own" if cell.slots > router.top_k else "")
    if other:
        raise PlanError(f"a {by_name[0]} rule and {other} meet on layer {layer}: separate them with plan.only(...)")


def _plane(rule: Rule) -> str:
    return "score_bias" if rule.kind == "bias" and rule.mode != "logit" else _PLANES.get(rule.kind, "")


def _sum_plane(rules: Sequence[Rule], name: str, layer: int, num_experts: int) -> np.ndarray:
    """float32 [E]. Terms are added exactly (and factors multiplied in increasing order), so the order has no effect."""
    terms: dict[int, list[float]] = {}
    for rule in rules:
        for expert, coefficient in rule.in_layer(layer):
            terms.setdefault(expert, []).append(rule.effective(coefficient))
    plane = np.full(num_experts, NEUTRAL[name])
    join = math.fsum if OPERATIONS[rules[0].kind].combine == "add" else lambda values: math.prod(sorted(values))
    for expert, values in terms.items():
        plane[expert] = join(values)
    with np.errstate(over="ignore"):
        narrow = plane.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise PlanError(f"the strengths on layer {layer} add up to more than float32 holds: use smaller ones")
    return narrow


def _row_mode(rules: Sequence[Rule], layer: int) -> dict[str, float]:
    modes = {_ROW_MODES[rule.kind, rule.mode] for rule in rules if (rule.kind, rule.mode) in _ROW_MODES}
    if len(modes) > 1:
        shown = " and ".join(sorted({repr(rule.mode) for rule in rules}))
        raise PlanError(
            f"{rules[0].kind} rules with modes {shown} meet on layer {layer}: a token can have one; "
            "use the same mode, or separate them with plan.only(...)"
        )
    return {name: value for name, value in modes if value != NEUTRAL[name]}


def _force(rules: Sequence[Rule], layer: int, router: HasExperts) -> np.ndarray:
    """``Force`` codes, float32 [E]; forbid wins over off, and off over on."""
    asked: dict[int, set[Force]] = {}
    for rule in rules:
        if (rule.kind, rule.mode) in _FORCES:
            for expert, _ in rule.in_layer(layer):
                asked.setdefault(expert, set()).add(_FORCES[rule.kind, rule.mode])
    force = np.zeros(router.num_experts, dtype=np.float32)
    for expert, codes in asked.items():
        force[expert] = _strongest(codes, layer, expert)
    allowed = int((force != Force.FORBID).sum())
    if allowed == 0:
        raise PlanError(f"the plan forbids all {router.num_experts} experts of layer {layer}: leave at least one")
    if allowed < router.top_k:
        _log.warning(
            "layer %d: %d experts are allowed for %d slots; the others stay empty", layer, allowed, router.top_k
        )
    if int((force > 0).sum()) > router.top_k:
        _log.warning("layer %d: more experts are forced on than its top-%d can choose", layer, router.top_k)
    return force


def _strongest(codes: set[Force], layer: int, expert: int) -> Force:
    if Force.FORBID in codes:
        return Force.FORBID
    strongest = {code for code in codes if code < 0} or codes
    if len(strongest) > 1:
        shown = " and ".join(code.name.lower() for code in sorted(strongest))
        raise PlanError(f"expert {expert} of layer {layer} is forced with two weights ({shown}): keep one of them")
    return min(strongest)


def _layer_parameters(rules: Iterable[Rule], layer: int, router: HasExperts) -> dict[str, float]:
    rules = list(rules)
    found: dict[str, float] = {}
    temperature = math.prod(sorted(r.effective(r.value) for r in rules if r.kind == "temperature" and r.value))
    if np.float32(temperature) != 1.0:
        found["temperature"] = float(np.float32(temperature))
    wanted = {int(rule.value) for rule in rules if rule.kind == "top_k" and rule.value}
    if len(wanted) > 1:
        raise PlanError(f"layer {layer} is asked for top-{min(wanted)} and top-{max(wanted)} at once: keep one of them")
    for k in wanted:
        if k > min(router.num_experts, MAX_CHOSEN):
            raise PlanError(f"top_k {k} is more than the {min(router.num_experts, MAX_CHOSEN)} of layer {layer}")
        if k != router.top_k:
            found["top_k"] = float(k)
    return found


def _remap(rules: Iterable[Rule], layer: int, num_experts: int) -> np.ndarray:
    remap = np.arange(num_experts, dtype=np.int32)
    taken: dict[int, int] = {}
    for rule in rules:
        for expert, target in rule.in_layer(layer) if rule.kind == "remap" else ():
            if taken.setdefault(expert, int(target)) != int(target):
                raise PlanError(f"expert {expert} of layer {layer} is remapped to two experts: keep one of them")
            remap[expert] = int(target)
    return remap


def _tables(
    cells: Sequence[_Cell], layer: int, router: HasExperts, by_token: Sequence[SequenceTable]
) -> SteeringTables | TokenTables | None:
    """One layer's cells as tables, one row per cell, with those tables that some cell uses."""
    if not any(cells):
        return None
    names: dict[_View, list[str]] = {_PLAIN: []}
    for view, name in dict.fromkeys(key for cell in cells for key in cell.tables):
        names.setdefault(view, []).append(name)
    plain = names.pop(_PLAIN)
    by_name = [name for name in plain if name in _BY_NAME_TABLES]
    given: dict[str, Any] = _stacked(cells, _PLAIN, [name for name in plain if name not in by_name], router)
    for name in dict.fromkeys(name for cell in cells for name in cell.parameters):
        given[name] = torch.tensor([cell.parameters.get(name, NEUTRAL[name]) for cell in cells])
    wide = max(cell.slots for cell in cells)
    wide = wide if wide > router.top_k else 0
    if not names and not by_name and not wide:
        return SteeringTables(len(cells), router.num_experts, **given)
    parts = [_part(cells, _PLAIN, by_name, router)] if by_name else []
    parts += [_part(cells, view, of_view, router) for view, of_view in sorted(names.items(), key=repr)]
    return TokenTables(
        layer,
        router.num_experts,
        SteeringTables(len(cells), router.num_experts, **{"temperature": torch.ones(len(cells))} | given),
        parts,
        recorded={number: _recorded(by_token[number], layer, router) for number in _used(cells, "replay")},
        scored={number: _scored(by_token[number], layer, router) for number in _used(cells, "score_table")},
        anew=_flags("replace_scores" in cell.names or cell.slots > router.top_k for cell in cells),
        by_token_only=_flags(bool(cell.names) and cell.names <= {*_BY_TOKEN} for cell in cells),
        wide=wide,
    )


def _used(cells: Iterable[_Cell], name: str) -> list[int]:
    """Numbers of the tables of one name."""
    return sorted({int(table) for cell in cells for (_, found), table in cell.tables.items() if found == name})


def _recorded(table: SequenceTable, layer: int, router: HasExperts) -> torch.Tensor:
    """int16 [n, k]: recorded choices of a layer, with as many slots as the layer has."""
    ids = table.in_layer(layer)
    assert ids is not None  # the rule applies to the layer, so it has ids
    room = ((0, 0), (0, max(router.top_k - ids.shape[1], 0)))
    return torch.from_numpy(np.pad(ids[:, : router.top_k], room, constant_values=-1))


def _scored(table: SequenceTable, layer: int, router: HasExperts) -> torch.Tensor:
    """float32 [n, E]: given scores of a layer, NaN for tokens without scores."""
    scores = table.in_layer(layer)
    assert scores is not None  # the rule applies to the layer, so it has scores
    return torch.from_numpy(scores[:, : router.num_experts].copy())


def _flags(rows: Iterable[bool]) -> torch.Tensor | None:
    """bool [rows], or None if false for all rows."""
    flags = list(rows)
    return torch.tensor(flags) if any(flags) else None


def _part(cells: Sequence[_Cell], view: _View, names: Sequence[str], router: HasExperts) -> Part:
    tables = _stacked(cells, view, names, router)
    named = {name: tables.pop(name) for name in _BY_NAME_TABLES if name in tables}
    return Part(*view, tables, named)


def _stacked(cells: Sequence[_Cell], view: _View, names: Sequence[str], router: HasExperts) -> dict[str, torch.Tensor]:
    """Tables by name, one row per cell."""
    neutral = {name: _neutral(name, router) for name in names}
    return {
        name: torch.from_numpy(np.stack([cell.tables.get((view, name), neutral[name]) for cell in cells]))
        for name in names
    }


def _neutral(name: str, router: HasExperts) -> np.ndarray:
    if name == "remap":
        return np.arange(router.num_experts, dtype=np.int32)
    if name in ("reserve_slot", *_BY_TOKEN):
        return np.asarray(-1, dtype=np.int64)
    if name == "gumbel":
        return np.asarray(0.0)
    if name == "gumbel_stream":
        return np.asarray(0, dtype=np.int64)
    if name == "fix_choice":
        return np.full(router.top_k, -1, dtype=np.int64)
    return np.full(router.num_experts, np.nan if name == "replace_scores" else NEUTRAL[name], np.float32)
