"""What a watched forward leaves behind when it is interrupted: torch runs no hook after a KeyboardInterrupt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from harness.interrupts import count_lines, interrupt_at
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from moe_route.modules.watch import Decided, WatchedForward

EXPERTS, TOP_K = 8, 2


def choose(logits: Tensor) -> Tensor:
    """A block's choice, as loops over experts make it."""
    weights, ids = logits.softmax(-1).topk(TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    return F.one_hot(ids, EXPERTS) * weights[..., None]


class Block(nn.Module):
    stops = False

    def forward(self, logits: Tensor) -> Tensor:
        if self.stops:
            raise KeyboardInterrupt
        return choose(logits)


@pytest.fixture
def decided() -> list[Tensor]:
    return []


@pytest.fixture
def block(decided: list[Tensor]) -> Iterator[Block]:
    block = Block()

    def decide(logits: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        decided.append(ids)
        return ids

    watched = WatchedForward(block, lambda: Decided(EXPERTS, TOP_K, decide), lambda *_: None)
    watched.install()
    yield block
    watched.remove()
    assert not _get_current_function_mode_stack()
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


def test_a_mode_that_an_interrupt_left_behind_sees_nothing(block: Block, decided: list[Tensor]) -> None:
    logits = torch.randn(5, EXPERTS)
    plain = choose(logits)
    assert torch.equal(block(logits), plain)
    assert len(decided) == 1
    block.stops = True
    with pytest.raises(KeyboardInterrupt):
        block(logits)
    block.stops = False
    (left,) = _get_current_function_mode_stack()
    assert torch.equal(choose(logits), plain)  # somebody else's
    assert left.seen is None
    assert len(decided) == 1
    assert torch.equal(block(logits), plain)
    assert len(decided) == 2
    assert not _get_current_function_mode_stack()


def test_modes_of_others_keep_their_places(block: Block) -> None:
    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    block.stops = True
    with Other() as below:
        with pytest.raises(KeyboardInterrupt):
            block(torch.randn(5, EXPERTS))
        block.stops = False
        with Other() as above:
            block(torch.randn(5, EXPERTS))
            assert _get_current_function_mode_stack() == [below, above]


def test_an_interrupt_at_any_line_of_a_watched_forward_is_cleared_by_the_next(
    block: Block, decided: list[Tensor]
) -> None:
    logits = torch.randn(5, EXPERTS)
    lines = count_lines(lambda: block(logits), nn.Module._call_impl)
    for line in range(lines):
        assert interrupt_at(line, lambda: block(logits), nn.Module._call_impl)
        choose(logits)
        decided.clear()
        block(logits)
        assert len(decided) == 1, line
        assert not _get_current_function_mode_stack(), line
