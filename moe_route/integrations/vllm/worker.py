"""What one worker holds: its routers, the running requests, the plans and the recording; and the verbs on them."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from moe_route.base.devices import upload
from moe_route.base.identity import config_hash
from moe_route.integrations.vllm import operator, requests
from moe_route.integrations.vllm.answers import StagePart, content_of, replica_path, saved
from moe_route.integrations.vllm.counts import ABORTED, FIELD, Known, PendingTokens, StepCounts
from moe_route.integrations.vllm.options import (
    DEFAULT_PLAN,
    GROUP,
    UNSTEERED,
    EngineNotSupportedError,
    Options,
    check_version,
    identity,
    refuse_engine,
    refuse_recording,
    runs_ahead,
)
from moe_route.integrations.vllm.plans import PlanTables, TokenValues, Workers, steered_prefixes
from moe_route.integrations.vllm.recording import Recording
from moe_route.integrations.vllm.requests import RequestTable
from moe_route.integrations.vllm.returned import ReturnedExperts, Routed
from moe_route.integrations.vllm.sites import Site, check, find_sites, find_stage, hook
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.recording.trace import Trace
from moe_route.steering.compile import CompiledPlan

logger = logging.getLogger(__name__)
_GRAPH_ROWS = 256  # a CUDA graph may pad a step beyond the scheduler's limit


class Session:
    """Attached to one worker after its weights are loaded, before anything is compiled or captured."""

    def __init__(self, worker: Any, options: Options, vllm_version: str):
        check_version(vllm_version, any_version=options.any_version)
        self._worker, self._config, self.options, self._version = worker, worker.vllm_config, options, vllm_version
        refuse_engine(self._config)
        runner = worker.model_runner
        model = runner.get_model() if hasattr(runner, "get_model") else runner.model
        kind = str(getattr(self._config.model_config.hf_config, "model_type", ""))
        stages = self._config.parallel_config.pipeline_parallel_size
        self.sites, stage = find_stage(lambda: _checked(find_sites(model, kind)), stages)
        scheduler = self._config.scheduler_config
        most_requests, most_tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens + _GRAPH_ROWS
        self._requests = RequestTable(len(options.groups), len(options.plan_names), most_requests)
        self._view = requests.view_of(runner)
        self._recording = Recording(
            self.sites,
            options,
            self._requests,
            self._view.token_ids,
            stage,
            most_requests=most_requests,
            most_tokens=most_tokens,
        )
        self._returned = ReturnedExperts(self.sites, most_tokens) if options.routed_experts else None
        captured = worker.device.type != "cpu" and not self._config.model_config.enforce_eager
        self._plans = PlanTables(self.sites, options, stage, worker.device, captured=captured)
        self._values = TokenValues(self._plans, self._requests, worker.device, self._recording.fail)
        self._make_token_tables(most_tokens, worker.device)
        self._counts = StepCounts(self.sites) if {site.device.type for site in self.sites} == {"cpu"} else None
        # what ``take_back`` gives back
        self._former: tuple[str, CompiledPlan | None, set[str], list[dict[str, str | None]]] | None = None
        self._pending = self._pending_tokens(most_requests, worker.device)
        operator.connect(self.sites, self._counts, self._pending)
        for index, site in enumerate(self.sites):
            hook(site, index)
        requests.follow(
            runner,
            self._view,
            before=self._before,
            laid_out=self._laid_out,
            after=self._after,
            dummy=self._dummy,
        )
        for name, path in {DEFAULT_PLAN: options.plan, **options.plans}.items():
            if path is not None:
                self.steer(path, name)
        if options.record:
            self.record()
        own = self._config.parallel_config.distributed_executor_backend == "mp"
        if options.save is not None and own and threading.current_thread() is threading.main_thread():
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
            ):  # the core ends them, when they have told
                signal.signal(number, signal.SIG_IGN)

    def _pending_tokens(self, most_requests: int, device: torch.device) -> PendingTokens | None:
        """Room for the tokens of a step that are counted after it, where there are such."""
        speculative = self._config.speculative_config
        self._requests.ahead = runs_ahead(self._config)
        if speculative is None and not self._requests.ahead:
            return None
        each = 1 if speculative is None else speculative.num_speculative_tokens
        return PendingTokens(
            self.sites, self._requests, self._plans.layer_rows, self._values.numbers, device, most_requests * each
        )

    def _make_token_tables(self, most_tokens: int, device: torch.device) -> None:
        """Token tables of the largest step: their addresses are part of captured graphs."""
        self._step = torch.full((most_tokens, 4), -1, dtype=torch.int32, device=device)
        self._step[:, 3] = 1
        self._tokens = self._step.repeat(len(self.sites), 1, 1)
        self._host = self._step.cpu()
        self._dirty = most_tokens  # rows of the device's table that may hold something
        for site, tokens in zip(self.sites, self._tokens, strict=True):
            site.tokens, site.numbers = tokens, self._values.numbers

    # ---- verbs, called by name through collective_rpc

    def steer(
        self, plan: str | bytes | None, name: str = DEFAULT_PLAN, change: Mapping[str, str] | None = None
    ) -> str | None:
        """Steer by a plan, a file's path or content, from the next step on; None ends it. Returns the plan's hash.

        ``name`` is the plan that requests choose by ``moe_route_plan``; those that choose none take "default".
        ``change``: what the metadata says of it, if a client asked for it: client and time.
        """
        self._refuse_other_engine()
        self._former = None
        self._plans.check_name(name)
        compiled = None
        if plan is not None:
            compiled = self._plans.compiled(plan, self._config.model_config.model, self._config_hash())
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
        self._refuse_other_engine()
        refuse_recording(self._config)
        self._recording.start(plan.plan_hash for plan in self._plans.running.values())

    def pause(self) -> None:
        """Stop counting. What was counted is kept; ``statistics`` reads it, ``record`` forgets it."""
        self._requests.counts = False

    def known(self, texts: Mapping[str, Known], ended: Collection[str] = (), aborted: Collection[str] = ()) -> None:
        """What the engine core knows of its requests; it calls this before every other verb.

        ``ended``: those that ended since the latest step, which vLLM tells with the next one. ``aborted``: of these,
        those that were given up before their text had ended.
        """
        if self._pending is not None:
            rejected = self._pending.resolve(texts)
            if self._recording.trace is not None:
                self._recording.trace.drop(rejected)
        self._recording.end(ended, aborted)

    def statistics(
        self, path: str | None = None, *, partial: bool = False, sequences: bool = True
    ) -> bytes | str | StagePart | None:
        """Write what was counted to ``path``, or return the content of such a file; None on ranks but the first.

        With several stages of pipeline parallelism, the first rank of each hands its layers over, and the engine core
        writes the file of all. With several replicas of data parallelism, each writes a file of its own, whose name
        ends with the replica's number.

        Requests that run are in the sums over tokens only, and ``metadata["running_sequences"]`` says how many they
        are. ``sequences``: with those that are kept.

        Raises ``RecordingError`` if nothing was recorded, and unless ``partial`` if something is missing: a layer did
        not count every token that ran, or the tables were too small.
        """
        self._refuse_other_engine()
        if not self._recording.started:
            raise RecordingError(
                'nothing is recorded: start the engine with "moe_route": {"record": true}, or call moe_route_record'
            )
        return self._answer(path, lambda: self._statistics(partial, sequences), partial)

    def _statistics(self, partial: bool, sequences: bool) -> RoutingStatistics:
        model = self._config.model_config
        entry = {"name": model.model, "class": model.architecture, "config_hash": self._config_hash()}
        made = self._recording.statistics(entry, self._version, sequences=sequences)
        made.verify(partial=partial)
        return made

    def trace(self, path: str | None = None) -> bytes | str | StagePart | None:
        """Write the trace to ``path``, or return the content of such a file; None on ranks but the first.

        Stages and replicas as for ``statistics``. Raises ``RecordingError`` if the engine keeps none.
        """
        self._refuse_other_engine()
        return self._answer(path, self._recording.traced)

    def _answer(
        self, path: str | None, read: Callable[[], RoutingStatistics | Trace | None], partial: bool = False
    ) -> bytes | str | StagePart | None:
        """What ``read`` makes, on the first rank of a stage that has routers."""
        if not partial:
            self._recording.refuse_gaps()
        parallel = self._config.parallel_config
        made = read() if self.sites and not self._worker.rank % parallel.tensor_parallel_size else None
        if made is None:
            return None
        if path is not None and parallel.data_parallel_size > 1:
            path = replica_path(path, parallel.data_parallel_rank)
        if parallel.pipeline_parallel_size > 1:
            return StagePart(type(made), content_of(made), path)
        return saved(made, path)

    def routed(self, wanted: Mapping[str, tuple[int, int]]) -> dict[str, Routed] | None:
        """The experts of requests that asked and end, from a position to another; None on ranks but the first."""
        first = not self._worker.rank % self._config.parallel_config.tensor_parallel_size
        return self._returned.routed(wanted) if self._returned is not None and self.sites and first else None

    def report(self) -> dict[str, Any]:
        """What was found and what runs, for a person."""
        return {
            "vllm": self._version,
            "config_hash": self._config_hash(),
            "runner": type(self._worker.model_runner).__module__,
            "layers": [
                (site.name, type(site.runner.router).__name__, site.num_experts, site.top_k, site.reached)
                for site in self.sites
            ],
            "groups": self.options.groups,
            "plans": {name: plan.plan_hash for name, plan in self._plans.running.items()},
            "recording": self._requests.counts,
            "running": len(self._requests.running),
            "steps": self._recording.steps,
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
        if self._returned is not None:
            self._returned.end(scheduled.finished_req_ids)
        self.known(getattr(scheduled, FIELD, {}), scheduled.finished_req_ids, getattr(scheduled, ABORTED, ()))
        for name in getattr(scheduled, "preempted_req_ids", None) or ():
            self._recording.keep_tokens(self._requests.running.get(name))  # the V2 runner forgets them
        for new in scheduled.scheduled_new_reqs:
            if new.req_id not in self._requests.running:  # the V2 runner gets a preempted request anew
                self._begin(new)

    def _begin(self, new: Any) -> None:
        options = self.options
        plan, group, item = identity(new.sampling_params, options)
        code = options.groups.index(group) if group in options.groups else -1
        cached = new.num_computed_tokens
        segment = self._recording.row(cached) if code >= 0 and self._requests.counts else -1
        # refused at admission where unknown; an error here would end the engine
        steered = -1 if plan == UNSTEERED or plan not in options.plan_names else options.plan_names.index(plan)
        prompt = len(new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds)
        request = self._requests.begin(
            new.req_id, prompt=prompt, group=code, segment=segment, plan=steered, item=item, first=cached
        )
        if self._returned is not None:
            self._returned.begin(new.req_id, getattr(new.sampling_params, "extra_args", None))
        if code < 0 and self._requests.counts:
            if not self._recording.ungrouped:
                logger.warning(
                    "moe_route: a request names no group, and is not counted: name one of %s by %s in vllm_xargs of "
                    "its body, or in SamplingParams.extra_args",
                    ", ".join(options.groups),
                    GROUP,
                )
            self._recording.ungrouped += 1
        if segment >= 0:
            if self._requests.ahead and new.prompt_token_ids is not None:
                request.ids = list(new.prompt_token_ids)
            self._recording.stop_strings += self._config.speculative_config is not None and bool(
                getattr(new.sampling_params, "stop", None)
            )
            self._recording.begin(request)

    def _laid_out(self, batch: requests.Batch) -> None:
        """Bring the token table of a step over, in one copy."""
        self._refuse_other_engine()  # it would run on the tables of the other one
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
        self._host[total : self._dirty, :3] = -1
        most = max(total, self._dirty)
        step = self._step[:most]
        # from memory of its own: under async scheduling the copy of the step before may still be on its way
        step.copy_(upload(self._host[:most], step.device))
        self._tokens[:, :most] = step
        if self._plans.running:
            self._tokens[:, :most, 0] = self._plans.layer_rows[:, step[:, 0]]
        self._dirty = total
        self._recording.steps += self._requests.counts
        operator.set_work(self._work(bool((self._host[:total, 0] >= 0).any()), asked))

    def _work(self, steered: bool, asked: bool) -> operator.Work:
        """What the operator must do in the step that is laid out.

        ``steered``: whether a rule reaches a token of it. ``asked``: whether an answer will hold a token's experts.
        """
        if self._counts is None or asked or self._recording.trace is not None:
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
        if self._pending is not None:
            self._pending.lose()
        self._values.clear()
        for keeps in (self._recording.trace, self._returned):
            if keeps is not None:
                keeps.take()
        self._host[:, :3] = -1
        self._tokens[..., :3] = -1
        self._dirty = 0


def _checked(sites: list[Site]) -> list[Site]:
    for site in sites:
        check(site)
    return sites
