"""Recordings and traces beside drafts, and under async scheduling, are those of a plain engine.

vLLM turns async scheduling off on a CPU, where nothing would be gained. Its scheduler and its runner know nothing of
that, so the tests turn it on again, with stand-ins for the streams and events of CUDA, which a CPU does not need.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.recording import RoutingStatistics
from moe_route.recording.trace import Trace

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

GROUPS = ("plain", "steered")
PLAN = (
    mr.Plan.activate({2: [1, 5], 3: [0], 4: [7]}, strength=0.5)
    + mr.Plan.forbid({1: [3]})
    + mr.Plan.scale_logits({6: {1: 1.5}}).only(positions=[(2, 9), (40, 60)])
    + mr.Plan.force_off({5: [2, 4]}).only(phase="decode")
).only(groups=["steered"])


class Work(NamedTuple):
    """A request: its prompt, what else its sampling says, and the length of the whole text that it makes."""

    ids: list[int]
    settings: dict[str, Any]


class Answers(NamedTuple):
    statistics: RoutingStatistics
    trace: Trace | None
    texts: list[list[int]]


def engine(**changes: Any) -> Any:
    from moe_route.data import demo_model_folder

    options = {"groups": list(GROUPS), "sequences": True, **changes.pop("options", {})}
    settings: dict[str, Any] = {
        "model": str(demo_model_folder()),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,  # prompts arrive in chunks, beside drafts
        "block_size": 32,
        "num_gpu_blocks_override": 9,  # requests are preempted
        "disable_log_stats": True,
        "additional_config": {"moe_route": options},
    }
    return vllm.LLM(**{**settings, **changes})


def run(llm: Any, works: list[Work], plan: mr.Plan | None) -> Answers:
    mr.vllm.steer(llm, plan)
    mr.vllm.record(llm)
    params = [
        vllm.SamplingParams(
            temperature=0,
            extra_args={"moe_route_group": GROUPS[number % 2], "moe_route_item": str(number)},
            **{"max_tokens": 24, **work.settings},
        )
        for number, work in enumerate(works)
    ]
    out = llm.generate([{"prompt_token_ids": work.ids} for work in works], params, use_tqdm=False)
    found = mr.vllm.statistics(llm)
    traced = llm.llm_engine.vllm_config.additional_config["moe_route"].get("trace")
    return Answers(found, mr.vllm.trace(llm) if traced else None, [list(o.outputs[0].token_ids) for o in out])


if __name__ == "__main__":
    pass
