"""The private names of vLLM that are used are there, with the arguments that are used; no engine is started."""

from __future__ import annotations

import os

import pytest

from moe_route.integrations.vllm.versions import SEAMS, check_version, missing_arguments

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")


@pytest.mark.parametrize("place", SEAMS)
def test_methods_take_the_arguments_that_are_used(place: str) -> None:
    assert not missing_arguments(place)


def test_the_version_is_one_of_those_tried() -> None:
    check_version(vllm.__version__)


def test_fields_that_are_read_exist() -> None:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch

    fields = {
        NewRequestData: {"req_id", "prompt_token_ids", "prompt_embeds", "sampling_params", "num_computed_tokens"},
        SchedulerOutput: {
            "finished_req_ids",
            "num_scheduled_tokens",
            "preempted_req_ids",
            "scheduled_new_reqs",
        },
        InputBatch: {"req_ids", "num_scheduled_tokens", "num_computed_tokens_np"},
    }
    for of, names in fields.items():
        assert names <= of.__dataclass_fields__.keys()
