"""Kernels that meet a device for the first time are compared with torch there; those that differ are taken out."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness.backends import BACKENDS, EMULATED, EMULATED_KERNELS, Backend

from bench.sass.launches import _Callback, _Launch
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables
from moe_route.ops import library
from moe_route.ops.self_check import SelfCheckError

DEVICE = next((backend for backend in BACKENDS if backend.emulated), None)
pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(DEVICE is None or DEVICE.missing is not None, reason="the emulated CUDA kernels are not built"),
]
SPEC, E, K = RouterSpec(renormalize="sum"), 12, 3


@pytest.fixture
def device() -> Iterator[Backend]:
    """The emulated device, on which no kernel was checked yet."""
    assert DEVICE is not None
    with DEVICE.within():
        EMULATED_KERNELS.forget()
        EMULATED_KERNELS.module().set_required(True)
        try:
            yield DEVICE
        finally:
            EMULATED_KERNELS.module().set_required(False)
            EMULATED_KERNELS.forget()


@contextmanager
def machine(run: Callable[[int], int]) -> Iterator[list[int]]:
    """Launches come to ``run``, with their number, and not to the emulator; it answers with CUDA's error code."""
    library = ctypes.CDLL(str(EMULATED))
    launches: list[int] = []

    def launched(launch: Any) -> int:
        assert isinstance(launch.contents, _Launch)
        launches.append(len(launches))
        return run(launches[-1])

    callback = _Callback(launched)
    library.moe_route_emulated_set_machine(callback)
    try:
        yield launches
    finally:
        library.moe_route_emulated_set_machine(None)


def routed(device: Backend) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tables = StatisticsTables.zeros(E, groups=1, metrics=("counts",), entropy=False)
    weights, ids = device.route(torch.randn(7, E), K, SPEC, statistics=tables)
    return weights, ids, tables.metric("counts")


def expected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    reference = next(backend for backend in BACKENDS if backend.name == "reference")
    return routed(reference)


def equal(ours: tuple[torch.Tensor, ...]) -> None:
    torch.manual_seed(0)
    weights, ids, counts = expected()
    assert torch.equal(ours[1], ids)
    assert torch.equal(ours[2], counts)
    torch.testing.assert_close(ours[0], weights)


def test_right_kernels_pass_once_for_a_number_of_experts(device: Backend) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal(routed(device))
        passed = dict(EMULATED_KERNELS._passed)
        routed(device)
    assert EMULATED_KERNELS._passed == passed == {("cpu", E): None}
    assert EMULATED_KERNELS.withdrawn == {}


@pytest.mark.parametrize("experts", [1, 2, 8, 60, 128, 257, 896])
def test_right_kernels_pass_for_every_size(device: Backend, experts: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (0, experts):
            EMULATED_KERNELS.check(0, number)
    assert EMULATED_KERNELS.withdrawn == {}


def test_a_kernel_that_computes_something_else_is_withdrawn_and_torch_serves(device: Backend) -> None:
    """The planted error: launches are said to have run, and wrote nothing."""
    with (
        machine(lambda launch: 0) as launches,
        pytest.warns(RuntimeWarning, match=r"gate kernels on cpu.*report") as told,
    ):
        equal(routed(device))
    assert launches
    assert [str(warning.message).partition(" kernels")[0] for warning in told] == [
        "moe-route's gate",
        "moe-route's dispatch",
    ]
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        torch.manual_seed(0)
        equal(routed(device))
    assert set(EMULATED_KERNELS.withdrawn) == {"gate", "dispatch"}


@pytest.mark.parametrize("code", [209, 9])  # no kernel image for the device; invalid configuration
def test_a_kernel_that_the_device_refuses_is_withdrawn(device: Backend, code: int) -> None:
    with machine(lambda launch: code), pytest.warns(RuntimeWarning, match="taken out of service"):
        equal(routed(device))


def test_only_what_differs_is_withdrawn(device: Backend) -> None:
    x, ids = torch.randn(7, 6), torch.zeros(7, 2, dtype=torch.int64)
    slots = device.dispatch(ids, E)
    with machine(lambda launch: 0), pytest.warns(RuntimeWarning, match="permute kernels"):
        rows = device.permute(x, slots)
    assert torch.equal(rows, x.repeat_interleave(2, 0)[slots.order])
    assert "gate" not in EMULATED_KERNELS.withdrawn
    assert "permute" in EMULATED_KERNELS.withdrawn


def test_a_difference_raises_where_that_is_asked_for(device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ROUTE_SELF_CHECK", "raise")
    with machine(lambda launch: 0), pytest.raises(RuntimeError, match=r"gate kernels on cpu.*moe-route doctor"):
        routed(device)
    assert issubclass(SelfCheckError, RuntimeError)
    assert EMULATED_KERNELS.withdrawn == {}


def test_a_capture_on_an_unchecked_device_names_load_kernels(device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_route.ops.self_check.capturing", lambda place: True)
    with pytest.raises(RuntimeError, match=rf"graph is being captured.*load_kernels\({E}"):
        routed(device)
    monkeypatch.undo()
    EMULATED_KERNELS.check(0, E)
    monkeypatch.setattr("moe_route.ops.self_check.capturing", lambda place: True)
    torch.manual_seed(0)
    equal(routed(device))


def test_float64_logits_are_torch_s(device: Backend) -> None:
    logits = torch.randn(5, E, dtype=torch.float64)
    with machine(lambda launch: 0) as launches:
        weights, ids = device.route(logits, K, SPEC)
    assert launches == []
    assert weights.dtype == torch.float64
    assert torch.equal(ids.long(), logits.topk(K).indices)


def test_layers_are_counted_by_torch_after_a_withdrawal(device: Backend) -> None:
    logits = [torch.randn(4, E) for _ in range(2)]
    ids = [each.topk(K).indices for each in logits]
    weights = [torch.rand(4, K) for _ in range(2)]
    tables = [StatisticsTables.zeros(E, groups=1) for _ in range(2)]
    with machine(lambda launch: 0), pytest.warns(RuntimeWarning, match="gate kernels"):
        device.observe_layers(logits, ids, weights, SPEC, statistics=tables)
    for layer, table in enumerate(tables):
        assert torch.equal(table.metric("counts")[0], torch.bincount(ids[layer].flatten(), minlength=E))


def test_what_serves_names_what_was_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "serves_cuda", lambda: "")
    monkeypatch.setattr(library, "withdrawn", {"combine": "combine kernels differ"})
    assert library.backend("cuda") == "cuda, torch for combine"
    assert library.why_torch("cuda") == "combine kernels differ"
