"""SGLang's files from its wheel, hooked once; no engine is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from harness.sglang_wheel import WHEEL, imported
from harness.vllm_demo import GROUPS

from moe_route.data import demo_model_folder


@pytest.fixture(scope="session")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Modules of SGLang whose functions are hooked; its configuration is that of the shipped model on a CPU."""
    if WHEEL is None:
        pytest.skip("needs SGLang's wheel: make test-sglang")
    with imported(tmp_path_factory.mktemp("sglang")), pytest.MonkeyPatch.context() as patch:
        from sglang.srt import runtime_context
        from sglang.srt.layers.moe import topk
        from sglang.srt.managers import schedule_batch, scheduler, tokenizer_manager
        from sglang.srt.model_executor import forward_batch_info, model_runner
        from sglang.srt.plugins import hook_registry
        from sglang.srt.sampling import sampling_params
        from sglang.srt.server_args import ServerArgs

        from moe_route.integrations import sglang as plugin

        folder = str(demo_model_folder())
        settings = ServerArgs(model_path=folder, device="cpu", disable_overlap_schedule=True, chunked_prefill_size=32)
        ranks = runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
        runtime_context.publish(settings, role="scheduler", ranks=ranks)
        patch.setattr(model_runner, "capture_cuda_graphs", MagicMock())
        patch.setenv("MOE_ROUTE_SGLANG", json.dumps({"groups": GROUPS, "plans": {"soft": None}, "trace": True}))
        plugin.register()
        hook_registry.HookRegistry.apply_hooks()
        yield SimpleNamespace(
            topk=topk,
            runtime=runtime_context,
            registry=hook_registry,
            runner=model_runner.ModelRunner,
            scheduler=scheduler.Scheduler,
            manager=tokenizer_manager.TokenizerManager,
            batches=schedule_batch,
            forward=forward_batch_info,
            params=sampling_params.SamplingParams,
        )
