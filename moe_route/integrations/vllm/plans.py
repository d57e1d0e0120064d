"""The plans of one worker: checked, compiled, and written into steering tables whose addresses never change."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_route.calls.call import PHASES
from moe_route.integrations.vllm import operator
from moe_route.integrations.vllm.options import UNSTEERED, Options
from moe_route.integrations.vllm.requests import PlanRows, Request
from moe_route.integrations.vllm.versions import EngineNotSupportedError
from moe_route.steering.compiled import CompiledPlan
from moe_route.steering.model import PlanError
from moe_route.steering.plan import Plan
from moe_route.steering.sequence_table import SequenceTable
from moe_route.steering.token_rows import Placed, join
from moe_route.steering.token_steering import TokenSteering

if TYPE_CHECKING:
    from moe_route.integrations.vllm.sites import Site
    from moe_route.integrations.vllm.stages import Stage

__all__ = ["PlanTables", "plan_of", "tables_used"]


class PlanTables:
    """The plans that steer now, by name, in the tables of all sites.

    Attributes:
        running: name -> plan.
        layer_rows: int32 [L, rows + 1], steering row of a token in each layer, by its row over all layers: -1 where the
            plan leaves the layer alone, and in the last column, for tokens that no rule reaches.
        by_token: int64 [...], the rows of rules that look at single tokens.
        draws: whether a rule draws experts for each token.
        sequence_tables: the tables of values per token of all plans.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        options: Options,
        stage: Stage,
        device: torch.device,
        *,
        captured: bool = False,
    ):
        """``stage``: the place of the sites among the layers that plans name; ``device``: of ``layer_rows``.

        ``captured``: whether steps may be replayed as CUDA graphs.
        """
        self.running: dict[str, CompiledPlan] = {}
        self._sites, self._options, self._stage, self._captured = sites, options, stage, captured
        self.by_token = np.zeros(0, np.int64)
        self.draws = False
        self.sequence_tables: tuple[SequenceTable, ...] = ()
        self._first_table: dict[str, int] = {}
        shape = (len(sites), options.rows + 1)
        self.layer_rows = torch.full(shape, -1, dtype=torch.int32, device=device)
        for site in sites:
            site.steering = operator.neutral_tables(options.rows, site.num_experts, site.device)

    def change(self, name: str, compiled: CompiledPlan | None) -> PlanRows:
        """Put a plan in the place of the one of this name; None: end it. Returns the rows that requests take.

        Raises ``PlanError`` for a name that was not reserved and for too many rows; the former plans then stay.
        """
        self.check_name(name)
        wanted = {key: value for key, value in self.running.items() if key != name}
        if compiled is not None:
            wanted[name] = compiled
        rows = self._place(wanted)
        self.running = wanted
        return rows

    def check_name(self, name: str) -> None:
        """Raise ``PlanError`` for a name that was not reserved."""
        if name not in self._options.plan_names:
            raise PlanError(
                f"no plan is called {name!r} here: reserve its name when the engine starts, "
                f'"moe_route": {{"plans": {{"{name}": null}}}}'
            )

    def compiled(self, plan: str | bytes, model: str, config_hash: str) -> CompiledPlan:
        """A plan, a file's path or content, for all layers. Raises ``PlanError`` for one of another model."""
        made = plan_of(plan)
        layers = self._stage.layers
        made.check_model(model, config_hash=config_hash, num_experts=[layer.num_experts for layer in layers])
        return self.fitted(made.compile(layers, self._options.groups))

    def fitted(self, compiled: CompiledPlan) -> CompiledPlan:
        """A compiled plan fitted to the scores of these routers. Raises an error for one that cannot run here."""
        by_token = [table for table in compiled.tables if isinstance(table, TokenSteering)]
        wide = [table.layer for table in by_token if table.wide]
        if wide:
            raise EngineNotSupportedError(
                f"moe_route: the plan has a top_k above the model's (layers {wide}), for which vLLM's kernels have no "
                "slots: use mr.attach in transformers"
            )
        if by_token and self._captured:
            raise EngineNotSupportedError(
                "moe_route: the plan has rules that look at single tokens (absent experts; drawn, replayed or given "
                "choices and scores), which no CUDA graph can hold: start with --enforce-eager"
            )
        if any(table.keys is None for table in compiled.sequence_tables):
            raise EngineNotSupportedError(
                "moe_route: the plan has values for the rows of a batch, and vLLM forms its own batches: make it with "
                "items=[...], and give each request its moe_route_item"
            )
        tables = [*compiled.tables]
        for layer, site in enumerate(self._sites, self._stage.first):
            table = tables[layer]
            if isinstance(table, TokenSteering):
                try:
                    tables[layer] = table.fitted(site.name, site.spec)
                except ValueError as error:
                    raise PlanError(str(error)) from error
        return replace(compiled, tables=tables)

    def starts(self, request: Request) -> np.ndarray:
        """int64 [3, M]: where the values of a request begin in each of M tables, how many there are, and how many rows
        lie between two tokens. Length 0 in tables that no rule for this request reads.

        Raises ``PlanError`` if its plan has no values for its item.
        """
        found = np.zeros((3, len(self.sequence_tables)), np.int64)
        name = self._options.plan_names[request.plan] if request.plan >= 0 else UNSTEERED
        group = self._options.groups[request.group] if request.group >= 0 else None
        compiled = self.running.get(name)
        if compiled is None:
            return found
        for number in tables_used(compiled, group):
            table = compiled.sequence_tables[number]
            row = int(table.sequences(1, None if request.item is None else [request.item], [group])[0])
            found[:, self._first_table[name] + number] = table.first[row], table.lengths[row], not table.constant
        return found

    def _place(self, plans: Mapping[str, CompiledPlan]) -> PlanRows:
        """Write plans into the steering tables, one after the other: all stages give a plan the same rows."""
        sizes = {name: max((t.rows for t in plan.tables if t is not None), default=0) for name, plan in plans.items()}
        needed = sum(sizes.values())
        if needed > self._options.rows:
            raise PlanError(
                f"the plans have {needed} steering rows, the tables room for {self._options.rows}: start the engine "
                f'with "moe_route": {{"rows": {needed}}} or more'
            )
        names = self._options.plan_names
        bounds = sorted({bound for plan in plans.values() for bound in plan.bounds})
        shape = (len(names) + 1, len(PHASES), len(self._options.groups) + 1, len(bounds) + 1)
        rows = np.full(shape, -1, np.int32)
        first, first_table = 0, 0
        by_token: list[np.ndarray] = []
        placed: dict[int, list[Placed]] = {}
        self._first_table = {}
        self.layer_rows.fill_(-1)
        for name, plan in plans.items():
            own = plan.rows.numpy()
            place = [int(np.searchsorted(plan.bounds, start, side="right")) for start in (0, *bounds)]
            rows[names.index(name)] = np.where(own >= 0, own + first, -1)[:, :, place]
            here = torch.arange(first, first + sizes[name], dtype=torch.int32)
            for layer, (site, table) in enumerate(zip(self._sites, plan.tables[self._stage.own], strict=True)):
                if table is None:
                    continue
                assert site.steering is not None
                if isinstance(table, TokenSteering):
                    placed.setdefault(layer, []).append(Placed(table, first, first_table))
                    by_token.append(here.numpy())
                operator.copy_plan(site.steering, first, table.base if isinstance(table, TokenSteering) else table)
                self.layer_rows[layer, first : first + sizes[name]] = here.to(self.layer_rows.device)
            self._first_table[name] = first_table
            first += sizes[name]
            first_table += len(plan.sequence_tables)
        self.by_token = np.unique(np.concatenate([np.zeros(0, np.int64), *by_token]))
        self.draws = any(plan.draws for plan in plans.values())
        self.sequence_tables = tuple(table for plan in plans.values() for table in plan.sequence_tables)
        for layer, (site, of_layer) in enumerate(zip(self._sites, self.layer_rows, strict=True)):
            site.steers = bool((of_layer >= 0).any())
            if layer in placed:
                assert site.steering is not None  # `__init__` made it
                site.by_token = join(site.steering, placed[layer])
            else:
                site.by_token = None
        return PlanRows(rows, np.asarray(bounds, np.int64))


def tables_used(plan: CompiledPlan, group: str | None) -> frozenset[int]:
    """Indices of the tables of values per token that some rule for this group reads."""
    rows = plan.rows[:, plan.groups.index(group) + 1 if group is not None else 0].unique()
    rows = rows[rows >= 0].long()
    found: set[int] = set()
    for table in plan.tables:
        for part in table.parts if isinstance(table, TokenSteering) else ():
            for name in ("replay", "score_table"):
                if name in part.named:
                    found.update(number for number in part.named[name][rows].tolist() if number >= 0)
    return frozenset(found)


def plan_of(plan: str | bytes) -> Plan:
    """The plan of a file, by its path or its content."""
    if isinstance(plan, str):
        return Plan.load(plan)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.safetensors"
        file.write_bytes(plan)
        return Plan.load(file)
