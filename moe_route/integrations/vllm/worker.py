"""What one worker of vLLM holds, and the verbs on it, which are called by name through ``collective_rpc``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_route.base.identity import config_hash
from moe_route.integrations.serving.answers import StagePart, content_of, replica_path, saved
from moe_route.integrations.serving.options import GROUP, Options
from moe_route.integrations.serving.recording import Engine
from moe_route.integrations.serving.returned import Routed
from moe_route.integrations.serving.session import Session
from moe_route.integrations.serving.sites import Site
from moe_route.integrations.vllm import runners
from moe_route.integrations.vllm.options import arguments_of, check_version, refuse_engine, refuse_recording, runs_ahead
from moe_route.integrations.vllm.sites import check, find_sites, find_stage, hook
from moe_route.integrations.vllm.texts import ABORTED, FIELD
from moe_route.recording.statistics import RoutingStatistics
from moe_route.recording.trace import Trace


class WorkerSession(Session):
    """The session of one worker of vLLM."""

    how_to_group = f"give {GROUP} in vllm_xargs of its body, or in SamplingParams.extra_args"

    def __init__(self, worker: Any, options: Options, version: str):
        check_version(version, any_version=options.any_version)
        self._worker, self._config = worker, worker.vllm_config
        refuse_engine(self._config)
        runner, model = worker.model_runner, self._config.model_config
        module = runner.get_model() if hasattr(runner, "get_model") else runner.model
        kind = str(getattr(model.hf_config, "model_type", ""))
        stages = self._config.parallel_config.pipeline_parallel_size
        sites, stage = find_stage(lambda: _checked(find_sites(module, kind)), stages)
        scheduler, speculative = self._config.scheduler_config, self._config.speculative_config
        ahead = runs_ahead(self._config)
        each = 1 if speculative is None else speculative.num_speculative_tokens
        view = runners.view_of(runner)
        entry = {"name": model.model, "class": model.architecture, "config_hash": _config_hash(model)}
        super().__init__(
            Engine("vllm", version, entry),
            sites,
            stage,
            options,
            view.token_ids,
            device=worker.device,
            graphs_off=None if worker.device.type == "cpu" or model.enforce_eager else "--enforce-eager",
            most_requests=scheduler.max_num_seqs,
            most_tokens=scheduler.max_num_batched_tokens,
            pending=scheduler.max_num_seqs * each if ahead or speculative is not None else None,
            ahead=ahead,
        )
        for index, site in enumerate(self.sites):
            hook(site, index, eager=bool(model.enforce_eager))
        runners.follow(runner, view, before=self._before, laid_out=self.laid_out, after=self.after, dummy=self.dummy)
        self.begin_options()
        own = self._config.parallel_config.distributed_executor_backend == "mp"
        if options.save is not None and own and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # the core ends them, when they have told
                signal.signal(number, signal.SIG_IGN)

    def record(self) -> None:
        """Begin a new recording. Requests that run already are not part of it."""
        refuse_recording(self._config)
        super().record()

    def statistics(
        self, path: str | None = None, *, partial: bool = False, sequences: bool = True
    ) -> bytes | str | StagePart | None:
        """Write what ``counted`` gives to ``path``, or return the content of such a file; None on ranks but the first.

        With several stages of pipeline parallelism, the first rank of each hands its layers over, and the engine core
        writes the file of all. With several replicas of data parallelism, each writes a file of its own, whose name
        ends with the replica's number.
        """
        self.refuse_unrecorded(partial=partial)
        return self._answer(path, lambda: self.counted(partial=partial, sequences=sequences))

    def trace(self, path: str | None = None) -> bytes | str | StagePart | None:
        """Write the trace to ``path``, or return the content of such a file; None on ranks but the first.

        Stages and replicas as for ``statistics``. Raises ``RecordingError`` if the engine keeps none.
        """
        self.refuse_other_engine()
        self._recording.refuse_gaps()
        return self._answer(path, self._recording.traced)

    def _answer(
        self, path: str | None, read: Callable[[], RoutingStatistics | Trace | None]
    ) -> bytes | str | StagePart | None:
        """What ``read`` makes, on the first rank of a stage that has routers."""
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
        """What is attached and what runs, for a person."""
        layers = [(s.name, type(s.module.router).__name__, s.num_experts, s.top_k, s.reached) for s in self.sites]
        return {**super().report(), "runner": type(self._worker.model_runner).__module__, "layers": layers}

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
        ids = new.prompt_token_ids
        request = self.begin(
            new.req_id,
            arguments_of(new.sampling_params),
            prompt=len(ids if ids is not None else new.prompt_embeds),
            cached=new.num_computed_tokens,
            ids=ids if self._requests.ahead else None,
        )
        if request.segment >= 0:
            self._recording.stop_strings += self._config.speculative_config is not None and bool(
                getattr(new.sampling_params, "stop", None)
            )


def _config_hash(model: Any) -> str:
    """The hash that transformers' model of this class would have."""
    shell = type(model.architecture, (torch.nn.Module,), {})()
    shell.config = model.hf_config
    return config_hash(shell)


def _checked(sites: list[Site]) -> list[Site]:
    for site in sites:
        check(site)
    return sites
