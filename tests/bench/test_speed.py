"""Gate, dispatch, permute and combine under pytest-benchmark: `python -m pytest tests/bench/test_speed.py`.

Interleaved ratios come from `moe-route bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch

from bench.cpu.dispatch import SHAPES as DISPATCH_SHAPES
from bench.cpu.dispatch import Dispatching
from bench.cpu.dispatch import Shape as DispatchShape
from moe_route.bench.gate import SHAPES, Gate, Shape
from moe_route.bench.timing import Contender

DISPATCH_NAMES = tuple(Dispatching(DispatchShape(8, 8, experts=8, k=2)).contenders())
NAMES = tuple(Gate(Shape(8, 2, tokens=8)).contenders())


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rotating(contender: Contender) -> Callable[[], object]:
    """The contender on a new input at each call."""
    turn = count()
    return lambda: contender(next(turn))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title.replace(" ", "-"))
def test_gate(benchmark, shape: Shape, name: str):
    benchmark.group = shape.title
    benchmark.pedantic(rotating(Gate(shape).contenders()[name]), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("name", ["torch", "route", "route + counts"])
def test_one_row(benchmark, name: str):
    benchmark.group = "one row a call"
    benchmark.pedantic(rotating(Gate(Shape(tokens=1)).contenders()[name]), rounds=500, warmup_rounds=50)


def test_the_contenders_do_the_same_work():
    gate = Gate(Shape())
    for index in range(3):
        ours, theirs = gate.routed(metrics=("counts",))(index), gate.torch_gate(index)
        assert torch.equal(ours[1].long(), theirs[1])
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)


def test_steering_does_the_same_work():
    gate = Gate(Shape())
    for index in range(3):
        ours, theirs = gate.routed(steering=gate.soft_steering())(index), gate.torch_soft(index)
        assert (ours[1].long() == theirs[1]).float().mean() > 0.9999  # a near tie may fall the other way
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
        chosen = gate.routed(steering=gate.forced_steering())(index)[1]
        assert (chosen == 1).any(dim=1).all()
        assert not (chosen == 2).any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", DISPATCH_NAMES)
@pytest.mark.parametrize("shape", DISPATCH_SHAPES, ids=lambda shape: shape.title.replace(" ", "-"))
def test_dispatch(benchmark, shape: DispatchShape, name: str):
    benchmark.group = shape.title
    benchmark.pedantic(rotating(Dispatching(shape).contenders()[name]), rounds=10, warmup_rounds=2)


def test_the_contenders_of_dispatch_do_the_same_work():
    work = Dispatching(DispatchShape(64, 32, experts=16, k=4))
    order, counts, inverse = work.torch_dispatch(0)
    plan = work.dispatch(0)
    assert torch.equal(plan.order, order)
    assert torch.equal(plan.counts, counts)
    assert torch.equal(plan.inverse.flatten(), inverse)
    assert torch.equal(work.permute(0), work.torch_permute(0))
    torch.testing.assert_close(work.combine(0), work.torch_combine(0), rtol=1e-4, atol=1e-5)
