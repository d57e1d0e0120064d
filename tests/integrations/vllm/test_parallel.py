"""One engine over several processes: stages of layers, split weights, spread experts, replicas. Counts stay the same.

What vLLM lacks on a CPU for expert and data parallelism, and the plug-in of the tests that brings it: `cpu_gaps`.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.cpu_gaps import install
from harness.vllm_demo import GROUPS, NEW, PLAN, Answers, Row, assert_same, engine, in_transformers, in_vllm

import moe_route as mr
from moe_route.recording import RoutingStatistics
from moe_route.recording.trace import Trace

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

ENGINES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "pipeline": {"pipeline_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2},
    "experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
TRACED = [1, 3, 4, 6]
PLANS = {"free": None, "steered": PLAN}
COLUMNS = ("sequence", "group", "position", "phase", "token", "ids", "weights")
first_traces: dict[str, Trace] = {}  # of the engine that runs first, which has one rank
first_request: dict[str, RoutingStatistics] = {}


@pytest.fixture(scope="module", params=ENGINES)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine of each kind, with prefix caching, as vLLM has it by default."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in install(tmp_path_factory.mktemp("gaps")):
            patch.syspath_prepend(folder)  # workers get the path of this process
        if request.param == "tensor":
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # with the engine core in a process of its own
            patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to which a test sends a function
        options = {"groups": GROUPS, "trace": TRACED, "sequences": True}
        made = engine(options, enable_prefix_caching=True, block_size=32, **ENGINES[request.param])
        made.collective_rpc("execute_dummy_batch")  # or vLLM has no buffers for pipeline stages on a CPU
        made.kind = request.param
        yield made
        del made
        gc.collect()


@pytest.fixture(scope="module")
def kept(demo: Any, rows: list[Row]) -> dict[str, Answers]:
    """Recordings in transformers with their sequences."""
    return {name: in_transformers(demo[0], rows, plan, sequences=True) for name, plan in PLANS.items()}


def in_order(trace: Trace) -> dict[str, np.ndarray]:
    """The columns of a trace, its tokens by sequence and position: steps of other engines hold other requests."""
    order = np.lexsort((trace.position, trace.sequence))
    return {name: getattr(trace, name)[order] for name in COLUMNS}


@pytest.mark.parametrize("name", PLANS)
def test_counts_are_those_of_transformers(llm: Any, rows: list[Row], kept: dict[str, Answers], name: str) -> None:
    mr.vllm.steer(llm, PLANS[name])
    found = in_vllm(llm, rows)
    stores = found.statistics.store, kept[name].statistics.store
    for row in rows:
        np.testing.assert_array_equal(*(store.counts(row.item, row.group) for store in stores))
        np.testing.assert_allclose(*(store.distributions(row.item, row.group) for store in stores), atol=1e-6)
    found.statistics.store = None  # both hold the same items, and then cannot be added up
    assert_same(found, kept[name])
    trace = mr.vllm.trace(llm)
    assert trace.layer_numbers == tuple(TRACED)
    columns, others = in_order(trace), in_order(first_traces.setdefault(name, trace))
    np.testing.assert_allclose(columns.pop("weights"), others.pop("weights"), atol=1e-3)
    for column, values in columns.items():
        np.testing.assert_array_equal(values, others[column], err_msg=column)


def test_one_request_is_counted_to_the_bit_as_on_one_rank(llm: Any, rows: list[Row]) -> None:
    """Also with a rule that draws for each token: all ranks draw alike. Split weights are added up in another order."""
    mr.vllm.steer(llm, PLAN + mr.Plan.forbid({0: [1], 7: [2, 3]}).random_per_token(5))
    found = in_vllm(llm, rows[:1]).statistics
    one = first_request.setdefault("statistics", found)
    if llm.kind in ("one rank", "pipeline"):
        assert found == one
    for name in ("counts", "natural_counts"):
        np.testing.assert_array_equal(found.token_sum(name), one.token_sum(name))


def test_a_refused_verb_changes_nothing_and_the_next_answers_are_right(llm: Any, rows: list[Row]) -> None:
    """vLLM itself reads the answers of the workers behind the one that failed only at the next call."""
    mr.vllm.steer(llm, PLAN)
    for _ in range(2):
        with pytest.raises(Exception, match="no plan is called 'other' here"):
            mr.vllm.steer(llm, PLAN, name="other")
    reports = llm.collective_rpc("moe_route_report")
    assert [report["plans"] for report in reports] == [{"default": PLAN.hash}] * len(reports)
    layers = [layer[0] for report in reports for layer in report["layers"]]
    assert len(layers) == 8 * ENGINES[llm.kind].get("tensor_parallel_size", 1)
    assert len(set(layers)) == 8
    assert in_vllm(llm, rows[:2]).statistics.scalar("steered").any()


def test_a_plan_that_one_worker_refuses_steers_none(llm: Any, tmp_path: Path) -> None:
    """As where a file is on one machine only; here it is in the folder of the second worker."""
    mr.vllm.steer(llm, PLAN)
    mr.Plan.forbid({1: [0]}).save(tmp_path / "there.safetensors")

    def move(worker: Any) -> None:
        if worker.rank == 1:
            os.chdir(tmp_path)

    llm.collective_rpc(move)
    with pytest.raises(Exception, match=r"there\.safetensors"):
        llm.collective_rpc("moe_route_steer", args=("there.safetensors",))
    reports = llm.collective_rpc("moe_route_report")
    assert [report["plans"] for report in reports] == [{"default": PLAN.hash}] * len(reports)


def test_a_file_of_all_layers_is_written_once(llm: Any, rows: list[Row], tmp_path: Path) -> None:
    plan = tmp_path / "plan.safetensors"
    PLAN.save(plan)
    hashes = llm.collective_rpc("moe_route_steer", args=(str(plan),))
    assert set(hashes) == {PLAN.hash}
    expected = in_vllm(llm, rows[:3]).statistics
    path = str(tmp_path / "statistics.safetensors")
    assert llm.collective_rpc("moe_route_statistics", args=(path,)) == [path] + [None] * (len(hashes) - 1)
    assert RoutingStatistics.load(path) == expected
    assert sorted(os.listdir(tmp_path)) == ["plan.safetensors", "statistics.safetensors"]


def test_prefixes_are_shared_by_requests_that_are_steered_alike(llm: Any, demo: Any, rows: list[Row]) -> None:
    mr.vllm.steer(llm, PLAN)
    mr.vllm.pause(llm)
    long = [row._replace(ids=(row.ids * 9)[:70]) for row in (rows[0], rows[0]._replace(group="free"))]
    expected = in_transformers(demo[0], long, PLAN).texts
    params = [
        vllm.SamplingParams(temperature=0, max_tokens=NEW, extra_args={"moe_route_group": row.group}) for row in long
    ]
    prompts = [{"prompt_token_ids": row.ids} for row in long]
    for cached in (0, 64):  # two blocks of 32 tokens
        found = [llm.generate([prompt], one, use_tqdm=False)[0] for prompt, one in zip(prompts, params, strict=True)]
        assert [list(one.outputs[0].token_ids) for one in found] == expected
        assert [one.num_cached_tokens for one in found] == [cached] * 2


def pid_of(worker: Any) -> int:
    return os.getpid()


def test_an_interrupted_engine_of_two_workers_saves(rows: list[Row], tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the workers too, which would end before they have told what they counted."""
    path = tmp_path / "books.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        for folder in install(tmp_path):
            patch.syspath_prepend(folder)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        options = {"groups": GROUPS, "record": True, "save": str(path), "every": 3600}
        made = engine(options, tensor_parallel_size=2)
        found = in_vllm(made, rows[:4], record=False)
        for worker in made.collective_rpc(pid_of):
            os.kill(worker, signal.SIGINT)
        made.llm_engine.engine_core.shutdown()
    assert RoutingStatistics.load(path) == found.statistics
