"""The private names of vLLM that are used are there, with the arguments that are used; no engine is started.

Read from the sources: of the vLLM that is installed, and of the wheels in the folder MOE_ROUTE_VLLM_WHEELS, to which
`make test-vllm` brings the oldest one that is supported.
"""

from __future__ import annotations

import ast
import os
import zipfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from moe_route.integrations.vllm.options import OLDEST, SEAMS, check_version, missing_arguments

WHEELS = sorted(Path(os.environ.get("MOE_ROUTE_VLLM_WHEELS") or os.devnull).glob("vllm*.whl"))
SOURCES = ["installed", *(wheel.name for wheel in WHEELS)]

if not os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that is not there is a failure there
    pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

FIELDS = {
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id",
        "prompt_token_ids",
        "prompt_embeds",
        "sampling_params",
        "num_computed_tokens",
    ),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "finished_req_ids",
        "num_scheduled_tokens",
        "preempted_req_ids",
        "scheduled_new_reqs",
        "scheduled_spec_decode_tokens",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler": ("requests", "vllm_config", "finished_req_ids"),
    "vllm.v1.engine:EngineCoreRequestType": ("WAKEUP",),
    "vllm.v1.engine:EngineCoreOutput": ("request_id", "finish_reason", "routed_experts"),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    "vllm.v1.engine.core:EngineCoreProc": ("input_queue",),
    "vllm.v1.engine.core:DPEngineCoreProc": ("dp_group",),
    "vllm.v1.request:RequestStatus": ("FINISHED_ABORTED",),
    "vllm.v1.engine.core_client:MPClient": ("core_engines",),
    "vllm.outputs:CompletionOutput": ("routed_experts",),
    "vllm.entrypoints.openai.completion.protocol:CompletionResponseChoice": ("routed_experts",),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionResponseChoice": ("routed_experts",),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin": ("name", "required_tasks", "attach_router", "init_state"),
    "vllm.config.model:ModelConfig": ("get_num_experts", "get_total_num_hidden_layers"),
    "vllm.config.speculative:SpeculativeConfig": ("num_speculative_tokens",),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "req_ids",
        "num_scheduled_tokens",
        "num_computed_tokens_np",
        "input_ids",
    ),
    "vllm.v1.engine.llm_engine:LLMEngine": ("input_processor", "vllm_config"),
    "vllm.v1.engine.async_llm:AsyncLLM": ("input_processor", "vllm_config"),
    "vllm.v1.request:Request": (
        "sampling_params",
        "num_prompt_tokens",
        "num_computed_tokens",
        "num_tokens",
        "output_token_ids",
        "is_finished",
        "cache_salt",
        "block_hashes",
        "skip_reading_prefix_cache",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("input_batch", "input_ids", "requests"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": ("req_states",),
    "vllm.v1.worker.gpu.states:RequestState": ("req_id_to_index", "all_token_ids"),
    "vllm.v1.engine.core:EngineCore": ("model_executor", "scheduler", "vllm_config"),
    "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter": ("top_k",),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner": (
        "layer_name",
        "router",
        "moe_config",
        "routed_experts",
        "is_monolithic",
        "do_naive_dispatch_combine",
    ),
    "vllm.model_executor.layers.fused_moe.config:FusedMoEParallelConfig": ("is_sequence_parallel",),
    "vllm.config.parallel:ParallelConfig": (
        "pipeline_parallel_size",
        "tensor_parallel_size",
        "data_parallel_size",
        "data_parallel_rank",
        "enable_elastic_ep",
    ),
    "vllm.distributed.parallel_state:GroupCoordinator": ("world_size", "rank_in_group", "cpu_group"),
    "vllm.v1.worker.gpu_worker:Worker": ("device", "model_runner"),
    "vllm.v1.worker.worker_base:WorkerBase": ("rank", "vllm_config"),
}
"""Attributes of vLLM's objects that are read or set."""


@cache
def module(source: str, name: str) -> ast.Module:
    paths = [name.replace(".", "/") + end for end in (".py", "/__init__.py")]
    if source == "installed":
        found = find_spec("vllm")
        assert found is not None
        assert found.origin is not None
        path = next(path for one in paths if (path := Path(found.origin).parents[1] / one).is_file())
        return ast.parse(path.read_text(encoding="utf-8"))
    with zipfile.ZipFile(next(wheel for wheel in WHEELS if wheel.name == source)) as wheel:
        return ast.parse(wheel.read(next(one for one in paths if one in wheel.namelist())))


def class_at(source: str, place: str) -> ast.ClassDef:
    name, _, path = place.partition(":")
    (found,) = [node for node in module(source, name).body if isinstance(node, ast.ClassDef) and node.name == path]
    return found


def methods(of: ast.ClassDef) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    return {node.name: node for node in of.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("place", SEAMS)
def test_methods_take_the_arguments_that_are_used(place: str, source: str) -> None:
    of, _, name = place.rpartition(".")
    taken = methods(class_at(source, of))[name].args
    assert set(SEAMS[place][1]) <= {one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("place", FIELDS)
def test_attributes_that_are_read_exist(place: str, source: str) -> None:
    of = class_at(source, place)
    found = set(methods(of))
    for node in ast.walk(of):
        first = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        for target in first.elts if isinstance(first, ast.Tuple) else [first]:
            if isinstance(target, ast.Name):
                found.add(target.id)
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                found.add(target.attr)
    assert set(FIELDS[place]) <= found


@pytest.mark.parametrize("source", SOURCES)
def test_the_group_of_pipeline_stages_is_found(source: str) -> None:
    body = module(source, "vllm.distributed.parallel_state").body
    (found,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "get_pp_group"]
    assert not found.args.args


@pytest.mark.parametrize("place", SEAMS)
def test_methods_of_the_installed_vllm_are_found_by_name(place: str) -> None:
    assert not missing_arguments(place)


def test_the_versions_are_those_tried() -> None:
    import vllm

    check_version(vllm.__version__)
    for wheel in WHEELS:
        check_version(wheel.name.split("-")[1])


@pytest.mark.skipif(not WHEELS, reason="no wheel was downloaded: make test-vllm")
def test_the_oldest_version_is_among_the_wheels() -> None:
    oldest = ".".join(map(str, OLDEST))
    assert any(wheel.name.split("-")[1].startswith(oldest + ".") for wheel in WHEELS)
