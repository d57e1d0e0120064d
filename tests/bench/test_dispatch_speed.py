"""Dispatch, permute and combine under pytest-benchmark."""

from __future__ import annotations

import pytest
import torch
from bench.test_gate_speed import _one_thread, rotating  # noqa: F401 (a fixture)

from bench.dispatch import SHAPES, Dispatching, Shape

NAMES = tuple(Dispatching(Shape(8, 8, experts=8, k=2)).contenders())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title.replace(" ", "-"))
def test_dispatch(benchmark, shape: Shape, name: str):
    benchmark.group = shape.title
    benchmark.pedantic(rotating(Dispatching(shape).contenders()[name]), rounds=10, warmup_rounds=2)


def test_the_contenders_do_the_same_work():
    work = Dispatching(Shape(64, 32, experts=16, k=4))
    order, counts, inverse = work.torch_dispatch(0)
    plan = work.dispatch(0)
    assert torch.equal(plan.order, order)
    assert torch.equal(plan.counts, counts)
    assert torch.equal(plan.inverse.flatten(), inverse)
    assert torch.equal(work.permute(0), work.torch_permute(0))
    torch.testing.assert_close(work.combine(0), work.torch_combine(0), rtol=1e-4, atol=1e-5)
