"""The contenders of `moe-route bench` and `python -m bench.cpu` do the same work, so that their times compare."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.cpu.dispatch import Dispatching
from bench.cpu.dispatch import Shape as DispatchShape
from moe_route.bench.gate import KIMI_K3, SHAPES, Gate
from moe_route.bench.timing import Shape

SHAPES_OF_BOTH = (Shape(), Shape(96, 6, torch.bfloat16), Shape(*KIMI_K3, score="sigmoid", biased=True))


@pytest.mark.parametrize("shape", SHAPES_OF_BOTH, ids=lambda shape: shape.title)
def test_the_contenders_do_the_same_work(shape: Shape):
    gate = Gate(replace(shape, tokens=512))
    for index in range(3):
        ours, theirs = gate.routed(metrics=("counts",))(index), gate.torch_gate(index)
        same = ours[1].long() == theirs[1]  # rounded to bfloat16, logits are tied, and torch orders ties as it likes
        assert same.float().mean() > (0.9 if shape.dtype == torch.bfloat16 else 0.9999)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)


def test_the_contenders_count_the_same_mass():
    gate = Gate(Shape(*KIMI_K3, tokens=64, score="sigmoid", biased=True))
    gate.torch_gate_and_mass(0)
    mass = torch.sigmoid(gate.logits[0])
    torch.testing.assert_close(gate.torch_mass, (mass / mass.sum(1, keepdim=True)).sum(0))


def test_steering_does_the_same_work():
    gate = Gate(Shape())
    for index in range(3):
        ours, theirs = gate.routed(steering=gate.soft_steering())(index), gate.torch_soft(index)
        assert (ours[1].long() == theirs[1]).float().mean() > 0.9999  # a near tie may fall the other way
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
        chosen = gate.routed(steering=gate.forced_steering())(index)[1]
        assert (chosen == 1).any(dim=1).all()
        assert not (chosen == 2).any()


def test_every_table_of_the_gate_has_the_row_of_kimi_k3():
    rows = [shape for shape in SHAPES if (shape.experts, shape.k) == KIMI_K3]
    assert {shape.dtype for shape in rows} == {torch.float32, torch.bfloat16}
    assert all(shape.score == "sigmoid" and shape.biased for shape in rows)
    assert rows[0].title == "E=896 k=16 T=4096 float32 sigmoid with bias"


def test_the_contenders_of_dispatch_do_the_same_work():
    work = Dispatching(DispatchShape(64, 32, experts=16, k=4))
    order, counts, inverse = work.torch_dispatch(0)
    plan = work.dispatch(0)
    assert torch.equal(plan.order, order)
    assert torch.equal(plan.counts, counts)
    assert torch.equal(plan.inverse.flatten(), inverse)
    assert torch.equal(work.permute(0), work.torch_permute(0))
    torch.testing.assert_close(work.combine(0), work.torch_combine(0), rtol=1e-4, atol=1e-5)
