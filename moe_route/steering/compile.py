"""Compile rules into steering tables: the effect of each row in each layer, and the row that each token takes."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_route.calls.call import PHASES
from moe_route.contract.tables import SteeringTables
from moe_route.contract.token_tables import TokenTables
from moe_route.steering.cell import Cell, HasExperts, LayerShape, tables_of
from moe_route.steering.model import PlanError
from moe_route.steering.rule import Rule
from moe_route.steering.tables import SequenceTable

__all__ = ["CompiledPlan", "HasExperts", "LayerShape", "compile_rules"]


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


def compile_rules(
    rules: Sequence[Rule], routers: Sequence[HasExperts], groups: tuple[str, ...], plan_hash: str
) -> CompiledPlan:
    """Compile rules to tables; see ``Plan.compile``."""
    if len(set(groups)) != len(groups):
        raise PlanError(f"group names repeat: {', '.join(groups)}")
    for rule in rules:
        _check_fits(rule, routers, groups)
    by_token = tuple(dict.fromkeys(rule.table for rule in rules if rule.table is not None))
    numbers: dict[tuple[object, ...], int] = {}
    kept: list[list[Cell]] = []
    known: dict[tuple[int, ...], int] = {}
    bounds = _bounds(rules)
    rows = np.full((len(PHASES), len(groups) + 1, len(bounds) + 1), -1, dtype=np.int32)
    for p, phase in enumerate(PHASES):
        for g, group in enumerate((None, *groups)):
            for c, active in enumerate(_active(rules, phase, group, bounds)):
                if active not in known:
                    here = [rules[i] for i in active]
                    cells = [_cell(here, layer, router, by_token) for layer, router in enumerate(routers)]
                    known[active] = _row(numbers, kept, cells)
                rows[p, g, c] = known[active]
    tables = [tables_of([row[layer] for row in kept], layer, router, by_token) for layer, router in enumerate(routers)]
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


def _row(numbers: dict[tuple[object, ...], int], kept: list[list[Cell]], cells: list[Cell]) -> int:
    """Index of the row with these cells, added if it is new; -1 if no cell has an effect."""
    if not any(cells):
        return -1
    key = tuple(cell.key for cell in cells)
    if key not in numbers:
        numbers[key] = len(kept)
        kept.append(cells)
    return numbers[key]


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
        wrong = [expert for expert in rule.named(layer) if expert >= size]
        if wrong:
            raise PlanError(
                f"the plan names expert {wrong[0]} of layer {layer}, which has {size} experts (0-{size - 1}): "
                "make it from statistics of this model"
            )
    if rule.table is not None:
        _check_table(rule, rule.table, routers)


def _check_table(rule: Rule, table: SequenceTable, routers: Sequence[HasExperts]) -> None:
    """Raise ``PlanError`` for values of layers or experts that the model lacks."""
    if table.layers is None and table.values.shape[1] != len(routers):
        raise PlanError(
            f"the {table.what} are of {table.values.shape[1]} layers, the model has {len(routers)} MoE layers: leave "
            f"dense layers out of them, or say which layers they are of, Plan.{rule.kind}(..., layers=[...])"
        )
    for layer, router in enumerate(routers):
        if rule.touches(layer):
            table.check_layer(layer, router.num_experts, router.top_k)


def _cell(rules: Sequence[Rule], layer: int, router: HasExperts, sources: Sequence[SequenceTable]) -> Cell:
    """The combined effect of the rules in one layer."""
    cell = Cell(layer, router, sources)
    for rule in rules:
        if rule.touches(layer):
            rule.write(cell)
    return cell.settled()
