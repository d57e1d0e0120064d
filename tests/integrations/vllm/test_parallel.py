"""One engine over several processes: stages of layers, split weights, spread experts, replicas. Counts are those of one.

What vLLM lacks on a CPU for expert and data parallelism, and the plug-in of the tests that brings it: `cpu_gaps`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.cpu_gaps import install
from harness.vllm_demo import GROUPS, PLAN, Answers, Row, assert_same, engine, in_transformers, in_vllm

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
        options = {"groups": GROUPS, "trace": TRACED, "sequences": True}
        made = engine(options, enable_prefix_caching=True, **ENGINES[request.param])
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
    """Stages compute what one rank computes; ranks that split weights add up in another order."""
    mr.vllm.steer(llm, PLAN)
    found = in_vllm(llm, rows[:1]).statistics
    one = first_request.setdefault("statistics", found)
    if llm.kind in ("one rank", "pipeline"):
        assert found == one
    else:
        assert found.tokens().tolist() == one.tokens().tolist()
    print(llm.kind, found==one)
