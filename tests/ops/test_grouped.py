"""Products of experts: by tiles, on a device that must not wait, and in narrow types."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness.standin_device import HostWaitedError, StandInDevices, StandInGraph, to_device
from torch import Tensor

from moe_route.ops import grouped


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


COUNTS = {
    "decode": [0, 1, 0, 0, 2, 0, 1, 0],
    "even": [4] * 8,
    "all on one": [0, 0, 37, 0, 0, 0, 0, 0],
    "uneven": [1, 90, 3, 0, 17, 2, 0, 33],
    "one expert": [5],
    "many rows": [700, 0, 1100, 1],
    "none": [0, 0, 0],
}


@pytest.mark.parametrize("skipped", [0, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
def test_tiles_give_the_products_of_the_loop(counts: list[int], skipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no expert owns, and hold NaN, reach nothing; matrices are copied a few at a time."""
    ends, rows = ends_of(counts), sum(counts)
    monkeypatch.setattr(grouped, "_COPIED_BYTES", 5 * 11 * 8 * 3)
    x, grad = torch.randn(rows + skipped, 11, dtype=torch.float64), torch.randn(rows + skipped, 5, dtype=torch.float64)
    x[rows:] = grad[rows:] = float("nan")
    weight = torch.randn(len(counts), 5, 11, dtype=torch.float64)
    expected, outer = grouped._product(x, weight, ends), grouped._outer(grad, x, ends)
    torch.testing.assert_close(grouped._product_by_tiles(x, weight, ends)[:rows], expected[:rows])
    torch.testing.assert_close(grouped._outer_by_tiles(grad, x, ends), outer)
    assert outer.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiles_in_narrow_types(dtype: torch.dtype) -> None:
    """Weights of another dtype are converted; gradients of an expert are added up in float32."""
    ends = ends_of(COUNTS["uneven"])
    x, weight = torch.randn(146, 16).to(dtype), torch.randn(8, 24, 16)
    found = grouped._product_by_tiles(x, weight, ends)
    assert found.dtype == dtype
    torch.testing.assert_close(found, grouped._product(x, weight, ends))
    grad = torch.randn(146, 24).to(dtype)
    exact = grouped._outer(grad.double(), x.double(), ends)
    error = (grouped._outer_by_tiles(grad, x, ends) - exact).abs().max() / exact.abs().max()
    assert error <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("capability", "dtype", "takes"),
    [
        ((8, 0), torch.bfloat16, False),
        ((8, 9), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, False),
        ((9, 0), torch.float16, False),
        ((9, 0), torch.float32, False),
    ],
)
def test_products_on_a_device_never_wait(
    capability: tuple[int, int], dtype: torch.dtype, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's grouped_mm waits on all but two capabilities, and for all but one dtype: it is not called there. What is
    called instead makes the host wait for nothing, and a graph of it holds for other ends."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    grouped._groups_in_one_kernel.cache_clear()
    called = []
    monkeypatch.setattr(F, "grouped_mm", lambda rows, other, offs: called.append(offs) or rows)
    x, weight = torch.randn(146, 16).to(dtype), torch.randn(8, 24, 16).to(dtype)
    ends = ends_of(COUNTS["uneven"])
    with StandInDevices():
        there = [to_device(tensor, "cuda:0") for tensor in (x, weight, ends, x @ weight[0].T)]
        if takes:
            grouped._product(*there[:3])
            grouped._outer(there[3], there[0], there[2])
            assert [offs is there[2] for offs in called] == [True, True]  # in no launch of its own made int32
        else:
            graph = StandInGraph()
            with graph.capture():
                made = grouped._product(*there[:3])
                outer = grouped._outer(there[3], there[0], there[2])
            other = ends_of(COUNTS["uneven"][::-1])
            there[2].inner.copy_(other)
            graph.replay()
            assert not called
            for found, exact in (
                (made.inner, grouped._product(x.double(), weight.double(), other)),
                (outer.inner, grouped._outer(there[3].inner.double(), x.double(), other)),
            ):
                assert (found - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    grouped._groups_in_one_kernel.cache_clear()


def test_a_loop_over_experts_would_wait() -> None:
    """The stand-in device sees what the products avoid."""
    with StandInDevices(), pytest.raises(HostWaitedError):
        grouped._ranges(to_device(ends_of([2, 3]), "cuda:0"))
