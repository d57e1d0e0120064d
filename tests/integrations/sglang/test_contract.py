"""The names of SGLang that are used are in its wheel, with the arguments that are used; nothing of it is run."""

from __future__ import annotations

import ast
import zipfile
from functools import cache

import pytest
from harness.sglang_wheel import WHEEL

from moe_route.integrations.sglang.options import SEAMS, check_version
from moe_route.integrations.sglang.seams import HOOKS

pytestmark = pytest.mark.skipif(WHEEL is None, reason="needs SGLang's wheel: make test-sglang")

FIELDS = {
    "sglang.srt.layers.moe.topk.TopKConfig": (
        "top_k",
        "use_grouped_topk",
        "topk_group",
        "num_expert_group",
        "renormalize",
        "custom_routing_function",
        "correction_bias",
        "routed_scaling_factor",
        "apply_routed_scaling_factor_on_output",
        "output_format",
        "scoring_func",
        "num_shared_topk_slots",
    ),
    "sglang.srt.layers.moe.topk.TopK": ("topk_config", "layer_id", "is_draft"),
    "sglang.srt.layers.moe.topk.TopKOutputFormat": ("STANDARD", "BYPASSED", "TRITON_KERNEL"),
    "sglang.srt.layers.moe.topk.StandardTopKOutput": ("topk_weights", "topk_ids"),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": (
        "forward_mode",
        "rids",
        "seq_lens_cpu",
        "extend_prefix_lens_cpu",
        "extend_seq_lens_cpu",
        "input_ids",
    ),
    "sglang.srt.model_executor.forward_batch_info.ForwardMode": ("is_decode",),
    "sglang.srt.model_executor.model_runner.ModelRunner": (
        "model",
        "model_config",
        "is_draft_worker",
        "max_running_requests",
    ),
    "sglang.srt.managers.schedule_batch.Req": (
        "rid",
        "sampling_params",
        "origin_input_ids",
        "output_ids",
        "extra_key",
        "prefix_len",
        "finished",
        "finished_reason",
    ),
    "sglang.srt.managers.schedule_batch.FINISH_ABORT": (),
    "sglang.srt.managers.scheduler.Scheduler": (
        "waiting_queue",
        "chunked_req",
        "collect_inflight_reqs",
        "handle_rpc_request",
    ),
    "sglang.srt.plugins.hook_registry.HookRegistry": ("register", "apply_hooks", "_patched"),
    "sglang.srt.plugins.hook_registry.HookType": ("BEFORE", "AFTER", "AROUND"),
    "sglang.srt.sampling.sampling_params.SamplingParams": ("custom_params",),
    "sglang.srt.entrypoints.engine.Engine": ("collective_rpc",),
    "sglang.srt.arg_groups.fields.schedule.Schedule": (
        "disable_overlap_schedule",
        "chunked_prefill_size",
        "max_prefill_tokens",
    ),
    "sglang.srt.arg_groups.fields.spec.Spec": ("speculative_algorithm",),
    "sglang.srt.arg_groups.fields.disagg.Disagg": ("disaggregation_mode",),
    "sglang.srt.arg_groups.fields.parallel.Parallel": ("pp_size", "dp_size", "attn_cp_size", "dcp_size"),
    "sglang.srt.arg_groups.fields.exec_.ExecOverlap": ("enable_two_batch_overlap",),
    "sglang.srt.arg_groups.fields.exec_.ExecDllm": ("dllm_algorithm",),
    "sglang.srt.arg_groups.fields.exec_.ExecMoe": ("elastic_ep_backend",),
    "sglang.srt.arg_groups.fields.exec_.ExecGraph": ("disable_cuda_graph",),
}
"""Attributes of SGLang's objects that are read or set."""


@cache
def module(name: str) -> ast.Module:
    assert WHEEL is not None
    with zipfile.ZipFile(WHEEL) as wheel:
        return ast.parse(wheel.read(f"{name.replace('.', '/')}.py"))


def definition(place: str) -> ast.FunctionDef | ast.ClassDef:
    """The function, method or class at a dotted place."""
    name, _, last = place.rpartition(".")
    body = module(name).body if name.rpartition(".")[2].islower() else definition(name).body
    (made,) = [
        node
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == last
    ]
    assert not isinstance(made, ast.AsyncFunctionDef)
    return made


@pytest.mark.parametrize("place", SEAMS)
def test_functions_take_the_arguments_that_are_used(place: str) -> None:
    made = definition(place)
    assert isinstance(made, ast.FunctionDef)
    taken = made.args
    assert set(SEAMS[place]) <= {one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}


@pytest.mark.parametrize("place", FIELDS)
def test_attributes_that_are_read_exist(place: str) -> None:
    names = set()
    for node in ast.walk(definition(place)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                names.add(target.id)
            elif isinstance(target, ast.Attribute):
                names.add(target.attr)
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
    assert set(FIELDS[place]) <= names


def test_every_seam_has_its_hook_and_the_version_is_the_one_tried() -> None:
    assert HOOKS.keys() == SEAMS.keys()
    assert WHEEL is not None
    check_version(WHEEL.name.split("-")[1])
