"""The plans of an engine.

In a worker, ``PlanTables`` checks, compiles and writes them into steering tables whose addresses never change, and
``TokenValues`` gives what rules that look at single tokens need of a step. ``PlannedItems`` lets a front end refuse a
request for which its plan has no values. ``salt_of`` tells which requests are steered alike, and may share a prefix.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_route.base import files
from moe_route.base.devices import upload
from moe_route.calls.call import PHASES
from moe_route.contract.token_tables import BY_TOKEN, Placed, TokenTables, entries, join, starts
from moe_route.integrations.serving import operator
from moe_route.integrations.serving.options import (
    DEFAULT_PLAN,
    ITEM,
    PLAN,
    UNSTEERED,
    EngineNotSupportedError,
    Options,
    identity,
)
from moe_route.integrations.serving.requests import Batch, PlanRows, Request, RequestTable, positions_of
from moe_route.integrations.serving.sites import Site, Stage, TokenNumbers
from moe_route.ops.token_rules import fitted, token_counter
from moe_route.steering.compile import CompiledPlan
from moe_route.steering.model import PlanError
from moe_route.steering.plan import Plan
from moe_route.steering.tables import Key, SequenceTable

_MARK = "moe_route:"  # begins every salt that is not the request's own alone
logger = logging.getLogger(__name__)


class TokenValues:
    """Makes the numbers of the tokens of each step, in ``numbers``."""

    def __init__(self, plans: PlanTables, requests: RequestTable, device: torch.device, fail: Callable[[str], None]):
        """``fail`` is told of a request that its plan has no values for."""
        self._plans, self._requests, self._device, self._fail = plans, requests, device, fail
        self.numbers = TokenNumbers()

    def clear(self) -> None:
        """The next step needs none."""
        self.numbers.counter = self.numbers.entries = None
        self.numbers.present = False

    def lay_out(self, rows: np.ndarray, batch: Batch) -> None:
        """Make the numbers of a step; ``rows``: int32 [T], the steering rows of its tokens."""
        self.clear()
        if not len(self._plans.by_token) or not np.isin(rows, self._plans.by_token).any():
            return
        self.numbers.present = True
        positions = positions_of(batch.counts, batch.starts)
        if self._plans.draws:
            self.numbers.counter = token_counter(
                upload(torch.from_numpy(positions), self._device), batch.token_ids[: len(positions)]
            )
        if self._plans.sequence_tables:
            places = self._starts(batch)
            self.numbers.entries = upload(entries(torch.from_numpy(places), torch.from_numpy(positions)), self._device)

    def _starts(self, batch: Batch) -> np.ndarray:
        """int64 [3, T, M]: ``PlanTables.starts`` of each token's request."""
        nowhere = np.zeros((3, len(self._plans.sequence_tables)), np.int64)
        requests = [self._requests.running.get(name) for name in batch.names]
        starts = [nowhere if request is None else self._starts_of(request, nowhere) for request in requests]
        return np.repeat(np.stack(starts, 1), batch.counts, axis=1)

    def _starts_of(self, request: Request, nowhere: np.ndarray) -> np.ndarray:
        if request.starts is None:
            try:
                request.starts = self._plans.starts(request)
            except PlanError as error:  # refused at admission, but the plan changed while it ran
                request.starts = nowhere
                self._fail(f"request {request.name} runs without its plan: {error}")
        return request.starts


UNDECLARED = 'the engine knows the groups of its option "groups" alone'


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
        graphs_off: str | None = None,
    ):
        """``stage``: the place of the sites among the layers that plans name; ``device``: of ``layer_rows``.

        ``graphs_off``: where steps may be replayed as CUDA graphs, what starts the engine without them.
        """
        self.running: dict[str, CompiledPlan] = {}
        self._sites, self._options, self._stage, self._graphs_off = sites, options, stage, graphs_off
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
        refused = sorted({rule.kind for rule in made.rules if not rule.served})
        if refused:
            raise EngineNotSupportedError(
                f"moe_route: an engine cannot run rules of the kind {', '.join(refused)}, which call Python in every "
                "layer: use mr.attach in transformers"
            )
        layers = self._stage.layers
        made.check_model(model, config_hash=config_hash, num_experts=[layer.num_experts for layer in layers])
        made.check_groups(self._options.groups, UNDECLARED)
        return self.fitted(made.compile(layers, self._options.groups))

    def fitted(self, compiled: CompiledPlan) -> CompiledPlan:
        """A compiled plan fitted to the scores of these routers. Raises an error for one that cannot run here."""
        by_token = [table for table in compiled.tables if isinstance(table, TokenTables)]
        wide = [table.layer for table in by_token if table.wide]
        if wide:
            raise EngineNotSupportedError(
                f"moe_route: the plan has a top_k above the model's (layers {wide}), for which the engine's kernels "
                "have no slots: use mr.attach in transformers"
            )
        if by_token and self._graphs_off is not None:
            raise EngineNotSupportedError(
                "moe_route: the plan has rules that look at single tokens (absent experts; drawn, replayed or given "
                f"choices and scores), which no CUDA graph can hold: start with {self._graphs_off}"
            )
        if any(table.keys is None for table in compiled.sequence_tables):
            raise EngineNotSupportedError(
                "moe_route: the plan has values for the rows of a batch, and an engine forms its own batches: make it "
                "with items=[...], and give each request its moe_route_item"
            )
        tables = [*compiled.tables]
        for layer, site in enumerate(self._sites, self._stage.first):
            table = tables[layer]
            if isinstance(table, TokenTables):
                try:
                    tables[layer] = fitted(table, site.name, site.spec)
                except ValueError as error:
                    raise PlanError(str(error)) from error
        return replace(compiled, tables=tables)

    def starts(self, request: Request) -> np.ndarray:
        """int64 [3, M]: where the values of a request begin in each of M tables, how many there are, and how many rows
        lie between two tokens. Length 0 in tables that no rule for this request reads.

        Raises ``PlanError`` if its plan has no values for its item.
        """
        places = np.zeros((3, len(self.sequence_tables)), np.int64)
        name = self._options.plan_names[request.plan] if request.plan >= 0 else UNSTEERED
        group = self._options.groups[request.group] if request.group >= 0 else None
        compiled = self.running.get(name)
        if compiled is None:
            return places
        for number in tables_used(compiled, group):
            table = compiled.sequence_tables[number]
            place = starts([table], 1, None if request.item is None else [request.item], [group])
            places[:, self._first_table[name] + number] = place[:, 0, 0]
        return places

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
                if isinstance(table, TokenTables):
                    placed.setdefault(layer, []).append(Placed(table, first, first_table))
                    by_token.append(here.numpy())
                operator.copy_plan(site.steering, first, table.base if isinstance(table, TokenTables) else table)
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
    numbers: set[int] = set()
    for table in plan.tables:
        for part in table.parts if isinstance(table, TokenTables) else ():
            for name in BY_TOKEN:
                if name in part.named:
                    numbers.update(number for number in part.named[name][rows].tolist() if number >= 0)
    return frozenset(numbers)


def plan_of(plan: str | bytes) -> Plan:
    """The plan of a file, by its path or its content."""
    if isinstance(plan, str):
        return Plan.load(plan)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("plan.json" if plan.lstrip()[:1] == b"{" else "plan.safetensors")
        file.write_bytes(plan)
        try:
            return Plan.load(file)
        except (files.FileRefusedError, PlanError) as error:
            raise type(error)(str(error).replace(str(file), "the plan")) from None


class PlannedItems:
    """The items of which plans have values of single tokens, as a front end knows them: it refuses other requests.

    A front end reads the plan files of the options, and sees the plans that pass it by ``collective_rpc``.
    """

    def __init__(self, options: Options):
        self._options = options
        # by plan: (groups that a rule steers, or None for all; the keys of its table)
        self._known: dict[str, list[tuple[tuple[str, ...] | None, frozenset[Key]]]] = {}
        for name, path in {DEFAULT_PLAN: options.plan, **options.plans}.items():
            if path is not None:
                self.steered(path, name)

    def steered(self, plan: str | bytes | None, name: str = DEFAULT_PLAN) -> None:
        """A plan, a file's path or content, steers from now on; None: none does. Arguments as those of the verb."""
        try:
            made = Plan() if plan is None else plan_of(plan)
        except (files.FileRefusedError, PlanError) as error:  # a path of the workers' machine
            logger.warning(
                "moe_route: requests are not checked against plan %r, which only workers read: %s", name, error
            )
            made = Plan()
        tables = [(rule.groups, rule.table) for rule in made.rules if isinstance(rule.table, SequenceTable)]
        self._known[name] = [(of_groups, frozenset(table.keys or ())) for of_groups, table in tables]

    def error(self, arguments: Mapping[str, Any] | None) -> str | None:
        """What is wrong with a request, by its arguments: its plan has no values for its item. Or None."""
        plan, group, item = identity(arguments, self._options)
        for groups, keys in self._known.get(plan, ()):
            if groups is not None and group not in groups:
                continue
            if item is None:
                return f"plan {plan!r} has values of single tokens, by item: give the request {ITEM}"
            if (item, None) not in keys and (item, group) not in keys:
                return (
                    f"plan {plan!r} has no values for {ITEM}={item!r} in group {group!r}: let the request choose "
                    f"another plan by {PLAN}, or none"
                )
        return None


# ---- who may share a cached prefix: requests whose tokens are steered alike


class Steered(NamedTuple):
    """What decides the steering of a token of one plan and group, beside its position and id."""

    digest: str
    by_phase: bool  # prompt and answer are steered differently
    by_item: bool = False  # the plan has values of single tokens, by item


@dataclass(frozen=True)
class Workers:
    """What the workers hold now."""

    counts: bool = False  # whether a recording runs
    steered: Mapping[tuple[str, str | None], Steered] = field(default_factory=dict)  # by plan and group


def steered_prefixes(
    plans: Mapping[str, CompiledPlan], groups: tuple[str, ...]
) -> dict[tuple[str, str | None], Steered]:
    """What the plans do to requests of each group; pairs that no rule reaches are left out."""
    steered: dict[tuple[str, str | None], Steered] = {}
    for name, plan in plans.items():
        for column, group in enumerate((None, *groups)):
            rows = plan.rows[:, column]
            if plan.is_null or not bool((rows >= 0).any()):
                continue
            by_item = bool(tables_used(plan, group))
            digest = _digest([plan.plan_hash, rows.tolist(), list(plan.bounds), group if by_item else None])
            steered[name, group] = Steered(digest, not bool((rows[0] == rows[1]).all()), by_item)
    return steered


def _digest(content: Any) -> str:
    return hashlib.blake2b(files.canonical_json(content).encode(), digest_size=16).hexdigest()


def salt_of(steered: Steered | None, prompt: int, item: str | int | None, epoch: int) -> str:
    """What a request may share a cached prefix by; "" with every request that is not steered.

    ``prompt``: its length in tokens. ``epoch``: how often plans changed while requests ran, whose blocks then hold what
    several plans made.
    """
    if steered is None:
        return f":{epoch}" if epoch else ""
    parts = [str(epoch), steered.digest]
    if steered.by_phase:
        parts.append(str(prompt))
    if steered.by_item:
        parts.append(_digest(item))
    return ":".join(["", *parts])


def marked_salt(own: str | None, salt: str) -> str | None:
    """The salt of a request that brings ``own``, and shares by ``salt``."""
    own = own or ""
    # with its length, and wherever it looks like one of ours, so that no request can make up the salt of another
    return f"{_MARK}{len(own)}:{own}{salt}" if salt or _MARK in own else own or None
