"""What the user asks of the plug-in, which SGLang can do it, and every name of SGLang that is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moe_route.base.schema import parse_json
from moe_route.integrations.serving.options import EngineNotSupportedError, Options

VARIABLE = "MOE_ROUTE_SGLANG"
OLDEST, BEFORE = (0, 5, 23), (0, 5, 24)
SEAMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sglang.srt.layers.moe.topk._post_process_topk_ids": (
            "topk_ids",
            "topk_weights",
            "topk_config",
            "router_logits",
            "layer_id",
            "padded_rows_masked",
        ),
        "sglang.srt.layers.moe.topk.build_precomputed_topk_output": ("layer_id",),
        "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs": ("self",),
        "sglang.srt.model_executor.model_runner.ModelRunner.forward": ("self", "forward_batch"),
        "sglang.srt.managers.scheduler.Scheduler.init_all_cuda_graphs": ("self",),
        "sglang.srt.managers.scheduler.Scheduler._create_generation_req": ("self", "recv_req"),
        "sglang.srt.managers.scheduler.Scheduler.run_batch": ("self", "batch"),
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result": ("self", "batch", "result"),
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request": ("self", "obj"),
    }
)
"""Functions of SGLang that are hooked -> the arguments that they must have."""
_NOT_HERE = ("save", "admin", "metrics_groups", "routed_experts")


def options_of() -> Options | None:
    """The options of this process; None where moe-route was not asked for.

    Raises ``EngineNotSupportedError`` for options that are wrong, or that only another engine has.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return None
    try:
        content = parse_json(given, f"moe_route: {VARIABLE}")
    except ValueError as error:
        raise EngineNotSupportedError(str(error)) from error
    options = Options.of({"moe_route": content})
    wrong = [name for name in _NOT_HERE if options is not None and getattr(options, name)]
    if wrong:
        raise EngineNotSupportedError(f"moe_route: inside SGLang there is no option {wrong[0]!r} yet: leave it out")
    return options


def arguments_of(params: Any) -> Mapping[str, Any]:
    """The arguments of a request, by its sampling parameters or the JSON of these."""
    given = params.get("custom_params") if isinstance(params, Mapping) else getattr(params, "custom_params", None)
    return given or {}


def check_version(version: str, *, any_version: bool = False) -> None:
    """Raise ``EngineNotSupportedError`` for an SGLang that this plug-in was not tried with."""
    number = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if not any_version and not OLDEST <= number < BEFORE:
        raise EngineNotSupportedError(
            f"moe_route: SGLang {version} is not the one tried ({'.'.join(map(str, OLDEST))}): install that, or set "
            '"any_version": true in the options to try this one'
        )


def refuse_engine(runtime: Any) -> None:
    """Raise ``EngineNotSupportedError`` for a configuration in which counts or steering would be wrong.

    ``runtime``: ``sglang.srt.runtime_context``, or what stands in for it.
    """
    parallel, run = runtime.get_parallel(), runtime.get_exec()
    for refused, why in (
        (
            not runtime.get_schedule().disable_overlap_schedule,
            "a step is laid out before the one before it has told whether a text ends: start with "
            "--disable-overlap-schedule",
        ),
        (
            runtime.get_spec().speculative_algorithm is not None,
            "drafts may not become text: start without --speculative-algorithm",
        ),
        (parallel.pp_size > 1, "stages of pipeline parallelism are not joined yet: start without --pp-size"),
        (parallel.dp_size > 1, "replicas would write one file: start one engine per replica, without --dp-size"),
        (
            parallel.attn_cp_size > 1 or parallel.dcp_size > 1,
            "context parallel ranks split the tokens of a text: start without context parallelism",
        ),
        (
            runtime.get_disagg().disaggregation_mode != "null",
            "the prompt runs in another engine: start without --disaggregation-mode",
        ),
        (run.overlap.enable_two_batch_overlap, "a step is split in two: start without --enable-two-batch-overlap"),
        (run.dllm.dllm_algorithm is not None, "diffusion rewrites its tokens: start without --dllm-algorithm"),
        (run.moe.elastic_ep_backend is not None, "ranks that join later know no plan: leave out --elastic-ep-backend"),
    ):
        if refused:
            raise EngineNotSupportedError(f"moe_route: {why}")
