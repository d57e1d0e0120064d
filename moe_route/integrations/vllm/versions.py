"""Which vLLM this plug-in knows, and every private name of vLLM that it uses, looked up in one place."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["SEAMS", "EngineNotSupportedError", "check_version", "find"]

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


class EngineNotSupportedError(RuntimeError):
    """The engine is set up in a way in which counts or steering would be wrong; the message says what mends it."""


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
