"""What one worker of an engine holds: its routers, the running requests, the plans and the recording."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from moe_route.base.devices import upload
from moe_route.integrations.serving import operator
from moe_route.integrations.serving.counts import Known, PendingTokens, StepCounts
from moe_route.integrations.serving.options import DEFAULT_PLAN, UNSTEERED, EngineNotSupportedError, Options, identity
from moe_route.integrations.serving.plans import PlanTables, TokenValues, Workers, steered_prefixes
from moe_route.integrations.serving.recording import Engine, Recording, TokenIds
from moe_route.integrations.serving.requests import Batch, Request, RequestTable
from moe_route.integrations.serving.returned import ReturnedExperts
from moe_route.integrations.serving.sites import Site, Stage
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.steering.compile import CompiledPlan

_GRAPH_ROWS = 256  # a CUDA graph may pad a step beyond the scheduler's limit
logger = logging.getLogger(__name__)


class Session:
    """Attached to one worker after its weights are loaded, before anything is compiled or captured.

    An engine tells it of its requests (``begin``, ``known``) and steps (``laid_out``, ``after``, ``dummy``).
    """

    how_to_group = "name its group"
    """What a request does to be counted, for the log."""

    def __init__(
        self,
        engine: Engine,
        sites: list[Site],
        stage: Stage,
        options: Options,
        token_ids: TokenIds,
        *,
        device: torch.device,
        graphs_off: str | None,
        most_requests: int,
        most_tokens: int,
        pending: int | None = None,
        ahead: bool = False,
    ):
        """Make all tables, and let the operator act on them.

        ``device``: of the token tables. ``graphs_off``: where steps may be replayed as CUDA graphs, what starts the
        engine without them. ``most_*``: the
        most that a step holds. ``pending``: the most of its tokens of which it is known only later whether they became
        text; None: of none. ``ahead``: see ``RequestTable``.
        """
        self.engine, self.sites, self.options = engine, sites, options
        self._most_tokens = most_tokens + _GRAPH_ROWS
        self._requests = RequestTable(len(options.groups), len(options.plan_names), most_requests)
        self._requests.ahead = ahead
        self._recording = Recording(
            sites,
            options,
            self._requests,
            token_ids,
            stage,
            most_requests=most_requests,
            most_tokens=self._most_tokens,
        )
        self._returned = ReturnedExperts(sites, self._most_tokens) if options.routed_experts else None
        self._plans = PlanTables(sites, options, stage, device, graphs_off=graphs_off)
        self._values = TokenValues(self._plans, self._requests, device, self._recording.fail)
        self._make_token_tables(device)
        self._counts = StepCounts(sites) if {site.device.type for site in sites} == {"cpu"} else None
        # what ``take_back`` gives back
        self._former: tuple[str, CompiledPlan | None, set[str], list[dict[str, str | None]]] | None = None
        self._pending = None
        if pending is not None:
            numbers = self._values.numbers
            self._pending = PendingTokens(sites, self._requests, self._plans.layer_rows, numbers, device, pending)
        operator.connect(sites, self._counts, self._pending)

    def _make_token_tables(self, device: torch.device) -> None:
        """Token tables of the largest step: their addresses are part of captured graphs."""
        self._host = torch.full((self._most_tokens, 4), -1, dtype=torch.int32)
        self._host[:, 3] = 1
        self._tokens = self._host.to(device).repeat(len(self.sites), 1, 1)
        self._dirty = 0  # rows of the device's tables that may hold something
        for site, tokens in zip(self.sites, self._tokens, strict=True):
            site.tokens, site.numbers = tokens, self._values.numbers

    def begin_options(self) -> None:
        """Steer and record as the options say."""
        for name, path in {DEFAULT_PLAN: self.options.plan, **self.options.plans}.items():
            if path is not None:
                self.steer(path, name)
        if self.options.record:
            self.record()

    # ---- verbs

    def steer(
        self, plan: str | bytes | None, name: str = DEFAULT_PLAN, change: Mapping[str, str] | None = None
    ) -> str | None:
        """Steer by a plan, a file's path or content, from the next step on; None ends it. Returns the plan's hash.

        ``name`` is the plan that requests choose by ``moe_route_plan``; those that choose none take "default".
        ``change``: what the metadata says of it, if a client asked for it: client and time.
        """
        self.refuse_other_engine()
        self._former = None
        self._plans.check_name(name)
        compiled = None
        if plan is not None:
            compiled = self._plans.compiled(plan, self.engine.model["name"], self.engine.model["config_hash"])
        former = self._plans.running.get(name), set(self._recording.used_plans), list(self._recording.changes)
        self._change(name, compiled)
        self._former = name, *former
        digest = None if compiled is None else compiled.plan_hash
        if digest is not None:
            self._recording.used_plans.add(digest)
        if change is not None:
            self._recording.changes.append({"plan": name, "hash": digest, **change})
        return digest

    def _change(self, name: str, compiled: CompiledPlan | None) -> None:
        self._requests.plan_rows = self._plans.change(name, compiled)
        for request in self._requests.running.values():
            request.starts = None

    def take_back(self) -> None:
        """Undo the latest ``steer``, if it changed a plan here: another worker refused it."""
        if self._former is not None:
            name, compiled, self._recording.used_plans, self._recording.changes = self._former
            self._change(name, compiled)
            self._former = None

    def prefixes(self) -> Workers:
        """What decides who may share a cached prefix."""
        return Workers(self._requests.counts, steered_prefixes(self._plans.running, self.options.groups))

    def record(self) -> None:
        """Begin a new recording. Requests that run already are not part of it."""
        self.refuse_other_engine()
        self._recording.start(plan.plan_hash for plan in self._plans.running.values())

    def pause(self) -> None:
        """Stop counting. What was counted is kept; ``statistics`` reads it, ``record`` forgets it."""
        self._requests.counts = False

    def known(self, texts: Mapping[str, Known], ended: Collection[str] = (), aborted: Collection[str] = ()) -> None:
        """What the engine's scheduler knows of its requests, which it tells before every other verb.

        ``ended``: those that ended since the latest step. ``aborted``: of these, those that were given up before their
        text had ended.
        """
        if self._pending is not None:
            rejected = self._pending.resolve(texts)
            if self._recording.trace is not None:
                self._recording.trace.drop(rejected)
        self._recording.end(ended, aborted)

    def counted(self, *, partial: bool = False, sequences: bool = True) -> RoutingStatistics:
        """What was counted. ``partial``: even if something is missing. ``sequences``: those that are kept, too.

        Requests that run are in the sums over tokens only; ``metadata["running_sequences"]`` is their number.

        Raises ``RecordingError`` if nothing was recorded, and unless ``partial`` if something is missing: a layer did
        not count every token that ran, or the tables were too small.
        """
        self.refuse_unrecorded(partial=partial)
        made = self._recording.statistics(self.engine, sequences=sequences)
        made.verify(partial=partial)
        return made

    def refuse_unrecorded(self, *, partial: bool = False) -> None:
        """Raise ``RecordingError`` if nothing was recorded, or unless ``partial`` if a worker knows of a gap."""
        self.refuse_other_engine()
        if not self._recording.started:
            raise RecordingError(
                'nothing is recorded: start the engine with "moe_route": {"record": true}, or call moe_route_record'
            )
        if not partial:
            self._recording.refuse_gaps()

    def report(self) -> dict[str, Any]:
        """What is attached and what runs, for a person."""
        return {
            self.engine.name: self.engine.version,
            "config_hash": self.engine.model["config_hash"],
            "groups": self.options.groups,
            "plans": {name: plan.plan_hash for name, plan in self._plans.running.items()},
            "recording": self._requests.counts,
            "running": len(self._requests.running),
            "steps": self._recording.steps,
            "tokens_run_again": self._requests.tokens_run_again,
        }

    def refuse_other_engine(self) -> None:
        """Raise ``EngineNotSupportedError`` if another engine of this process took the operator."""
        if not operator.connected(self.sites):
            raise EngineNotSupportedError(
                "moe_route: a later engine of this process took the operator over: run one engine with moe_route in a "
                "process"
            )

    # ---- following the steps of the engine

    def begin(
        self,
        name: str,
        arguments: Mapping[str, Any] | None,
        *,
        prompt: int,
        cached: int,
        ids: Sequence[int] | None = None,
    ) -> Request:
        """A request that runs for the first time.

        ``prompt``: its length in tokens. ``cached``: how many of them come from a cache. ``ids``: of its prompt, if
        they are kept here.
        """
        options = self.options
        plan, group, item = identity(arguments, options)
        code = options.groups.index(group) if group in options.groups else -1
        segment = self._recording.row(cached) if code >= 0 and self._requests.counts else -1
        # refused at admission where unknown; an error here would end the engine
        steered = -1 if plan == UNSTEERED or plan not in options.plan_names else options.plan_names.index(plan)
        request = self._requests.begin(
            name, prompt=prompt, group=code, segment=segment, plan=steered, item=item, first=cached
        )
        if self._returned is not None:
            self._returned.begin(name, arguments)
        if code < 0 and self._requests.counts:
            if not self._recording.ungrouped:
                logger.warning(
                    "moe_route: a request names no group, and is not counted: %s, one of %s",
                    self.how_to_group,
                    ", ".join(options.groups),
                )
            self._recording.ungrouped += 1
        if segment >= 0:
            request.ids = None if ids is None else list(ids)
            self._recording.begin(request)
        return request

    def laid_out(self, batch: Batch) -> None:
        """Bring the token table of a step over, in one copy."""
        self.refuse_other_engine()  # it would run on the tables of the other one
        if self._counts is not None:
            self._counts.forget()  # of a step that failed
        trace = self._recording.trace
        if trace is not None:
            trace.take()
        if self._returned is not None:
            self._returned.take()
        asked = self._returned is not None and self._returned.lay_out(batch)
        rows, tails = self._host.numpy(), None
        if self._pending is not None:
            tails = self._requests.tails(batch.names, batch.counts, batch.starts, batch.drafts)
        total = self._requests.fill(rows, *batch[:3], tails)
        if trace is not None:
            trace.lay_out(rows[:total], self._requests.group_capacity, *batch[:3])
        self._values.lay_out(rows[:total, 0], batch)
        if self._pending is not None and tails is not None:
            self._pending.lay_out(rows[:total], batch, tails)
        if self._requests.counts:
            self._requests.expect(rows[:total])
        steered = bool((rows[:total, 0] >= 0).any())
        used = total if steered or (self._requests.counts and (rows[:total, 1] >= 0).any()) else 0
        rows[used : self._dirty, :3] = -1
        most = max(used, self._dirty)
        if most:
            # from memory of its own: under async scheduling the copy of the step before may still be on its way
            step = upload(self._host[:most], self._tokens.device)
            self._tokens[:, :most] = step
            if steered:
                self._tokens[:, :most, 0] = self._plans.layer_rows[:, step[:, 0]]
        self._dirty = used
        self._recording.steps += self._requests.counts
        operator.set_work(self._work(steered, asked))

    def _work(self, steered: bool, asked: bool) -> operator.Work:
        """What the operator must do in the step that is laid out.

        ``steered``: whether a rule reaches a token of it. ``asked``: whether an answer will hold a token's experts.
        """
        if self._counts is None or asked or self._recording.trace is not None:
            return operator.Work.ROUTE
        if steered:
            return operator.Work.STEER
        return operator.Work.KEEP if self._requests.counts else operator.Work.NOTHING

    def after(self) -> None:
        """Count what the operator kept of the step that ran."""
        if self._counts is not None:
            self._counts.count(self._tokens[0])

    def dummy(self) -> None:
        """A run without requests counts nothing."""
        operator.set_work(operator.Work.ROUTE)
        if self._pending is not None:
            self._pending.lose()
        self._values.clear()
        for keeps in (self._recording.trace, self._returned):
            if keeps is not None:
                keeps.take()
        self._host[:, :3] = -1
        self._tokens[..., :3] = -1
        self._dirty = 0
