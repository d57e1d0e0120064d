"""From rules to steering tables: what each layer does for each row, and which row a token takes."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from moe_route import _C
from moe_route.calls.call import PHASES
from moe_route.contract.tables import NEUTRAL, ROW_PARAMETERS, Force, SteeringTables
from moe_route.steering.model import PlanError
from moe_route.steering.rule import LAYER_KINDS, OPERATIONS, Rule
from moe_route.steering.token_steering import MARK, Part, TokenSteering

__all__ = ["CompiledPlan", "HasExperts", "LayerShape", "compile_rules"]

MOST_SLOTS = _C.MAX_CHOSEN

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
# kind -> the plane of SteeringTables it fills; "bias" on a score goes to score_bias
_PLANES = {
    "activate": "std",
    "bias": "bias",
    "magnitude": "magnitude",
    "scale_logits": "scale",
    "scale_weights": "weight_scale",
}
# mode of a rule -> the row parameter that carries it: one value for all experts of a row
_ROW_MODES = {
    ("activate", "sample"): ("std_correction", 1.0),
    ("activate", "population"): ("std_correction", 0.0),
    ("bias", "score"): ("score_bias_weighs", 1.0),
    ("bias", "choice"): ("score_bias_weighs", 0.0),
    ("scale_weights", "after"): ("weight_scale_after", 1.0),
    ("scale_weights", "before"): ("weight_scale_after", 0.0),
}


class HasExperts(Protocol):
    """What a plan needs to know of a layer; ``patching.RouterInfo`` and ``LayerShape`` have it."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...


class LayerShape(NamedTuple):
    """Number of experts of one MoE layer, and experts a token is sent to."""

    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True, eq=False)
class CompiledPlan:
    """A plan as tables.

    Attributes:
        tables: one ``SteeringTables`` per MoE layer (``TokenSteering`` where a rule looks at more than the token's
            row), None where the plan leaves the layer alone. All have the same number of rows.
        rows: int32 [2, G + 1, C]: the steering row of a token by phase ("prefill", "decode"), group and class of
            positions; column 0 is for tokens without a group, column g + 1 for group g. -1 where nothing applies.
        groups: names of the G groups.
        plan_hash: ``Plan.hash`` of the plan.
        bounds: the C - 1 positions at which a new class of positions begins.
        draws: whether a rule draws experts for each token.
    """

    tables: list[SteeringTables | TokenSteering | None]
    rows: torch.Tensor
    groups: tuple[str, ...]
    plan_hash: str
    bounds: tuple[int, ...] = ()
    draws: bool = False

    @property
    def is_null(self) -> bool:
        """True when no token of any layer is steered."""
        return all(table is None for table in self.tables)

    def row(self, phase: str, group: int = -1, position: int = 0) -> int:
        """The steering row of a token of ``group`` (-1: none) at ``position`` in ``phase``; -1 where nothing
        applies."""
        if phase not in PHASES or not -1 <= group < len(self.groups):
            raise PlanError(f"no row for phase {phase!r}, group {group}: there are {len(self.groups)} groups")
        return int(self.rows[PHASES.index(phase), group + 1, bisect.bisect_right(self.bounds, position)])

    def to(self, device: torch.device | str) -> CompiledPlan:
        """The same tables on another device."""
        device = torch.device(device)
        tables = [None if table is None else table.to(device) for table in self.tables]
        return CompiledPlan(tables, self.rows.to(device), self.groups, self.plan_hash, self.bounds, self.draws)


# how rules look at a token: (only where the router did not choose the expert, seed of a draw)
_View = tuple[bool, "int | None"]
_PLAIN: _View = (False, None)
# what one row does in one layer, by view and name: plane -> float32 [E], row parameter -> float, "remap" -> int32 [E],
# "scores" -> float32 [E], "slot" -> int, "replay" -> int64 [k]; empty for nothing
_Cell = dict[tuple[_View, str], "np.ndarray | float"]


def compile_rules(
    rules: Sequence[Rule], routers: Sequence[HasExperts], groups: tuple[str, ...], plan_hash: str
) -> CompiledPlan:
    """See ``Plan.compile``."""
    if len(set(groups)) != len(groups):
        raise PlanError(f"group names repeat: {', '.join(groups)}")
    for rule in rules:
        _check_fits(rule, routers, groups)
    found: dict[tuple[object, ...], int] = {}
    kept: list[list[_Cell]] = []
    known: dict[tuple[int, ...], int] = {}
    bounds = _bounds(rules)
    rows = np.full((len(PHASES), len(groups) + 1, len(bounds) + 1), -1, dtype=np.int32)
    for (p, phase), (g, group), (c, first) in itertools.product(
        enumerate(PHASES), enumerate((None, *groups)), enumerate((0, *bounds))
    ):
        active = tuple(i for i, rule in enumerate(rules) if rule.applies(phase, group, first))
        if active not in known:
            known[active] = _row(
                found, kept, [_cell([rules[i] for i in active], layer, router) for layer, router in enumerate(routers)]
            )
        rows[p, g, c] = known[active]
    tables = [_tables([row[layer] for row in kept], layer, router) for layer, router in enumerate(routers)]
    draws = any(rule.draw is not None for rule in rules)
    return CompiledPlan(tables, torch.from_numpy(rows), groups, plan_hash, bounds, draws)


def _bounds(rules: Sequence[Rule]) -> tuple[int, ...]:
    """Positions above 0 at which some rule begins or ends to hold."""
    ends = {end for rule in rules for span in rule.positions or () for end in span if end}
    return tuple(sorted(ends))


def _row(found: dict[tuple[object, ...], int], kept: list[list[_Cell]], cells: list[_Cell]) -> int:
    """Index of the row with these cells, a new one if there is none yet; -1 where no cell does anything."""
    if not any(cells):
        return -1
    key = tuple(
        (name, value.tobytes() if isinstance(value, np.ndarray) else value)
        for cell in cells
        for name, value in [("layer", 0.0), *sorted(cell.items(), key=lambda entry: repr(entry[0]))]
    )
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
                "restrict it with plan.only(layers=...), or use layer_base=1 for numbers that count from 1"
            )
        size = routers[layer].num_experts
        wrong = [expert for expert, target in rule.in_layer(layer) if expert >= size]
        wrong += [int(target) for _, target in rule.in_layer(layer) if rule.kind == "remap" and target >= size]
        if wrong:
            raise PlanError(
                f"the plan names expert {wrong[0]} of layer {layer}, which has {size} experts (0-{size - 1}): "
                "make it from statistics of this model"
            )


def _cell(rules: Sequence[Rule], layer: int, router: HasExperts) -> _Cell:
    """What the rules together do in one layer."""
    here = [rule for rule in rules if _touches(rule, layer)]
    cell: _Cell = {}
    views = {_view(rule) for rule in here}
    for view in sorted(views, key=repr):
        seen = [rule for rule in here if _view(rule) == view]
        for name in dict.fromkeys(_plane(rule) for rule in seen if rule.kind in _PLANES):
            plane = _sum_plane([rule for rule in seen if _plane(rule) == name], name, layer, router.num_experts)
            if (plane != NEUTRAL[name]).any():
                cell[view, name] = plane
                for mode, value in _row_mode([rule for rule in here if _plane(rule) == name], layer).items():
                    cell[_PLAIN, mode] = value
        force = _force(seen, layer, router)
        if force.any():
            cell[view, "force"] = force
    _check_forces(here, views, layer, router)
    for name, value in _layer_parameters(here, layer, router).items():
        cell[_PLAIN, name] = value
    remap = _remap(here, layer, router.num_experts)
    if (remap != np.arange(router.num_experts)).any():
        cell[_PLAIN, "remap"] = remap
    cell.update(_by_name(here, layer, router))
    _check_by_name(cell, layer, router)
    return cell


def _view(rule: Rule) -> _View:
    return rule.absent, rule.draw


def _check_forces(rules: Sequence[Rule], views: set[_View], layer: int, router: HasExperts) -> None:
    """``PlanError`` where experts that are drawn, or left out where chosen, might meet others on one expert and no rule
    says what then."""
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


def _by_name(rules: Sequence[Rule], layer: int, router: HasExperts) -> _Cell:
    """What replaces scores, and what chooses experts by name."""
    cell: _Cell = {}
    for kind, named in (("scores", "replaced scores"), ("slot", "own experts"), ("replay", "replayed choices")):
        asked = {(rule.draw, rule.in_layer(layer)) for rule in rules if rule.kind == kind}
        if len(asked) > 1 or any(kind == "slot" and len(pairs) > 1 for _, pairs in asked):
            raise PlanError(
                f"a token of layer {layer} gets two {named}: keep one, or separate them with plan.only(...)"
            )
        for draw, pairs in asked:
            cell[(False, draw), kind] = _named(kind, pairs, layer, router)
    return cell


def _named(kind: str, pairs: Sequence[tuple[int, float]], layer: int, router: HasExperts) -> np.ndarray | float:
    if kind == "slot":
        return pairs[0][0]
    if kind == "scores":
        scores = np.zeros(router.num_experts, dtype=np.float32)
        for expert, score in pairs:
            scores[expert] = score
        return scores
    if len(pairs) > router.top_k:
        raise PlanError(f"{len(pairs)} experts are replayed in layer {layer}, which has {router.top_k} slots")
    ids = np.full(router.top_k, -1, dtype=np.int64)
    for expert, slot in pairs:
        ids[int(slot)] = expert
    return ids


def _check_by_name(cell: _Cell, layer: int, router: HasExperts) -> None:
    by_name = sorted({name for _, name in cell if name in ("slot", "replay")})
    if not by_name:
        return
    other = "a remap" if (_PLAIN, "remap") in cell else ""
    top_k = cell.get((_PLAIN, "top_k"), 0)
    other = other or (
        "a top_k above the router's own" if not isinstance(top_k, np.ndarray) and top_k > router.top_k else ""
    )
    if other:
        raise PlanError(f"a {by_name[0]} rule and {other} meet on layer {layer}: separate them with plan.only(...)")


def _touches(rule: Rule, layer: int) -> bool:
    if rule.kind in LAYER_KINDS:
        return rule.layers is None or layer in rule.layers
    return bool(rule.in_layer(layer))


def _plane(rule: Rule) -> str:
    return "score_bias" if rule.kind == "bias" and rule.mode != "logit" else _PLANES.get(rule.kind, "")


def _sum_plane(rules: Sequence[Rule], name: str, layer: int, num_experts: int) -> np.ndarray:
    """float32 [E]. Terms are added exactly (multiplied in rising order), so the order of the rules cannot matter."""
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
    """float32 [E] of ``Force`` codes: forbid over off over on."""
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
        if k > min(router.num_experts, MOST_SLOTS):
            raise PlanError(f"top_k {k} is more than the {min(router.num_experts, MOST_SLOTS)} of layer {layer}")
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


def _tables(cells: Sequence[_Cell], layer: int, router: HasExperts) -> SteeringTables | TokenSteering | None:
    """One layer's cells, a row each, as tables with the planes that any of them uses."""
    names: dict[_View, list[str]] = {}
    for view, name in dict.fromkeys(key for cell in cells for key in cell):
        names.setdefault(view, []).append(name)
    if not names:
        return None
    wide = int(max((cell.get((_PLAIN, "top_k"), 0.0) for cell in cells), default=0.0))  # type: ignore[type-var]
    wide = wide if wide > router.top_k else 0
    plain = names.pop(_PLAIN, [])
    by_name = [name for name in plain if name in _BY_NAME]
    if not names and not by_name and not wide:
        whole: dict[str, Any] = _stacked(cells, _PLAIN, plain, router)
        return SteeringTables(len(cells), router.num_experts, **whole)
    base: dict[str, Any] = {"temperature": torch.ones(len(cells))}
    base |= _stacked(cells, _PLAIN, [name for name in plain if name not in _BY_NAME], router)
    anew = [_routed_anew(cell, router) for cell in cells]
    if any(anew):
        bias = base.get("bias", torch.zeros(len(cells), router.num_experts))
        base["bias"] = torch.where(torch.tensor(anew)[:, None] & (bias == 0), MARK, bias)
    parts = [_part(cells, _PLAIN, by_name, router)] if by_name else []
    parts += [_part(cells, view, of_view, router) for view, of_view in sorted(names.items(), key=repr)]
    tables = SteeringTables(len(cells), router.num_experts, **base)
    return TokenSteering(layer, len(cells), router.num_experts, tables, parts, wide)


def _routed_anew(cell: _Cell, router: HasExperts) -> bool:
    """Whether tokens of this row are routed anew though their logits are steered by nothing else."""
    top_k = cell.get((_PLAIN, "top_k"), 0.0)
    return any(name == "scores" for _, name in cell) or (not isinstance(top_k, np.ndarray) and top_k > router.top_k)


def _part(cells: Sequence[_Cell], view: _View, names: Sequence[str], router: HasExperts) -> Part:
    tables = _stacked(cells, view, names, router)
    scores, slot, replay = (tables.pop(name, None) for name in _BY_NAME)
    return Part(*view, tables, scores, slot, replay)


def _stacked(cells: Sequence[_Cell], view: _View, names: Sequence[str], router: HasExperts) -> dict[str, torch.Tensor]:
    """Tables by name, a row for each cell."""
    stacked = {}
    for name in names:
        neutral = _neutral(name, router)
        rows = [np.asarray(cell.get((view, name), neutral), neutral.dtype) for cell in cells]
        stacked[name] = torch.from_numpy(np.stack(rows))
    return stacked


_BY_NAME = ("scores", "slot", "replay")


def _neutral(name: str, router: HasExperts) -> np.ndarray:
    if name == "remap":
        return np.arange(router.num_experts, dtype=np.int32)
    if name == "slot":
        return np.asarray(-1, dtype=np.int64)
    if name == "replay":
        return np.full(router.top_k, -1, dtype=np.int64)
    value = np.nan if name == "scores" else NEUTRAL[name]
    return np.asarray(value, np.float32) if name in ROW_PARAMETERS else np.full(router.num_experts, value, np.float32)
