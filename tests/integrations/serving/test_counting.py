"""Counting all layers after a step gives the bits of counting each layer in its turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables
from moe_route.integrations.serving import operator
from moe_route.integrations.serving.counts import StepCounts
from moe_route.integrations.serving.sites import Site

EXPERTS, TOP_K, LAYERS = 16, 3, 4
SPECS = (RouterSpec(renormalize="sum"), RouterSpec(score="sigmoid", renormalize="sum", scale=2.5))
METRICS = ("counts", "natural_counts", "probability", "weight", "weight_share")


def sites() -> list[Any]:
    """Layers of two specs, in turns."""
    return [
        Site(
            f"layers.{layer}.mlp.gate",
            None,
            EXPERTS,
            TOP_K,
            SPECS[layer % 2],
            None,
            torch.device("cpu"),
            tokens=torch.full((1024, 4), -1, dtype=torch.int32),
            steering=operator.neutral_tables(1, EXPERTS, torch.device("cpu")),
            statistics=StatisticsTables.zeros(
                EXPERTS, groups=2, segments=4, metrics=METRICS, entropy=True, device="cpu"
            ),
        )
        for layer in range(LAYERS)
    ]


@pytest.fixture(autouse=True)
def _disconnect() -> Any:
    yield
    operator.connect([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 512, 513])
def test_counts_after_the_step_are_those_of_each_layer(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    table = torch.full((1024, 4), -1, dtype=torch.int32)
    table[:tokens, 1] = torch.arange(tokens) % 3 - 1  # one in three is not counted
    table[:tokens, 2] = torch.where(table[:tokens, 1] >= 0, torch.arange(tokens) % 4, -1).to(torch.int32)
    table[:, 3] = 1
    found = []
    for work in (operator.Work.ROUTE, operator.Work.KEEP, operator.Work.STEER):
        made = sites()
        made[2].steers = True  # by rules that reach no token of the step
        counts = StepCounts(made)
        operator.connect(made, counts)
        generator.manual_seed(tokens)
        for _ in range(2):  # two steps
            for site in made:
                site.tokens.copy_(table)
            operator.set_work(work)
            for layer, site in enumerate(made):
                logits = torch.randn(tokens, EXPERTS, generator=generator).to(dtype)
                weights, ids = ops.route(logits, TOP_K, site.spec)
                given = logits.clone(), weights.clone(), ids.clone()
                torch.ops.moe_route_serving.reroute(logits, weights, ids, layer)
                assert all(one.equal(other) for one, other in zip(given, (logits, weights, ids), strict=True))
                for one in (logits, weights, ids):
                    one.zero_()  # the engine uses the memory again
            counts.count(table)
        assert [site.reached for site in made] == [2] * LAYERS
        found.append([site.statistics for site in made])
    for one, *others in zip(*found, strict=True):
        assert one.scalar("tokens").sum() == 2 * (tokens - -(-tokens // 3))
        for other in others:
            assert one.groups.equal(other.groups)
            assert one.segments.equal(other.segments)


def test_what_a_failed_step_kept_is_not_counted() -> None:
    made = sites()
    counts = StepCounts(made)
    logits = torch.randn(3, EXPERTS)
    weights, ids = ops.route(logits, TOP_K, SPECS[0])
    assert counts.keep(0, logits, ids, weights)
    counts.forget()
    counts.count(torch.ones(1024, 4, dtype=torch.int32))
    assert not made[0].statistics.groups.any()


def test_a_step_that_needs_nothing_does_nothing() -> None:
    made = sites()
    for site in made:
        site.tokens[:, 1:] = 1
    operator.connect(made, StepCounts(made))
    operator.set_work(operator.Work.NOTHING)
    logits = torch.randn(3, EXPERTS)
    weights, ids = ops.route(logits, TOP_K, SPECS[0])
    torch.ops.moe_route_serving.reroute(logits, weights, ids, 0)
    assert made[0].reached == 1
    assert not made[0].statistics.groups.any()
