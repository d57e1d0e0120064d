"""What one worker holds: its routers, the running requests, the plans and the counts; and the verbs on them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_route import files
from moe_route.contract.tables import METRICS
from moe_route.identity import config_hash, library_versions
from moe_route.integrations.vllm import operator, runners
from moe_route.integrations.vllm.counting import StepCounts
from moe_route.integrations.vllm.options import (
    DEFAULT_PLAN,
    GROUP,
    ITEM,
    PLAN,
    UNSTEERED,
    Options,
    refuse_engine,
    refuse_recording,
)
from moe_route.integrations.vllm.plans import PlanTables
from moe_route.integrations.vllm.prefixes import Workers, steered_prefixes
from moe_route.integrations.vllm.requests import Request, RequestTable
from moe_route.integrations.vllm.sites import check, find_sites, hook
from moe_route.integrations.vllm.tracing import StepTrace
from moe_route.integrations.vllm.versions import EngineNotSupportedError, check_version
from moe_route.recording.metadata import add_fingerprints
from moe_route.recording.pooling import SequenceAverages, SequencePool
from moe_route.recording.recorder import DEFAULT_METRICS
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.recording.store import SequenceStore
from moe_route.recording.tables import TableSet, TableSums
from moe_route.recording.trace import Trace

__all__ = ["Session"]

_COUNTED = tuple(name for name in METRICS if name in (*DEFAULT_METRICS, "natural_counts"))
_GRAPH_ROWS = 256  # a CUDA graph may pad a step beyond the scheduler's limit


class Session:
    """Attached to one worker after its weights are loaded, before anything is compiled or captured."""

    def __init__(self, worker: Any, options: Options, vllm_version: str):
        check_version(vllm_version, any_version=options.any_version)
        self._worker, self._config, self.options, self._version = worker, worker.vllm_config, options, vllm_version
        refuse_engine(self._config)
        runner = worker.model_runner
        model = runner.get_model() if hasattr(runner, "get_model") else runner.model
        self.sites = find_sites(model, str(getattr(self._config.model_config.hf_config, "model_type", "")))
        for site in self.sites:
            check(site)
        scheduler = self._config.scheduler_config
        self._requests = RequestTable(len(options.groups), len(options.plan_names), scheduler.max_num_seqs)
        self._make_tables(scheduler.max_num_seqs, scheduler.max_num_batched_tokens + _GRAPH_ROWS)
        self._counts = StepCounts(self.sites) if all(site.device.type == "cpu" for site in self.sites) else None
        operator.connect(self.sites, self._counts)
        for index, site in enumerate(self.sites):
            hook(site, index)
        self._view = runners.view_of(runner)
        runners.follow(
            runner,
            self._view,
            before=self._before,
            laid_out=self._laid_out,
            after=self._after,
            dummy=self._dummy,
        )
        self._recorded = False
        self._forget()
        for name, path in {DEFAULT_PLAN: options.plan, **options.plans}.items():
            if path is not None:
                self.steer(path, name)
        if options.record:
            self.record()

    def _make_tables(self, most_requests: int, most_tokens: int) -> None:
        """Tables of the largest sizes that they can need: their addresses are part of captured graphs."""
        device = self.sites[0].device
        self._step = torch.full((most_tokens, 4), -1, dtype=torch.int32, device=device)
        self._step[:, 3] = 1
        self._tokens = self._step.repeat(len(self.sites), 1, 1)
        self._host = self._step.cpu()
        if device.type == "cuda":
            self._host = self._host.pin_memory()
        self._dirty = most_tokens  # rows of the device's table that may hold something
        groups = len(self.options.groups)
        self._tables = TableSet(self.sites, groups=groups, metrics=_COUNTED, entropy=True)
        self._tables.reserve(groups=groups, segments=most_requests)
        self._tables.fixed = True
        self._requests.group_capacity = self._tables.group_capacity
        self._requests.segment_capacity = self._tables.segment_capacity
        for site, table, tokens in zip(self.sites, self._tables.layers, self._tokens, strict=True):
            site.statistics, site.tokens = table, tokens
        self._plans = PlanTables(self.sites, self.options)
        traced = range(len(self.sites)) if self.options.trace is True else self.options.trace or ()
        self._trace = StepTrace(self.sites, traced, most_tokens, self.options.trace_limit) if traced else None

    # ---- verbs, called by name through collective_rpc

    def steer(self, plan: str | bytes | None, name: str = DEFAULT_PLAN) -> str | None:
        """Steer by a plan, a file's path or content, from the next step on; None ends it. Returns the plan's hash.

        ``name`` is the plan that requests choose by ``moe_route_plan``; those that choose none take "default".
        """
        self._refuse_other_engine()
        self._plans.check_name(name)
        compiled = None
        if plan is not None:
            compiled = self._plans.compiled(plan, self._config.model_config.model, self._config_hash())
        self._requests.plan_rows = self._plans.change(name, compiled)
        if compiled is None:
            return None
        self._used_plans.add(compiled.plan_hash)
        return compiled.plan_hash

    def prefixes(self) -> Workers:
        """What decides who may share a cached prefix."""
        return Workers(self._requests.counts, steered_prefixes(self._plans.running, self.options.groups))

    def record(self) -> None:
        """Begin a new recording. Requests that run already are not part of it."""
        self._refuse_other_engine()
        refuse_recording(self._config)
        self._forget()
        self._requests.counts = self._recorded = True

    def _forget(self) -> None:
        for table in self._tables.layers:
            table.zero_()
        self._requests.forget_segments()
        self._requests.counts = False
        self._requests.tokens_run_again = 0
        widest = max(site.num_experts for site in self.sites)
        self._pool = SequencePool(len(self.options.groups), len(self.sites), widest, _COUNTED, entropy=True)
        self._free = list(range(self._config.scheduler_config.max_num_seqs - 1, -1, -1))
        names, experts = [site.name for site in self.sites], [site.num_experts for site in self.sites]
        self._store = SequenceStore(names, experts) if self.options.sequences else None
        self._repeated = 0  # sequences whose item and group the store held already
        if self._trace is not None:
            self._trace.forget()
        self._used_plans = {plan.plan_hash for plan in self._plans.running.values()}
        self._fingerprint: str | None = None
        self._steps = self._cached = self._without_room = 0

    def pause(self) -> None:
        """Stop counting. What was counted is kept; ``statistics`` reads it, ``record`` forgets it."""
        self._requests.counts = False

    def statistics(self, path: str | None = None, idle: bool = False) -> bytes | str | None:
        """Write what was counted to ``path``, or return the content of such a file; None on ranks but the first.

        vLLM tells a worker with the next step which requests have ended. ``idle``: the caller knows that none is
        running, so all are taken as ended. Otherwise the tokens of those not known to have ended are in the sums over
        tokens only, and ``metadata["running_sequences"]`` says how many they are.

        Raises ``RecordingError`` if nothing was recorded, a layer was never reached, or the tables were too small.
        """
        self._refuse_other_engine()
        if not self._recorded:
            raise RecordingError(
                'nothing is recorded: start the engine with "moe_route": {"record": true}, or call moe_route_record'
            )
        if idle:
            self._end(list(self._requests.running))
        self._refuse_gaps()
        if self._worker.rank % self._config.parallel_config.tensor_parallel_size:
            return None
        made = self._statistics()
        made.verify()
        return _saved(made, path)

    def trace(self, path: str | None = None, idle: bool = False) -> bytes | str | None:
        """Write the trace to ``path``, or return the content of such a file; None on ranks but the first.

        ``idle`` as for ``statistics``. Raises ``RecordingError`` if the engine keeps none.
        """
        self._refuse_other_engine()
        if self._trace is None:
            raise RecordingError('no trace is kept: start the engine with "moe_route": {"trace": true}, or [layers]')
        if idle:
            self._end(list(self._requests.running))
        self._refuse_gaps()
        if self._worker.rank % self._config.parallel_config.tensor_parallel_size:
            return None
        return _saved(self._trace.snapshot(self.options.groups, self._token_ids), path)

    def _refuse_gaps(self) -> None:
        silent = [site.name for site in self.sites if not site.reached]
        if silent and self._steps:
            raise RecordingError(
                f"{len(silent)} layers were never reached ({silent[0]}, ...): the engine runs a graph compiled without "
                "moe_route; delete vLLM's compile cache, or start with --enforce-eager"
            )
        if self._without_room:
            raise RecordingError(
                f"{self._without_room} requests found no row in the tables, which have room for --max-num-seqs of them"
            )

    def _statistics(self) -> RoutingStatistics:
        sums = self._as_transformers(self._tables.read_groups(len(self.options.groups)))
        metrics = {name: table for name, table in sums.metrics.items() if name != "natural_counts" or self._used_plans}
        return RoutingStatistics(
            groups=self.options.groups,
            layers=[site.name for site in self.sites],
            num_experts=[site.num_experts for site in self.sites],
            top_k=[site.top_k for site in self.sites],
            scalars=sums.scalars,
            metrics=metrics,
            sequence_scalars=self._pool.scalars,
            sequence_sums=self._pool.sums,
            entropy=True,
            metadata=self._metadata(),
            store=None if self._store is None else self._store.snapshot(),
        )

    def _metadata(self) -> dict[str, Any]:
        model = self._config.model_config
        counted = sum(request.segment >= 0 for request in self._requests.running.values())
        return {
            "model": {"name": model.model, "class": model.architecture, "config_hash": self._config_hash()},
            "versions": {**library_versions(), "vllm": self._version},
            "engines": ["vllm"],
            "experts": ["vllm"],
            "fingerprint": self._fingerprint or add_fingerprints(None, None),
            "masked": ["padding"],
            "plans": sorted(self._used_plans),
            "calls": self._steps,
            "captured_calls": 0,
            "abandoned_sequences": 0,
            "running_sequences": counted,
            "cached_tokens": self._cached,
            "tokens_run_again": self._requests.tokens_run_again,
            **({} if self._store is None else {"repeated_items": self._repeated}),
        }

    def report(self) -> dict[str, Any]:
        """What was found and what runs, for a person."""
        return {
            "vllm": self._version,
            "runner": type(self._worker.model_runner).__module__,
            "layers": [
                (site.name, type(site.runner.router).__name__, site.num_experts, site.top_k, site.reached)
                for site in self.sites
            ],
            "groups": self.options.groups,
            "plans": {name: plan.plan_hash for name, plan in self._plans.running.items()},
            "recording": self._requests.counts,
            "running": len(self._requests.running),
            "steps": self._steps,
            "tokens_run_again": self._requests.tokens_run_again,
        }

    def _refuse_other_engine(self) -> None:
        if not operator.connected(self.sites):
            raise EngineNotSupportedError(
                "moe_route: a later engine of this process took the operator over: run one engine with moe_route in a "
                "process"
            )

    def _config_hash(self) -> str:
        """The hash that transformers' model of this class would have."""
        model = self._config.model_config
        shell = type(model.architecture, (torch.nn.Module,), {})()
        shell.config = model.hf_config
        return config_hash(shell)

    # ---- following the steps of the engine

    def _before(self, scheduled: Any) -> None:
        """Requests that ended and that are new, before the runner changes its own."""
        self._end(scheduled.finished_req_ids)
        for name in getattr(scheduled, "preempted_req_ids", None) or ():
            self._keep_tokens(self._requests.running.get(name))  # the V2 runner forgets them
        for new in scheduled.scheduled_new_reqs:
            if new.req_id not in self._requests.running:  # the V2 runner gets a preempted request anew
                self._begin(new)

    def _begin(self, new: Any) -> None:
        options, given = self.options, (new.sampling_params and new.sampling_params.extra_args) or {}
        default = options.groups[0] if len(options.groups) == 1 else None
        group, plan = given.get(GROUP) or default, given.get(PLAN) or DEFAULT_PLAN
        code = options.groups.index(group) if group in options.groups else -1
        segment = self._segment() if code >= 0 and self._requests.counts else -1
        # refused at admission where unknown; an error here would end the engine
        steered = -1 if plan == UNSTEERED or plan not in options.plan_names else options.plan_names.index(plan)
        prompt = len(new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds)
        cached = new.num_computed_tokens
        self._cached += cached if segment >= 0 else 0
        request = self._requests.begin(
            new.req_id, prompt=prompt, group=code, segment=segment, plan=steered, item=given.get(ITEM), first=cached
        )
        if segment >= 0 and self._trace is not None:
            self._trace.begin(request)

    def _segment(self) -> int:
        if not self._free:
            self._without_room += 1  # `statistics` refuses: raising here would end the engine
            return -1
        return self._free.pop()

    def _laid_out(self, batch: runners.Batch) -> None:
        """Bring the token table of a step over, in one copy."""
        self._refuse_other_engine()  # it would run on the tables of the other one
        if self._counts is not None:
            self._counts.forget()  # of a step that failed
        if self._trace is not None:
            self._trace.take()
        total = self._requests.fill(self._host.numpy(), *batch)
        if self._trace is not None:
            self._trace.lay_out(self._host.numpy()[:total], self._requests.group_capacity, *batch)
        self._host[total : self._dirty, :3] = -1
        most = max(total, self._dirty)
        step = self._step[:most]
        step.copy_(self._host[:most], non_blocking=True)
        self._tokens[:, :most] = step
        if self._plans.running:
            self._tokens[:, :most, 0] = self._plans.layer_rows[:, step[:, 0]]
        self._dirty = total
        self._steps += self._requests.counts
        operator.set_work(self._work(bool((self._host[:total, 0] >= 0).any())))

    def _work(self, steered: bool) -> operator.Work:
        """What the operator must do in the step that is laid out; ``steered``: whether a rule reaches a token of it."""
        if self._counts is None or self._trace is not None:
            return operator.Work.ROUTE
        if steered:
            return operator.Work.STEER
        return operator.Work.KEEP if self._requests.counts else operator.Work.NOTHING

    def _after(self) -> None:
        """Count what the operator kept of the step that ran."""
        if self._counts is not None:
            self._counts.count(self._tokens[0])

    def _dummy(self) -> None:
        """A run without requests counts nothing."""
        operator.set_work(operator.Work.ROUTE)
        if self._trace is not None:
            self._trace.take()
        self._host[:, :3] = -1
        self._tokens[..., :3] = -1
        self._dirty = 0

    def _keep_tokens(self, request: Request | None) -> None:
        if request is not None and request.segment >= 0:
            request.tokens = self._token_ids(request)

    def _token_ids(self, request: Request) -> np.ndarray | None:
        """Ids of the tokens that a request has routed, from position 0."""
        known = request.name in self._requests.running
        ids = self._view.token_ids(request.name, self._requests.routed(request)) if known else None
        return request.tokens if ids is None else ids

    def _end(self, names: Iterable[str]) -> None:
        """Add requests that ended to the averages over sequences."""
        known = [self._requests.running[name] for name in names if name in self._requests.running]
        for request in known:
            self._keep_tokens(request)
            if self._trace is not None:
                self._trace.end(request)
        lengths = {request.name: self._requests.routed(request) for request in known}
        ended = [request for request in self._requests.end([r.name for r in known]) if request.segment >= 0]
        if not ended:
            return
        sums = self._as_transformers(self._tables.take_segments([request.segment for request in ended]))
        averages = self._pool.add(sums, np.array([request.group for request in ended]))
        self._keep(ended, averages)
        self._free += [request.segment for request in ended]
        for request in ended:
            self._fingerprint = add_fingerprints(self._fingerprint, self._identity(request, lengths[request.name]))

    def _keep(self, ended: Sequence[Request], averages: SequenceAverages) -> None:
        """Add sequences to the store. Raising would end the engine, so a repeated item is kept without its id."""
        if self._store is None:
            return
        seen = np.flatnonzero(averages.tokens.any(axis=1))  # a request that was aborted first may have no token
        keys: dict[tuple[str | int, str], None] = {}
        for row in seen.tolist():
            item, group = ended[row].item, self.options.groups[ended[row].group]
            repeated = item is not None and ((item, group) in keys or (item, group) in self._store)
            self._repeated += repeated
            keys[self._store.next_unnamed() if item is None or repeated else item, group] = None
        self._store.append(list(keys), averages.stored(seen))

    def _identity(self, request: Request, length: int) -> str:
        """The fingerprint that a recording in transformers has for this sequence."""
        group = self.options.groups[request.group]
        made = hashlib.blake2b(files.canonical_json([request.item, [group]]).encode(), digest_size=16)
        routed = request.tokens
        made.update(
            (np.array([length - request.first], np.int32) if routed is None else routed[request.first :]).tobytes()
        )
        return made.hexdigest()

    def _as_transformers(self, sums: TableSums) -> TableSums:
        """Multiply the sums of weights by the factor that vLLM applies to the output of a layer instead."""
        scales: Sequence[float] = [site.output_scale for site in self.sites]
        if any(scale != 1.0 for scale in scales):
            table = sums.metrics["weight"]
            table[...] = np.rint(table * np.asarray(scales)[:, None]).astype(np.int64)
        return sums


def _saved(made: RoutingStatistics | Trace, path: str | None) -> str | bytes:
    if path is not None:
        made.save(path)
        return path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.safetensors"
        made.save(file)
        return file.read_bytes()
