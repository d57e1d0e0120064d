"""Compile rules into steering tables: the effect of each row in each layer, and the row that each token takes."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moe_route.calls.call import PHASES
from moe_route.contract.experts import AddedDirections
from moe_route.contract.tables import SteeringTables
from moe_route.contract.token_tables import TokenTables
from moe_route.steering.cell import Cell, HasExperts, directions_of, tables_of
from moe_route.steering.model import PlanError
from moe_route.steering.rule import Rule
from moe_route.steering.tables import SequenceTable


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
        applies: whether a rule applies a function, which is told which token is where.
        directions: what the plan adds to outputs of experts, by layer; None for nothing.
        sequence_tables: tables of values per token, in the order of the columns of ``Labels.entries``.
    """

    tables: list[SteeringTables | TokenTables | None]
    rows: torch.Tensor
    groups: tuple[str, ...]
    plan_hash: str
    bounds: tuple[int, ...] = ()
    draws: bool = False
    sequence_tables: tuple[SequenceTable, ...] = ()
    applies: bool = False
    directions: Sequence[AddedDirections | None] = ()

    @property
    def is_null(self) -> bool:
        """Whether no token of any layer is steered."""
        return all(table is None for table in (*self.tables, *self.directions))

    def row(self, phase: str, group: int = -1, position: int = 0) -> int:
        """The steering row of a token of ``group`` (-1: none) at ``position`` in ``phase``; -1 where none applies."""
        if phase not in PHASES or not -1 <= group < len(self.groups):
            raise PlanError(f"no row for phase {phase!r}, group {group}: there are {len(self.groups)} groups")
        return int(self.rows[PHASES.index(phase), group + 1, bisect.bisect_right(self.bounds, position)])

    def to(self, device: torch.device | str) -> CompiledPlan:
        """The same tables on another device."""
        device = torch.device(device)
        tables = [None if table is None else table.to(device) for table in self.tables]
        directions = [None if part is None else part.to(device) for part in self.directions]
        return replace(self, tables=tables, rows=self.rows.to(device), directions=directions)


def compile_rules(
    rules: Sequence[Rule], routers: Sequence[HasExperts], groups: tuple[str, ...], plan_hash: str
) -> CompiledPlan:
    """Compile rules without numbers by position (`Rule.parts`) to tables; see ``Plan.compile``."""
    if len(set(groups)) != len(groups):
        raise PlanError(f"group names repeat: {', '.join(groups)}")
    bounds = _bounds(rules)
    active = [[_active(rules, phase, group, bounds) for group in (None, *groups)] for phase in PHASES]
    for rule in rules:
        rule.check_fits(routers, groups)
    written = [{layer: rule.in_layer(layer) for layer in range(len(routers)) if rule.touches(layer)} for rule in rules]
    sources = tuple(dict.fromkeys(rule.table for rule in rules if isinstance(rule.table, SequenceTable)))
    kept: dict[tuple[object, ...], list[Cell]] = {}
    keys: dict[tuple[int, ...], tuple[object, ...]] = {}
    for here in dict.fromkeys(number for of_phase in active for of_group in of_phase for number in of_group):
        cells = [Cell(layer, router, sources) for layer, router in enumerate(routers)]
        for number in here:
            for layer, pairs in written[number].items():
                cells[layer].rule = number
                rules[number].write(cells[layer], pairs)
        keys[here] = tuple(cell.settled().key for cell in cells)
        if any(cells):
            kept.setdefault(keys[here], cells)
    numbers = {key: number for number, key in enumerate(kept)}
    rows = torch.tensor(
        [[[numbers.get(keys[here], -1) for here in of_group] for of_group in of_phase] for of_phase in active],
        dtype=torch.int32,
    )
    directions = [directions_of([row[layer] for row in kept.values()]) for layer in range(len(routers))]
    tables = [
        tables_of([row[layer] for row in kept.values()], layer, router, sources) for layer, router in enumerate(routers)
    ]
    draws = any(rule.draw is not None for rule in rules)
    applies = any(rule.function is not None for rule in rules)
    return CompiledPlan(tables, rows, groups, plan_hash, bounds, draws, sources, applies, directions)


def _bounds(rules: Sequence[Rule]) -> tuple[int, ...]:
    """Positions above 0 at which some rule begins or ends to apply."""
    ends = {end for rule in rules for span in rule.positions or () for end in span if end}
    return tuple(sorted(ends))


def _active(rules: Sequence[Rule], phase: str, group: str | None, bounds: Sequence[int]) -> list[tuple[int, ...]]:
    """For each class of positions, the indices of the rules that apply, in increasing order."""
    begin, end = defaultdict(set), defaultdict(set)
    for number, rule in enumerate(rules):
        if rule.phase in (None, phase) and (rule.groups is None or group in rule.groups):
            for start, stop in ((0, None),) if rule.positions is None else rule.positions:
                begin[start].add(number)
                end[stop].add(number)
    active: set[int] = set()
    classes = []
    for first in (0, *bounds):
        active = (active - end[first]) | begin[first]
        classes.append(tuple(sorted(active)))
    return classes
