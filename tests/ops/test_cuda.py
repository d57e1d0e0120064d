"""The operators on a real CUDA device: what an emulated one cannot show. All other operator tests run there as well."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.backends import BACKENDS
from torch import Tensor

from moe_route import _C, ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables, token_table

MISSING = next(backend.missing for backend in BACKENDS if backend.name == "cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

T, E, K, H = 300, 128, 8, 64
SPEC = RouterSpec("sigmoid", groups=8, top_groups=4, renormalize="sum", eps=1e-20, scale=2.5)


class Layer:
    """Inputs and tables of one layer on a device, and all operators over them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.logits = torch.empty(T, E, device=device)
        self.x = torch.empty(T, H, device=device)
        self.bias = torch.empty(2, 1, E, device=device)
        self.steering = SteeringTables.from_packed(self.bias, 2, None, None, E)
        self.tokens = torch.empty(T, 4, dtype=torch.int32, device=device)
        self.statistics = StatisticsTables.zeros(E, groups=3, segments=4, metrics=ops.METRICS, device=device)

    def fill(self, seed: int) -> Layer:
        """New inputs, tables and masks in the same memory."""
        make = torch.Generator().manual_seed(seed)
        self.logits.copy_(torch.randn(T, E, generator=make))
        self.x.copy_(torch.randn(T, H, generator=make))
        self.bias.copy_(torch.randn(2, 1, E, generator=make))
        columns = [torch.randint(-1, high, (T,), generator=make) for high in (2, 3, 4)]
        row, group, segment = columns
        valid = torch.rand(T, generator=make) < 0.9
        self.tokens.copy_(token_table(T, steering_row=row, group=group, segment=segment, valid=valid))
        return self

    def run(self) -> list[Tensor]:
        weights, ids = ops.route(
            self.logits, K, SPEC, steering=self.steering, tokens=self.tokens, statistics=self.statistics
        )
        ops.observe(self.logits, ids, weights, SPEC, tokens=self.tokens, statistics=self.statistics)
        again = ops.route_weights(self.logits, ids, SPEC, steering=self.steering, tokens=self.tokens)
        slots = ops.dispatch(ids, E, block=16)
        rows = ops.permute(self.x, slots)
        return [weights, ids, again, *slots, rows, ops.combine(rows, weights, slots, self.x)]

    def counted(self) -> list[Tensor]:
        assert self.statistics.segments is not None
        return [self.statistics.groups, self.statistics.segments]


def assert_same(there: list[Tensor], here: list[Tensor]) -> None:
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))


def test_24_graph_replay_with_changed_inputs() -> None:
    """Captured once, replayed with other logits, tables and masks in the same memory."""
    layer, expected = Layer("cuda").fill(0), Layer("cpu")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is loaded at a first launch may not be loaded in a capture
        layer.run()
    torch.cuda.synchronize()
    layer.statistics.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = layer.run()
    for seed in (1, 2, 3):
        layer.fill(seed)
        graph.replay()
        assert_same(results, expected.fill(seed).run())
    assert_same(layer.counted(), expected.counted())


def test_24_the_first_call_can_be_captured() -> None:
    """In a process of its own, where nothing was launched before."""
    program = (
        "import torch\nfrom test_cuda import E, Layer, assert_same\nfrom moe_route import ops\n"
        "layer = Layer('cuda').fill(0)\nops.load_kernels(E, 'cuda')\ngraph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n    results = layer.run()\ngraph.replay()\n"
        "expected = Layer('cpu').fill(0)\nassert_same(results, expected.run())\n"
        "assert_same(layer.counted(), expected.counted())\nprint('same')\n"
    )
    for loading in ("LAZY", "EAGER"):
        environment = {**os.environ, "CUDA_MODULE_LOADING": loading}
        command, here = [sys.executable, "-c", program], Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=environment, check=False)
        assert done.stdout == "same\n", done.stderr


def test_the_host_never_waits() -> None:
    layer = Layer("cuda").fill(0)
    layer.run()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_work_goes_to_the_current_stream() -> None:
    """Behind a long wait on a stream of its own, and read there: right only if every launch is on that stream."""
    layer, expected = Layer("cuda").fill(0), Layer("cpu").fill(5).run()
    layer.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        layer.fill(5)
        results = [result.clone() for result in layer.run()]
    stream.synchronize()
    assert_same(results, expected)


@pytest.mark.skipif(MISSING is None and torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_of_a_device_that_is_not_current() -> None:
    layer = Layer("cuda:1").fill(3)
    assert torch.cuda.current_device() == 0
    results = layer.run()
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_same(results, Layer("cpu").fill(3).run())


@pytest.mark.parametrize(
    ("call", "most"),
    [
        (lambda layer, ids, slots: ops.route(layer.logits, K, SPEC, statistics=layer.statistics), 2),
        (lambda layer, ids, slots: ops.dispatch(ids, E), 5),
        (lambda layer, ids, slots: ops.permute(layer.x, slots), 1),
    ],
    ids=["route", "dispatch", "permute"],
)
def test_nothing_is_allocated_but_outputs_and_workspace(call: Callable[..., Any], most: int) -> None:
    layer = Layer("cuda").fill(0)
    ids = ops.route(layer.logits, K, SPEC)[1]
    slots = ops.dispatch(ids, E)
    call(layer, ids, slots)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call(layer, ids, slots)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= most


def test_autocast_casts_nothing() -> None:
    logits = torch.randn(T, E, device="cuda")
    expected = ops.route(logits, K, SPEC)
    with torch.autocast("cuda", dtype=torch.float16):
        found = ops.route(logits, K, SPEC)
        half = torch.ones(T, 6, device="cuda") @ torch.ones(6, E, device="cuda")
        assert half.dtype == torch.float16
        assert ops.route(half, K, SPEC)[0].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_does_not_belong_there_is_refused() -> None:
    logits = torch.randn(4, 8, device="cuda")
    with pytest.raises(ValueError, match=r"float64.*logits\.float\(\)"):
        ops.route(logits.double(), 2, RouterSpec())
    with pytest.raises(ValueError, match=r"tokens \(on cpu\) and logits \(on cuda:0\).*\.to\('cuda:0'\)"):
        ops.route(logits, 2, RouterSpec(), tokens=token_table(4))
    with pytest.raises(ValueError, match=r"tokens \(on cuda:0\) and logits \(on cpu\).*\.to\('cpu'\)"):
        ops.route(logits.cpu(), 2, RouterSpec(), tokens=token_table(4).cuda())


def test_the_bare_launch_is_the_operator() -> None:
    logits = torch.randn(T, E, device="cuda")
    weights, ids = torch.empty(T, K, device="cuda"), torch.empty(T, K, dtype=torch.int32, device="cuda")
    args = _C.GateArgs(logits.data_ptr(), 0, T, E, K, weights.data_ptr(), ids.data_ptr(), renormalize=1)
    args.run_cuda(torch.cuda.current_stream().cuda_stream)
    expected = ops.route(logits, K, RouterSpec(renormalize="sum"))
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


def test_compiles_in_one_graph() -> None:
    layer, expected = Layer("cuda").fill(4), Layer("cpu").fill(4).run()
    torch.compiler.reset()
    assert_same(torch.compile(layer.run, fullgraph=True, backend="aot_eager")(), expected)
