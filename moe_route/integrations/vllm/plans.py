"""The plans of one worker: checked, compiled, and written into steering tables whose addresses never change."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_route.calls.call import PHASES
from moe_route.contract.tables import SteeringTables
from moe_route.integrations.vllm import operator
from moe_route.integrations.vllm.options import Options
from moe_route.integrations.vllm.requests import PlanRows
from moe_route.integrations.vllm.versions import EngineNotSupportedError
from moe_route.steering.compiled import CompiledPlan
from moe_route.steering.model import PlanError
from moe_route.steering.plan import Plan

if TYPE_CHECKING:
    from moe_route.integrations.vllm.sites import Site
    from moe_route.integrations.vllm.stages import Stage

__all__ = ["PlanTables"]


class PlanTables:
    """The plans that steer now, by name, in the tables of all sites.

    Attributes:
        running: name -> plan.
        layer_rows: int32 [L, rows + 1], steering row of a token in each layer, by its row over all layers: -1 where the
            plan leaves the layer alone, and in the last column, for tokens that no rule reaches.
    """

    def __init__(self, sites: Sequence[Site], options: Options, stage: Stage, device: torch.device):
        """``stage``: the place of the sites among the layers that plans name; ``device``: of ``layer_rows``."""
        self.running: dict[str, CompiledPlan] = {}
        self._sites, self._options, self._stage = sites, options, stage
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
        made = _plan_of(plan)
        layers = self._stage.layers
        made.check_model(model, config_hash=config_hash, num_experts=[layer.num_experts for layer in layers])
        compiled = made.compile(layers, self._options.groups)
        special = [
            layer
            for layer, table in enumerate(compiled.tables)
            if table is not None and not isinstance(table, SteeringTables)
        ]
        if special:
            raise EngineNotSupportedError(
                f"moe_route: the plan has rules that look at single tokens (layers {special}: absent experts, drawn, "
                "replayed or given choices and scores, a top_k above the model's), which do not run inside vLLM: "
                "use mr.attach in transformers"
            )
        return compiled

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
        first = 0
        self.layer_rows.fill_(-1)
        for name, plan in plans.items():
            own = plan.rows.numpy()
            place = [int(np.searchsorted(plan.bounds, start, side="right")) for start in (0, *bounds)]
            rows[names.index(name)] = np.where(own >= 0, own + first, -1)[:, :, place]
            here = torch.arange(first, first + sizes[name], dtype=torch.int32)
            for layer, (site, table) in enumerate(zip(self._sites, plan.tables[self._stage.own], strict=True)):
                if table is not None:
                    assert isinstance(table, SteeringTables)  # `compiled` refused others
                    assert site.steering is not None
                    operator.copy_plan(site.steering, first, table)
                    self.layer_rows[layer, first : first + sizes[name]] = here.to(self.layer_rows.device)
            first += sizes[name]
        for site, of_layer in zip(self._sites, self.layer_rows, strict=True):
            site.steers = bool((of_layer >= 0).any())
        return PlanRows(rows, np.asarray(bounds, np.int64))


def _plan_of(plan: str | bytes) -> Plan:
    if isinstance(plan, str):
        return Plan.load(plan)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.safetensors"
        file.write_bytes(plan)
        return Plan.load(file)
