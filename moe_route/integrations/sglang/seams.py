"""The functions of SGLang that are hooked, and what they tell the session of a scheduler's process.

The choice is taken before ``_post_process_topk_ids``: after the scores, before SGLang's capture of routed experts,
before logical ids become physical ones, and before the kernel.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from moe_route.base.identity import config_hash
from moe_route.integrations.serving.options import (
    GROUP,
    EngineNotSupportedError,
    Options,
    identity,
    request_error,
)
from moe_route.integrations.serving.plans import PlannedItems, marked_salt, salt_of
from moe_route.integrations.serving.recording import Engine
from moe_route.integrations.serving.requests import Batch
from moe_route.integrations.serving.session import Session
from moe_route.integrations.serving.sites import Stage
from moe_route.integrations.sglang.options import SEAMS, arguments_of, check_version, options_of, refuse_engine
from moe_route.integrations.sglang.sites import check, find_sites
from moe_route.recording.trace import Trace
from moe_route.steering.cell import LayerShape

VERBS = ("record", "pause", "steer", "statistics", "trace")
_session: RunnerSession | None = None  # of the one engine that this process serves
_items: PlannedItems | None = None  # what this process knows of plans, where it is a front end
logger = logging.getLogger(__name__)


class RunnerSession(Session):
    """The session of one process that runs a model."""

    how_to_group = f"give {GROUP} in custom_params of its sampling parameters"

    def __init__(self, runner: Any, options: Options, version: str, runtime: Any):
        """``runtime``: see ``refuse_engine``."""
        check_version(version, any_version=options.any_version)
        refuse_engine(runtime)
        model = runner.model_config
        sites = find_sites(runner.model, str(getattr(model.hf_config, "model_type", "")))
        for site in sites:
            check(site)
        schedule = runtime.get_schedule()
        most = schedule.chunked_prefill_size or -1
        prompt = most if most > 0 else max(schedule.max_prefill_tokens, model.context_len)
        device = sites[0].device
        graphs = device.type != "cpu" and not runtime.get_exec().graph.disable_cuda_graph
        shell = type(runner.model).__name__
        named = type(shell, (torch.nn.Module,), {})()
        named.config = model.hf_config
        super().__init__(
            Engine("sglang", version, {"name": model.model_path, "class": shell, "config_hash": config_hash(named)}),
            sites,
            Stage(tuple(LayerShape(site.num_experts, site.top_k) for site in sites), 0, len(sites)),
            options,
            self._ids_of,
            device=device,
            graphs_off="--disable-cuda-graph" if graphs else None,
            most_requests=runner.max_running_requests,
            most_tokens=prompt + runner.max_running_requests,
        )
        self._of_scheduler: dict[str, Any] = {}  # SGLang's requests, by name
        self._epoch, self._first = 0, runtime.get_parallel().tp_rank == 0
        for index, site in enumerate(sites):
            site.module.topk_config.moe_route_site = index
        self.begin_options()

    def _ids_of(self, name: str, end: int) -> np.ndarray | None:
        request = self._of_scheduler.get(name)
        if request is None:
            return None
        return np.array([*request.origin_input_ids, *request.output_ids][:end], np.int32)

    # ---- requests

    def prepare(self, request: Any) -> None:
        """Let a request share cached prefixes with those that are steered alike, and keep it from them if it counts."""
        arguments = arguments_of(request.sampling_params)
        plan, group, item = identity(arguments, self.options)
        workers = self.prefixes()
        steered = workers.steered.get((plan, group))
        salt = salt_of(steered, len(request.origin_input_ids), item, self._epoch)
        if self.options.count_cached and workers.counts and group is not None:
            salt += f":{request.rid}"  # routes its whole prompt
        own = vars(request).setdefault("moe_route_own_key", request.extra_key)
        request.extra_key = marked_salt(own, salt)

    def running(self, requests: Collection[Any], live: Callable[[], Collection[Any]]) -> None:
        """These requests are about to run. ``live``: all of the scheduler, which others may have left unseen."""
        new = [request for request in requests if request.rid not in self._requests.running]
        if not new:
            return
        self.left(live())
        for request in new:
            self._of_scheduler[request.rid] = request
            self.begin(
                request.rid,
                arguments_of(request.sampling_params),
                prompt=len(request.origin_input_ids),
                cached=request.prefix_len,
            )

    def left(self, live: Collection[Any]) -> None:
        """End requests that are no longer among those of the scheduler: they were given up while they waited."""
        names = {request.rid for request in live}
        self.ended([one for name, one in self._of_scheduler.items() if name not in names])

    def ended(self, requests: Collection[Any]) -> None:
        """These requests ended; those whose text had not are aborted."""
        names = [request.rid for request in requests]
        self.known({}, names, {one.rid for one in requests if not one.finished() or _aborted(one)})
        for name in names:
            self._of_scheduler.pop(name, None)

    def step(self, batch: Any) -> None:
        """Lay out a ``ForwardBatch``, by its values on the host."""
        if not batch.rids:
            self.dummy()
            return
        number = len(batch.rids)
        if batch.forward_mode.is_decode():
            starts = np.asarray(batch.seq_lens_cpu[:number], np.int64) - 1
            counts = np.ones(number, np.int64)
        else:
            starts = np.asarray(batch.extend_prefix_lens_cpu[:number], np.int64)
            counts = np.asarray(batch.extend_seq_lens_cpu[:number], np.int64)
        self.laid_out(Batch(batch.rids, counts, starts, batch.input_ids[: int(counts.sum())]))

    # ---- verbs

    def changed(self, scheduler: Any) -> None:
        """Plans or the recording changed: blocks that running requests fill from now on are shared with none."""
        self._epoch += bool(self._requests.running)
        for request in scheduler.waiting_queue:
            if request.rid not in self._requests.running:
                self.prepare(request)

    def verb(self, scheduler: Any, name: str, path: str | None, given: Mapping[str, Any]) -> None:
        """Call a verb; what it reads is written to ``path`` by the first rank."""
        self.left(_live(scheduler))
        if name in ("statistics", "trace"):
            made = self.counted(**given) if name == "statistics" else self._traced()
            if self._first and path is not None:
                made.save(path)
            return
        getattr(self, name)(**given)
        self.changed(scheduler)

    def _traced(self) -> Trace:
        self.refuse_unrecorded()
        made = self._recording.traced()
        assert made is not None  # there is one stage
        return made


def _aborted(request: Any) -> bool:
    return type(request.finished_reason).__name__ == "FINISH_ABORT"


def _live(scheduler: Any, *batches: Any) -> list[Any]:
    chunked = [] if scheduler.chunked_req is None else [scheduler.chunked_req]
    of_batches = [request for batch in batches for request in batch.reqs]
    return [*scheduler.collect_inflight_reqs(), *scheduler.waiting_queue, *chunked, *of_batches]


def planned_items() -> PlannedItems | None:
    """What this process, as a front end, knows of its plans; None where moe-route is off."""
    global _items
    options = options_of()
    if _items is None and options is not None:
        _items = PlannedItems(options)
    return _items


# ---- hooks


def _choose(*args: Any, **given: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before ``_post_process_topk_ids``: steer and count in place."""
    bound = dict(zip(SEAMS["sglang.srt.layers.moe.topk._post_process_topk_ids"], args, strict=False)) | given
    index = getattr(bound["topk_config"], "moe_route_site", None)
    if index is None:
        return None
    ids, weights = bound["topk_ids"], bound["topk_weights"]
    torch.ops.moe_route_serving.reroute(bound["router_logits"], weights, ids, index)
    return args, {**given, "padded_rows_masked": False}  # no slot is empty now: SGLang masks padded rows anew


def _precomputed(*args: Any, **given: Any) -> None:
    raise EngineNotSupportedError(
        f"moe_route: layer {given.get('layer_id', '')} chooses its experts in a kernel of its gate, before anything "
        "can be counted or steered: this model is not known here; use mr.attach in transformers"
    )


def _attach(runner: Any, *args: Any, **given: Any) -> None:
    """Before graphs are captured: the weights are loaded, and the sizes are known."""
    global _session
    options = options_of()
    if options is None or runner.is_draft_worker:
        return
    import sglang
    from sglang.srt import runtime_context

    _session = RunnerSession(runner, options, sglang.__version__, runtime_context)
    logger.info("moe_route: %d MoE layers, groups %s", len(_session.sites), ", ".join(options.groups))


def _forward(natural: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **given: Any) -> Any:
    if _session is None or runner.is_draft_worker:
        return natural(runner, forward_batch, *args, **given)
    _session.step(forward_batch)
    answer = natural(runner, forward_batch, *args, **given)
    _session.after()
    return answer


def _add_verbs(result: Any, scheduler: Any, *args: Any, **given: Any) -> None:
    """After a scheduler has its model: SGLang calls its methods by name."""
    if _session is None:
        return

    def verb(name: str) -> Callable[..., None]:
        def call(path: str | None = None, **given: Any) -> None:
            assert _session is not None
            _session.verb(scheduler, name, path, given)

        return call

    for name in VERBS:
        setattr(scheduler, f"moe_route_{name}", verb(name))


def _created(request: Any, *args: Any, **given: Any) -> Any:
    if _session is not None:
        _session.prepare(request)
    return request


def _run(scheduler: Any, batch: Any, *args: Any, **given: Any) -> None:
    if _session is not None:
        _session.running(batch.reqs, lambda: _live(scheduler, batch))


def _processed(result: Any, scheduler: Any, batch: Any, *args: Any, **given: Any) -> None:
    if _session is not None:
        _session.ended([request for request in batch.reqs if request.finished()])


def _validate(manager: Any, obj: Any, *args: Any, **given: Any) -> None:
    """Refuse a request before it reaches the scheduler: SGLang answers a ``ValueError`` with HTTP 400 and its words."""
    options = options_of()
    if options is None:
        return
    arguments = arguments_of(obj.sampling_params)
    wrong = request_error(options, arguments)
    items = planned_items()
    if wrong is None and items is not None:
        wrong = items.error(arguments)
    if wrong is not None:
        raise ValueError(wrong)


_CALLED: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("BEFORE", _choose),
    ("BEFORE", _precomputed),
    ("BEFORE", _attach),
    ("AROUND", _forward),
    ("AFTER", _add_verbs),
    ("AFTER", _created),
    ("BEFORE", _run),
    ("AFTER", _processed),
    ("BEFORE", _validate),
)
HOOKS: Mapping[str, tuple[str, Callable[..., Any]]] = dict(zip(SEAMS, _CALLED, strict=True))
"""Where -> when a hook is called, and what."""


def hook_all() -> None:
    """Register every hook, and look after SGLang applied them whether each one took."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for place, (when, hook) in HOOKS.items():
        HookRegistry.register(place, hook, HookType[when])
    natural = HookRegistry.apply_hooks

    def applied(cls: Any) -> None:
        natural()
        missing = missing_hooks(cls._patched)
        if missing:  # SGLang logs what fails, and would serve without it
            raise SystemExit(f"moe_route: this SGLang does not let itself be hooked: {'; '.join(missing)}")

    HookRegistry.apply_hooks = classmethod(applied)


def missing_hooks(patched: Collection[str]) -> list[str]:
    """What is wrong with the hooks: those that did not take, and functions without an argument that is used."""
    wrong = []
    for place, arguments in SEAMS.items():
        try:
            target = pkgutil.resolve_name(place)
        except (ImportError, AttributeError, ValueError) as error:
            wrong.append(f"there is no {place} ({error})")
            continue
        lacks = [name for name in arguments if name not in inspect.signature(target).parameters]
        if place not in patched or not hasattr(target, "__wrapped__"):
            wrong.append(f"{place} is not wrapped")
        elif lacks:
            wrong.append(f"{place} has no argument {lacks[0]}")
    return wrong
