"""Both model runners, by stand-ins with the fields that are read: order, positions, ids, and when they are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_route.integrations.serving.requests import Batch
from moe_route.integrations.vllm.runners import V1, V2, follow, view_of


class RunnerV1:
    def __init__(self, log: list[str]):
        self.log = log
        self.input_batch = SimpleNamespace(req_ids=["b", "a"], num_computed_tokens_cpu=np.array([3, 0, 99]))
        self.input_ids = SimpleNamespace(gpu=torch.tensor([8, 5, 6, 0, 0], dtype=torch.int32))
        self.requests = {"a": SimpleNamespace(prompt_token_ids=[5, 6], output_token_ids=[7, 8])}

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any = None) -> str:
        self.log.append("prepare")
        return "prepared"

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> str:
        self.log.append("execute")
        if not dummy_run:
            getattr(self, view_of(self).prepare)(scheduler_output)
        return "output"

    def _dummy_run(self, num_tokens: int) -> int:
        self.log.append("dummy")
        return num_tokens


class RunnerV2(RunnerV1):
    def __init__(self, log: list[str]):
        super().__init__(log)
        ids = SimpleNamespace(gpu=torch.tensor([[0, 0, 0], [5, 6, 7]], dtype=torch.int32))
        self.req_states = SimpleNamespace(req_id_to_index={"a": 1}, all_token_ids=ids)

    def prepare_inputs(self, scheduler_output: Any) -> Any:
        self.log.append("prepare")
        return SimpleNamespace(
            req_ids=["b", "a"],
            num_scheduled_tokens=np.array([1, 2]),
            num_computed_tokens_np=np.array([3, 0]),
            input_ids=self.input_ids.gpu[:4],  # with padding
        )


SCHEDULED = SimpleNamespace(num_scheduled_tokens={"a": 2, "b": 1}, scheduled_spec_decode_tokens={})


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_a_step_is_followed_in_order(kind: type[RunnerV1]) -> None:
    log: list[str] = []
    batches: list[Batch] = []
    runner = kind(log)
    view = view_of(runner)
    assert isinstance(view, V2 if kind is RunnerV2 else V1)

    def laid_out(batch: Batch) -> None:
        log.append("laid out")
        batches.append(batch)

    follow(
        runner,
        view,
        before=lambda _: log.append("before"),
        laid_out=laid_out,
        after=lambda: log.append("after"),
        dummy=lambda: log.append("cleared"),
    )
    assert runner.execute_model(SCHEDULED) == "output"
    assert log == ["before", "execute", "prepare", "laid out", "after"]
    assert list(batches[0].names) == ["b", "a"]
    assert batches[0].counts.tolist() == [1, 2]
    assert batches[0].starts.tolist() == [3, 0]
    assert batches[0].token_ids[:3].tolist() == [8, 5, 6]
    log.clear()
    assert runner._dummy_run(4) == 4
    runner.execute_model(SCHEDULED, dummy_run=True)
    assert log == ["cleared", "dummy", "execute"]


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_drafts_are_the_last_tokens_of_their_requests(kind: type[RunnerV1]) -> None:
    runner = kind([])
    view = view_of(runner)
    prepared = getattr(runner, view.prepare)(SCHEDULED)
    assert view.batch(SCHEDULED, prepared).drafts is None
    drafting = SimpleNamespace(**{**vars(SCHEDULED), "scheduled_spec_decode_tokens": {"a": [7]}})
    drafts = view.batch(drafting, prepared).drafts
    assert drafts is not None
    assert drafts.tolist() == [0, 1]  # in the order of the batch


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_token_ids_are_those_of_the_request(kind: type[RunnerV1]) -> None:
    view = view_of(kind([]))
    ids = view.token_ids("a", 3)
    assert ids is not None
    assert ids.tolist() == [5, 6, 7]
    assert ids.dtype == np.int32
    assert view.token_ids("unknown", 3) is None
