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

from moe_route.integrations.serving.options import WANTED, EngineNotSupportedError, request_error
from moe_route.integrations.vllm.options import OFF, PREFIX, VERBS, arguments_of, avoid_monolithic, options_of
from moe_route.integrations.vllm.seams import follow_core, follow_front, follow_scheduler, planned_items, split_weights

if TYPE_CHECKING:
    import numpy as np

    from moe_route.recording.statistics import RoutingStatistics
    from moe_route.recording.trace import Trace
    from moe_route.steering.plan import Plan

__all__ = ["EngineNotSupportedError", "pause", "record", "register", "routed_experts", "statistics", "steer", "trace"]


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
    """What was counted, in all layers; with the option ``save``, what earlier runs counted too.

    Each replica of data parallelism has an ``LLM`` and statistics of its own, which add up.

    Raises an error with the words of ``recording.RecordingError`` if nothing was recorded, or something is missing.
    """
    from moe_route.integrations.serving.answers import loaded
    from moe_route.recording.statistics import RoutingStatistics

    return loaded(RoutingStatistics, _content(llm, "statistics"))


def trace(llm: Any) -> Trace:
    """The experts and weights of every counted token, with its id, position and request; the option ``trace`` keeps it.

    Tokens are in the order in which they ran; each request is a sequence, with its item.
    Raises an error with the words of ``recording.RecordingError`` if the engine keeps no trace.
    """
    from moe_route.integrations.serving.answers import loaded
    from moe_route.recording.trace import Trace

    return loaded(Trace, _content(llm, "trace"))


def routed_experts(llm: Any, output: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Experts and weights of a ``CompletionOutput`` whose request asked by ``moe_route_experts``.

    Ids ``[tokens, layers, k]`` of all tokens but the last one, which was sampled and not routed; weights of the dtype
    that was asked for, or None. Layers are all of the model; those without experts are 0. Raises ``ValueError`` if the
    request did not ask.
    """
    from moe_route.integrations.vllm.returned import unpacked

    if output.routed_experts is None:
        raise ValueError(f'the request did not ask for its experts: extra_args={{"{WANTED}": "float32"}}')
    return unpacked(output.routed_experts, llm.llm_engine.vllm_config.model_config.get_num_experts())


def _content(llm: Any, verb: str) -> bytes:
    """What the rank says that answers, for all layers."""
    answers = llm.collective_rpc(f"moe_route_{verb}")
    return next(answer for answer in answers if answer is not None)


def register() -> None:
    """Wrap, once per process, the methods of vLLM through which an engine with options passes."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.engine.utils import CoreEngineProcManager
    from vllm.v1.worker.gpu_worker import Worker  # the workers of CPU and XPU inherit from it

    if hasattr(Worker, "moe_route_report"):
        return
    load_model, validate = Worker.load_model, InputProcessor._validate_params

    @functools.wraps(load_model)
    def load_and_attach(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = load_model(self, *args, **kwargs)
        options = options_of(self)
        if options is not None:
            import vllm

            from moe_route.integrations.vllm.worker import WorkerSession

            self.moe_route_session = WorkerSession(self, options, vllm.__version__)
        return answer

    @functools.wraps(validate)
    def validated(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        options = options_of(self)
        wrong = None if options is None else request_error(options, arguments_of(params))
        wrong = wrong or (None if options is None else planned_items(self, options).error(arguments_of(params)))
        if wrong is None and options is not None and arguments_of(params).get(WANTED):
            split_weights(self.vllm_config.model_config)
            if getattr(params, "stop", None):  # such a text ends in the front end, behind the core's last answer
                wrong = f"{WANTED} does not go with stop strings: name the end by stop_token_ids"
        if wrong is not None:
            raise _refusal()(wrong)
        return validate(self, params, *args, **kwargs)

    Worker.load_model, InputProcessor._validate_params = load_and_attach, validated
    avoid_monolithic(FusedMoEExperts)
    follow_core(EngineCore, EngineCoreProc)
    follow_scheduler(Scheduler)
    follow_front(LLMEngine, AsyncLLM, OutputProcessor, CoreEngineProcManager)
    _follow_plans(LLMEngine, AsyncLLM)
    for verb in VERBS:
        setattr(Worker, f"{PREFIX}{verb}", _verb(verb))


def _follow_plans(engine: Any, async_engine: Any) -> None:
    """Let a front end see the plans that it passes on to the workers."""
    collective_rpc, collective_rpc_async = engine.collective_rpc, async_engine.collective_rpc

    def passed(self: Any, method: Any, args: Any = (), kwargs: Any = None) -> None:
        options = options_of(self)
        if method == "moe_route_steer" and options is not None:
            planned_items(self.input_processor, options).steered(*args, **(kwargs or {}))

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
        from moe_route.integrations.serving.answers import answer

        return answer(lambda: getattr(_session_of(self), name)(*args, **kwargs))

    call.__name__ = f"{PREFIX}{name}"
    return call


def _session_of(worker: Any) -> Any:
    session = getattr(worker, "moe_route_session", None)
    if session is None:
        raise EngineNotSupportedError(OFF)
    return session
