"""Traces of a vLLM engine: every token's experts and weights as in transformers, and as vLLM itself returns them."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.calls.call import PHASES
from moe_route.integrations.serving.counts import StepTrace
from moe_route.integrations.serving.requests import RequestTable
from moe_route.recording.trace import Trace

GROUPS = ("plain", "steered")


class Steps:
    """A tracer over two sites, whose choices a step writes: expert (100 l + position) % 50 of layer l, weight 0.5."""

    def __init__(self, limit: int = 100):
        self.sites: list[Any] = [
            SimpleNamespace(name=f"layers.{i}", top_k=2 - i, num_experts=200, device=torch.device("cpu"))
            for i in range(3)
        ]
        for site, scale in zip(self.sites, (1.0, 2.0, 1.0), strict=True):
            site.output_scale, site.traced = scale, None
        self.trace = StepTrace(self.sites, (0, 1), 16, limit)
        self.requests = RequestTable(groups=2, plans=1, capacity=4)
        self.requests.group_capacity, self.requests.segment_capacity, self.requests.counts = 2, 8, True
        self.table = np.zeros((16, 4), np.int32)

    def begin(self, name: str, prompt: int, group: int) -> None:
        self.trace.begin(self.requests.begin(name, prompt=prompt, group=group, segment=1, plan=-1, item=name.upper()))

    def run(self, names: list[str], counts: list[int], starts: list[int]) -> None:
        self.trace.take()
        batch = names, np.array(counts), np.array(starts)
        total = self.requests.fill(self.table, *batch)
        self.trace.lay_out(self.table[:total], 2, *batch)
        for layer, site in enumerate(self.sites[:2]):
            positions = np.concatenate([np.arange(n) + start for n, start in zip(counts, starts, strict=True)])
            site.traced[0][:total] = torch.from_numpy((100 * layer + positions) % 150)[:, None].to(torch.int16)
            site.traced[1][:total] = 0.5

    def snapshot(self) -> Trace:
        return self.trace.snapshot(GROUPS, lambda request: np.arange(100, dtype=np.int32) + 1000)


def test_tokens_of_mixed_steps_keep_their_request_position_and_phase() -> None:
    steps = Steps()
    steps.begin("a", prompt=3, group=0)
    steps.begin("b", prompt=2, group=1)
    steps.requests.begin("uncounted", prompt=2, group=-1, segment=-1, plan=-1)
    steps.run(["b", "uncounted", "a"], [2, 2, 2], [0, 0, 0])
    steps.run(["a", "b"], [2, 1], [2, 2])
    found = steps.snapshot()
    assert found.sequence.tolist() == [1, 1, 0, 0, 0, 0, 1]
    assert found.items == ("A", "B")
    assert found.position.tolist() == [0, 1, 0, 1, 2, 3, 2]
    assert found.token.tolist() == [1000, 1001, 1000, 1001, 1002, 1003, 1002]
    assert [PHASES[phase] for phase in found.phase] == ["prefill"] * 5 + ["decode"] * 2
    assert found.group.tolist() == [1, 1, 0, 0, 0, 0, 1]
    assert found.ids[:, 0, 0].tolist() == found.position.tolist()
    assert found.ids[:, 1].tolist() == [[(100 + p) % 150, -1] for p in found.position.tolist()]
    assert found.weights[0].tolist() == [[0.5, 0.5], [1.0, 0.0]]  # scaled as transformers has them
    assert found.ids.dtype == np.int16
    assert not found.truncated


def test_tokens_that_run_again_and_those_past_the_limit_are_left_out() -> None:
    steps = Steps(limit=4)
    steps.begin("a", prompt=3, group=0)
    steps.run(["a"], [3], [0])
    steps.run(["a"], [3], [0])  # preempted, and again
    assert len(steps.snapshot()) == 3
    steps.run(["a"], [2], [3])
    found = steps.snapshot()
    assert found.position.tolist() == [0, 1, 2, 3]
    assert found.truncated
    steps.trace.forget()
    assert len(steps.snapshot()) == 0
    assert not steps.snapshot().truncated


vllm: Any = None
if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
needs_vllm = pytest.mark.skipif(vllm is None, reason="needs vLLM in an environment of its own: make test-vllm")
NEW = 8
PLAN = (mr.Plan.forbid({1: [3]}) + mr.Plan.activate({2: [1, 5], 4: [7]}, strength=0.7)).only(groups=["steered"])


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    from moe_route.data import demo_corpus, load_demo_model

    corpus, tokenizer = demo_corpus(), load_demo_model()[1]
    return [tokenizer(corpus[name][i]).input_ids[: 12 + 7 * i] for i in range(3) for name in ("eng_Latn", "jpn_Jpan")]


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    from moe_route.data import demo_model_folder

    made = vllm.LLM(
        model=str(demo_model_folder()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=32,  # prompts arrive in chunks
        disable_log_stats=True,
        additional_config={"moe_route": {"groups": list(GROUPS), "trace": True}},
    )
    yield made
    del made
    gc.collect()


def in_transformers(ids: list[list[int]]) -> Trace:
    from moe_route.data import load_demo_model

    model = load_demo_model()[0].float()
    with (
        mr.attach(model) as routed,
        torch.no_grad(),
        routed.steer(PLAN),
        routed.record(groups=GROUPS, trace=True) as rec,
    ):
        for number, one in enumerate(ids):
            with rec.labels(groups=GROUPS[number % 2], items=[str(number)]):
                model.generate(torch.tensor([one]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return rec.trace()


def in_order(trace: Trace) -> Trace:
    """The tokens by item and position."""
    items = np.array([str(trace.items[number]) for number in trace.sequence])
    order = np.lexsort((trace.position, items))
    columns = ("sequence", "group", "position", "token", "phase", "ids", "weights")
    names = tuple(sorted(str(item) for item in trace.items))
    numbered = np.array([names.index(item) for item in items], np.int32)
    sorted_columns = {name: getattr(trace, name)[order] for name in columns}
    return Trace(**{**vars(trace), **sorted_columns, "items": names, "sequence": numbered[order]})


@needs_vllm
def test_a_trace_is_that_of_transformers(llm: Any, ids: list[list[int]], tmp_path: Path) -> None:
    mr.vllm.steer(llm, PLAN)
    mr.vllm.record(llm)
    params = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=NEW,
            extra_args={"moe_route_group": GROUPS[number % 2], "moe_route_item": str(number)},
        )
        for number in range(len(ids))
    ]
    llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    trace = mr.vllm.trace(llm)
    found, expected = in_order(trace), in_order(in_transformers(ids))
    for name in ("layers", "layer_numbers", "groups", "items", "truncated"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("sequence", "group", "position", "token", "phase", "ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-3)
    assert found.weights.dtype == expected.weights.dtype
    assert found.ids.dtype == expected.ids.dtype
    path = llm.collective_rpc("moe_route_trace", args=(str(tmp_path / "trace.safetensors"),))[0]
    np.testing.assert_array_equal(Trace.load(path).ids, trace.ids)


@needs_vllm
def test_ids_are_those_that_vllm_captures_itself(llm: Any, ids: list[list[int]]) -> None:
    """By vLLM's own capturer, bound as ``--enable-return-routed-experts`` binds it, which wants the V2 runner."""
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )

    if "kv_cache_config" in inspect.signature(RoutedExpertsCapturer).parameters:
        pytest.skip("this release's capturer is part of its KV cache")

    def bind(worker: Any) -> Any:
        capturer = RoutedExpertsCapturer(64, worker.vllm_config)
        bind_routed_experts_capturer(worker.model_runner.get_model(), capturer)
        return capturer

    (capturer,) = llm.collective_rpc(bind)
    params = vllm.SamplingParams(max_tokens=1, extra_args={"moe_route_group": "steered"})
    for plan in (None, PLAN):
        mr.vllm.steer(llm, plan)
        mr.vllm.record(llm)
        prompt = ids[2][:20]
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        found = mr.vllm.trace(llm)
        assert found.token.tolist() == prompt
        theirs = capturer.device_buffer[: len(prompt)].numpy()
        np.testing.assert_array_equal(theirs, found.ids)


@needs_vllm
def test_a_trace_is_replayed_by_transformers(llm: Any, ids: list[list[int]]) -> None:
    """As RL trainers do: what vLLM routed is what the model that is trained routes."""
    from moe_route.data import load_demo_model

    mr.vllm.steer(llm, PLAN)
    mr.vllm.record(llm)
    params = vllm.SamplingParams(max_tokens=1, extra_args={"moe_route_group": "steered", "moe_route_item": "x"})
    llm.generate([{"prompt_token_ids": ids[3]}], params, use_tqdm=False)
    trace = mr.vllm.trace(llm)
    model = load_demo_model()[0].float()
    with (
        mr.attach(model) as routed,
        torch.no_grad(),
        routed.steer(mr.Plan.replay(trace)),
        routed.record(trace=True) as rec,
        rec.labels(items=["x"]),
    ):
        model(torch.tensor([ids[3]]))
    np.testing.assert_array_equal(rec.trace().ids, trace.ids)
    mr.vllm.steer(llm, None)
