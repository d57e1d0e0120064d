"""What the user asks of the plug-in, and which vLLM can do it.

The options are read from ``--additional-config '{"moe_route": {...}}'``. Engines in which counts or steering would be
wrong are refused. Every private name of vLLM that the plug-in uses is looked up here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moe_route.integrations.serving.options import EngineNotSupportedError, Options

OLDEST, BEFORE = (0, 30), (0, 33)

SEAMS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "vllm.v1.worker.gpu_worker:Worker.load_model": ("load_model", ()),
        "vllm.v1.engine.input_processor:InputProcessor._validate_params": ("_validate_params", ("params",)),
        "vllm.v1.engine.llm_engine:LLMEngine.collective_rpc": (
            "collective_rpc",
            ("method", "timeout", "args", "kwargs"),
        ),
        "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": (
            "collective_rpc",
            ("method", "timeout", "args", "kwargs"),
        ),
        "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("schedule", ()),
        "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": (
            "finish_requests",
            ("request_ids", "finished_status"),
        ),
        "vllm.v1.engine.llm_engine:LLMEngine.abort_request": ("abort_request", ("request_ids", "internal")),
        "vllm.v1.engine.async_llm:AsyncLLM.abort": ("abort", ("request_id", "internal")),
        "vllm.v1.engine.output_processor:OutputProcessor.abort_requests": (
            "abort_requests",
            ("request_ids", "internal"),
        ),
        "vllm.v1.engine.utils:CoreEngineProcManager.__init__": ("__init__", ("vllm_config",)),
        "vllm.v1.engine.utils:CoreEngineProcManager.shutdown": ("shutdown", ("timeout",)),
        "vllm.v1.engine.core_client:AsyncMPClient._call_utility_async": ("_call_utility_async", ("method", "engine")),
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches": ("_initialize_kv_caches", ("vllm_config",)),
        "vllm.v1.engine.core:EngineCore.step": ("step", ()),
        "vllm.v1.engine.core:EngineCore.step_with_batch_queue": ("step_with_batch_queue", ()),
        "vllm.v1.engine.core:EngineCore.post_step": ("post_step", ("model_executed",)),
        "vllm.v1.engine.core:EngineCore.shutdown": ("shutdown", ()),
        "vllm.v1.engine.core:EngineCoreProc._handle_client_request": ("_handle_client_request", ("request_type",)),
        "vllm.v1.engine.core:EngineCoreProc._handle_shutdown": ("_handle_shutdown", ()),
        "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter.set_capture_fn": (
            "set_capture_fn",
            ("capture_fn",),
        ),
        "vllm.v1.engine.core:EngineCore.add_request": ("add_request", ("request",)),
        "vllm.v1.engine.core:EngineCore.collective_rpc": ("collective_rpc", ("method",)),
        "vllm.v1.request:Request.get_skip_reading_prefix_cache": ("get_skip_reading_prefix_cache", ()),
        "vllm.v1.request:Request.update_block_hashes": ("update_block_hashes", ()),
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts.is_supported_config": (
            "is_supported_config",
            ("cls", "moe_config"),
        ),
        "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._compute_routing": (
            "_compute_routing",
            ("hidden_states", "router_logits", "indices_type", "input_ids"),
        ),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": ("_prepare_inputs", ("scheduler_output",)),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": ("execute_model", ("scheduler_output",)),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run": ("_dummy_run", ()),
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs": ("prepare_inputs", ("scheduler_output",)),
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": (
            "execute_model",
            ("scheduler_output", "dummy_run"),
        ),
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner._dummy_run": ("_dummy_run", ()),
    }
)
"""Methods of vLLM that are wrapped or called: where they are, and the arguments that they must have."""

PREFIX = "moe_route_"
"""Of the verbs among the methods of a worker."""
VERBS = ("record", "pause", "statistics", "trace", "steer", "take_back", "report", "prefixes", "known", "routed")
CHANGING = ("record", "pause", "steer", "take_back")
OFF = (
    "moe_route is not on in this engine: start it with --additional-config '{\"moe_route\": {}}', "
    'LLM(..., additional_config={"moe_route": {}})'
)
LEFT = "moe_route_left:"
"""Begins an id by which a front end says, beside the request's own, that it does not end its text but gives it up."""
PATIENCE = 60.0
"""Seconds that a core which ends may take to save, and for which another one waits for its file."""


def find(place: str) -> Any:
    """The object at "module:Name.name"."""
    module, _, path = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def missing_arguments(place: str) -> list[str]:
    """Arguments of a method of ``SEAMS`` that this vLLM lacks."""
    present = inspect.signature(find(place)).parameters
    return [name for name in SEAMS[place][1] if name not in present]


def check_version(version: str, *, any_version: bool = False) -> None:
    """Raise ``EngineNotSupportedError`` for a vLLM that this plug-in was not tried with."""
    if any_version:
        return
    try:
        number = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        number = (0, 0)
    if not OLDEST <= number < BEFORE:
        raise EngineNotSupportedError(
            f"moe_route: vLLM {version} is not one of those tried ({OLDEST[0]}.{OLDEST[1]} to before "
            f'{BEFORE[0]}.{BEFORE[1]}): install one of them, or set "any_version": true in the options to try this one'
        )


def arguments_of(params: Any) -> Mapping[str, Any]:
    """The arguments of a request, by its sampling parameters; over HTTP they are its ``vllm_xargs``."""
    return (params and params.extra_args) or {}


def runs_ahead(config: Any) -> bool:
    """Whether a step is laid out before the outcome of the one before it is known."""
    return bool(getattr(config.scheduler_config, "async_scheduling", False))


def refuse_recording(config: Any) -> None:
    """Raise ``EngineNotSupportedError`` for a configuration that steers as it should, and would count wrongly."""
    parallel = config.parallel_config
    if runs_ahead(config) or config.speculative_config is not None:
        what = "--no-async-scheduling" if runs_ahead(config) else "without --speculative-config"
        if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
            raise EngineNotSupportedError(
                "moe_route: with pipeline or data parallelism, steps of other requests, or of none, run before it is "
                f"known which tokens of a step became text: to record, start {what}"
            )


def refuse_engine(config: Any) -> None:
    """Raise ``EngineNotSupportedError`` for a vLLM configuration in which counts or steering would be wrong."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    for refused, why in (
        (
            runs_ahead(config) and config.speculative_config is not None,
            "where drafts stand in their text is known on the device alone: start with --no-async-scheduling",
        ),
        (
            getattr(config.speculative_config, "enable_adaptive_verification", False),
            'the device decides how many drafts of each request run: start without "enable_adaptive_verification"',
        ),
        (
            getattr(scheduler, "policy", "fcfs") != "fcfs",
            "preempted requests could outgrow the tables: start with --scheduling-policy fcfs",
        ),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallel ranks split the tokens of a text: start without context parallelism",
        ),
        (
            getattr(parallel, "enable_elastic_ep", False),
            "replicas that join later know neither plans nor the recording: start without --enable-elastic-ep",
        ),
        (getattr(parallel, "enable_dbo", False), "a step is split in two: start without --enable-dbo"),
    ):
        if refused:
            raise EngineNotSupportedError(f"moe_route: {why}")


def avoid_monolithic(experts: Any) -> None:
    """Keep an engine with moe-route from kernels that choose their experts inside, out of its reach.

    vLLM asks each class of experts whether it supports a layer, in its order of preference, and takes the first that
    does. This wraps ``FusedMoEExperts.is_supported_config``, which all classes ask too.
    """
    natural = experts.is_supported_config

    @functools.wraps(natural)
    def is_supported_config(cls: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        if cls.is_monolithic() and _on():
            return False, "it chooses experts inside, where moe_route can neither count nor steer"
        answer: tuple[bool, str | None] = natural(cls, *args, **kwargs)
        return answer

    experts.is_supported_config = staticmethod(is_supported_config)


def options_of(owner: Any) -> Options | None:
    """``Options.of`` the engine to which an object of vLLM with a ``vllm_config`` belongs, read once."""
    if not hasattr(owner, "moe_route_options"):
        owner.moe_route_options = Options.of(owner.vllm_config.additional_config)
    options: Options | None = owner.moe_route_options
    return options


def _on() -> bool:
    """Whether the engine whose model is being made has moe-route."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and Options.of(config.additional_config) is not None
