"""Adding up what ranks recorded; the ranks themselves run in tests/paths/ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_model, tokens
from torch import distributed

import moe_route as mr
from moe_route.recording import MergeError, all_reduce


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def recorded(seed: int, **options: Any) -> mr.RoutingStatistics:
    model = tiny_model("qwen3_moe")
    with mr.attach(model) as routed, routed.record(**options) as recorder, torch.no_grad():
        model(input_ids=tokens(seed=seed))
    return recorder.statistics()


def ranks(monkeypatch: pytest.MonkeyPatch, *others: Any) -> None:
    """Let the other ranks of the group give these statistics, packed as this rank packs its own."""
    from moe_route.recording import ranks as module

    def gather(received: list[Any], sent: Any, group: Any = None) -> None:
        received[:] = [sent, *(None if other is None else module._packed(other) for other in others)]

    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 1 + len(others))
    monkeypatch.setattr(distributed, "all_gather_object", gather)


def test_one_rank_is_itself(alone: None) -> None:
    statistics = recorded(1, sequences=True)
    total = all_reduce(statistics)
    assert total == statistics
    assert total.store is not None
    assert total.store.content_hash() == statistics.store.content_hash()
    with pytest.raises(MergeError, match="no rank of the group recorded anything"):
        all_reduce(None)


def test_the_sum_is_that_of_all_ranks_but_idle_ones(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = recorded(1, sequences=True), recorded(2, sequences=True)
    ranks(monkeypatch, None, other)
    total = all_reduce(mine)
    np.testing.assert_array_equal(total.token_sum("counts"), mine.token_sum("counts") + other.token_sum("counts"))
    assert total.sequences().tolist() == [4]
    assert total.store is not None
    assert total.store.items("all") == ["#0", "#1", "#2", "#3"]
    assert mine.store is not None  # what was given is left as it is
    assert all_reduce(None).sequences().tolist() == [2]


def test_the_same_tokens_are_not_added_up_twice(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, recorded(2), recorded(1))
    with pytest.raises(MergeError, match=r"ranks 0 and 2 of the group recorded the same tokens.*data-parallel group"):
        all_reduce(recorded(1))


def test_without_ranks_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized"):
        all_reduce(recorded(1))
