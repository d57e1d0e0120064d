"""The backends themselves: what a test hands to a device arrives there as it is, and comes back."""

from __future__ import annotations

import torch
from harness.backends import Backend, MovedTo
from harness.problems import Problem, assert_same_bits, problems
from hypothesis import given

from moe_route import ops

HERE = Backend("here", ops, native=True)
MOVED = Backend("moved", MovedTo("cpu"), native=True)


@given(problem=problems())
def test_a_moved_problem_is_the_same_problem(problem: Problem) -> None:
    assert_same_bits(problem.run(MOVED), problem.run(HERE))


def test_moved_tensors_keep_their_layout() -> None:
    whole = torch.arange(60.0).view(6, 10)
    for tensor in (whole, whole.t(), whole[1:4, 2:7], whole[:1].expand(4, 10), whole.flatten()[7:19]):
        moved = MovedTo("cpu")._moved_tensor(tensor)
        assert torch.equal(moved, tensor)
        assert (moved.stride(), moved.storage_offset()) == (tensor.stride(), tensor.storage_offset())


def test_several_layers_come_back() -> None:
    logits, ids = [torch.randn(4, 6) for _ in range(2)], [torch.zeros(4, 1, dtype=torch.int64)] * 2
    weights = [torch.ones(4, 1)] * 2
    tables = [ops.StatisticsTables.zeros(6, groups=1, segments=1) for _ in range(2)]
    MOVED.observe_layers(logits, ids, weights, ops.RouterSpec(), statistics=tables)
    assert [table.metric("counts")[0, 0].item() for table in tables] == [4, 4]
