"""moe-route inside stock vLLM (extra ``vllm``): record and steer what its requests are routed to.

vLLM calls ``register`` in every process, by the entry point ``moe_route`` of ``vllm.general_plugins``. Nothing happens
until the engine is started with ``--additional-config '{"moe_route": {...}}'``; ``options.Options`` lists the options.

    llm = LLM(model, additional_config={"moe_route": {"groups": ["a", "b"]}})
    mr.vllm.steer(llm, plan)
    mr.vllm.record(llm)
    llm.generate(prompts, [SamplingParams(extra_args={"moe_route_group": "a"}), ...])
    statistics = mr.vllm.statistics(llm)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.integrations.vllm.kernels import avoid_monolithic
from moe_route.integrations.vllm.options import Options, request_error
from moe_route.integrations.vllm.versions import EngineNotSupportedError

if TYPE_CHECKING:
    from moe_route.integrations.vllm.items import PlannedItems
    from moe_route.recording.statistics import RoutingStatistics
    from moe_route.recording.trace import Trace
    from moe_route.steering.plan import Plan

__all__ = ["EngineNotSupportedError", "pause", "record", "register", "statistics", "steer", "trace"]

_OFF = (
    "moe_route is not on in this engine: start it with --additional-config '{\"moe_route\": {}}', "
    'LLM(..., additional_config={"moe_route": {}})'
)
_VERBS = ("record", "pause", "statistics", "trace", "steer", "report", "prefixes", "known")
_CHANGING = ("record", "pause", "steer")


def record(llm: Any) -> None:
    """Begin a new recording in the engine of a ``vllm.LLM``; requests carry their group in ``extra_args``."""
    llm.collective_rpc("moe_route_record")


def pause(llm: Any) -> None:
    """Stop counting; what was counted is kept."""
    llm.collective_rpc("moe_route_pause")


def steer(llm: Any, plan: Plan | None, *, name: str = "default") -> None:
    """Steer by a plan from the next step on; None ends it.

    Requests that name no plan take "default". Another ``name`` must be among the option ``plans``. Raises an error with
    the words of ``steering.PlanError`` for a plan of another model, or one that does not run inside vLLM.
    """
    content = None
    if plan is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.safetensors"
            plan.save(file)
            content = file.read_bytes()
    llm.collective_rpc("moe_route_steer", args=(content, name))


def statistics(llm: Any) -> RoutingStatistics:
    """What was counted. ``LLM.generate`` has returned, so that all requests have ended.

    Raises an error with the words of ``recording.RecordingError`` if nothing was recorded.
    """
    from moe_route.recording.statistics import RoutingStatistics
    from moe_route.recording.store import SequenceStore

    answers = _answers(llm, "statistics")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "statistics.safetensors"
        file.write_bytes(answers[0])
        found = RoutingStatistics.load(file)
        if found.store is not None:  # it reads its sequences from the file, which goes
            kept = SequenceStore(found.layers, found.num_experts)
            for shard in found.store.shards():
                kept.append(shard.keys, shard.arrays)
            found.store = kept
        return found


def trace(llm: Any) -> Trace:
    """The experts and weights of every counted token, with its id, position and request; the option ``trace`` keeps it.

    ``LLM.generate`` has returned. Tokens are in the order in which they ran; each request is a sequence, with its item.
    Raises an error with the words of ``recording.RecordingError`` if the engine keeps no trace.
    """
    from moe_route.recording.trace import Trace

    answers = _answers(llm, "trace")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.safetensors"
        file.write_bytes(answers[0])
        return Trace.load(file)


def _answers(llm: Any, verb: str) -> list[bytes]:
    """What the ranks say that answer; no request is running."""
    return [answer for answer in llm.collective_rpc(f"moe_route_{verb}", args=(None, True)) if answer is not None]


def register() -> None:
    """Wrap, once per process, the methods of vLLM through which an engine with options passes."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker  # the workers of CPU and XPU inherit from it

    if hasattr(Worker, "moe_route_report"):
        return
    load_model, validate = Worker.load_model, InputProcessor._validate_params

    @functools.wraps(load_model)
    def load_and_attach(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = load_model(self, *args, **kwargs)
        options = Options.of(self.vllm_config.additional_config)
        if options is not None:
            import vllm

            from moe_route.integrations.vllm.worker import Session

            self.moe_route_session = Session(self, options, vllm.__version__)
        return answer

    @functools.wraps(validate)
    def validated(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        options = Options.of(self.vllm_config.additional_config)
        wrong = None if options is None else request_error(options, getattr(params, "extra_args", None))
        wrong = wrong or (None if options is None else _planned_items(self, options).error(params))
        if wrong is not None:
            raise _refusal()(wrong)
        return validate(self, params, *args, **kwargs)

    Worker.load_model, InputProcessor._validate_params = load_and_attach, validated
    avoid_monolithic(FusedMoEExperts)
    _share_prefixes(EngineCore)
    _tell_texts(EngineCore, Scheduler)
    _follow_plans(LLMEngine, AsyncLLM)
    for verb in _VERBS:
        setattr(Worker, f"moe_route_{verb}", _verb(verb))


def _share_prefixes(core: Any) -> None:
    """Salt the requests of an engine core that caches prefixes; see ``prefixes``."""
    add_request, collective_rpc = core.add_request, core.collective_rpc

    def prefixes_of(self: Any) -> Any:
        if not hasattr(self, "moe_route_prefixes"):
            from moe_route.integrations.vllm.prefixes import Prefixes

            options = Options.of(self.vllm_config.additional_config)
            caches = options is not None and self.vllm_config.cache_config.enable_prefix_caching
            self.moe_route_prefixes = Prefixes(self, options) if options is not None and caches else None
        return self.moe_route_prefixes

    @functools.wraps(add_request)
    def salted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        prefixes = prefixes_of(self)
        if prefixes is not None:
            prefixes.prepare(request)
        return add_request(self, request, *args, **kwargs)

    @functools.wraps(collective_rpc)
    def called(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        verb = method.removeprefix("moe_route_") if isinstance(method, str) else ""
        prefixes = prefixes_of(self) if verb in _CHANGING else None
        try:
            return collective_rpc(self, method, *args, **kwargs)
        finally:
            if prefixes is not None:
                prefixes.called(verb)

    core.add_request, core.collective_rpc = salted, called


def _tell_texts(core: Any, scheduler: Any) -> None:
    """Tell the workers which tokens became text, with every step and before every verb; see ``texts``."""
    schedule, collective_rpc = scheduler.schedule, core.collective_rpc

    def texts_of(self: Any) -> Any:
        if not hasattr(self, "moe_route_texts"):
            from moe_route.integrations.vllm.texts import Texts

            self.moe_route_texts = Texts.of(self.vllm_config)
        return self.moe_route_texts

    @functools.wraps(schedule)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        texts = texts_of(self)
        if texts is None:
            return schedule(self, *args, **kwargs)
        news = texts.news()
        step = schedule(self, *args, **kwargs)
        texts.attach(news, step, self.requests)
        return step

    @functools.wraps(collective_rpc)
    def called(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(method, str) and method.removeprefix("moe_route_") in _VERBS:
            texts = texts_of(self.scheduler)
            if texts is not None:
                collective_rpc(self, "moe_route_known", args=(texts.news(),))
        return collective_rpc(self, method, *args, **kwargs)

    scheduler.schedule, core.collective_rpc = told, called


def _planned_items(processor: Any, options: Options) -> PlannedItems:
    """What a front end knows of its plans."""
    from moe_route.integrations.vllm.items import PlannedItems

    if not hasattr(processor, "moe_route_items"):
        processor.moe_route_items = PlannedItems(options)
    items: PlannedItems = processor.moe_route_items
    return items


def _follow_plans(engine: Any, async_engine: Any) -> None:
    """Let a front end see the plans that it passes on to the workers."""
    collective_rpc, collective_rpc_async = engine.collective_rpc, async_engine.collective_rpc

    def passed(self: Any, method: Any, args: Any = (), kwargs: Any = None) -> None:
        options = Options.of(self.vllm_config.additional_config)
        if method == "moe_route_steer" and options is not None:
            _planned_items(self.input_processor, options).steered(*args, **(kwargs or {}))

    @functools.wraps(collective_rpc)
    def called(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        answer = collective_rpc(self, method, timeout, args, kwargs)
        passed(self, method, args, kwargs)
        return answer

    @functools.wraps(collective_rpc_async)
    async def called_async(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        answer = await collective_rpc_async(self, method, timeout, args, kwargs)
        passed(self, method, args, kwargs)
        return answer

    engine.collective_rpc, async_engine.collective_rpc = called, called_async


def _refusal() -> type[Exception]:
    """The error that vLLM answers with HTTP 400 and its words; older releases have ValueError for it."""
    from vllm import exceptions

    return getattr(exceptions, "VLLMValidationError", ValueError)


def _verb(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = getattr(self, "moe_route_session", None)
        if session is None:
            raise EngineNotSupportedError(_OFF)
        return getattr(session, name)(*args, **kwargs)

    call.__name__ = f"moe_route_{name}"
    return call
