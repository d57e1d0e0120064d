"""The per-token steering of several plans in one: each token is steered, weighed and counted as by its own plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import NEUTRAL, STEERING_PLANES, StatisticsTables, SteeringTables
from moe_route.contract.token_tables import Placed, TokenTables, join
from moe_route.ops import token_rules
from moe_route.steering import LayerShape, Plan
from moe_route.steering.compile import CompiledPlan

E, K, T = 8, 3, 48
SPEC = RouterSpec(renormalize="sum")
SCORES = torch.rand(2, 20, 1, E, generator=torch.Generator().manual_seed(6)) + 0.1
IDS = SCORES.flip(-1).topk(K).indices  # other experts than those of the scores
PLANS = {
    "absent": Plan.activate({0: [1, 5]}, strength=0.8).only(absent=True) + Plan.forbid({0: [2]}),
    "drawn": Plan.force_on({0: [3]}).random_per_token(4),
    "scores": Plan.replace_scores({0: {1: 0.5, 4: 0.3, 7: 0.2}}),
    "fixed": Plan.fix_choice({0: [6, 0]}),
    "reserved": Plan.reserve_slot({0: [7]}) + Plan.magnitude({0: [1]}, strength=0.4),
    "replayed": Plan.replay(IDS, items=["a", "b"]),
    "given": Plan.replace_scores(SCORES, items=["a", "b"]),
    "gumbel": Plan.gumbel(3, temperature=0.7),
}


def compiled(name: str) -> tuple[CompiledPlan, TokenTables]:
    plan = PLANS[name].compile([LayerShape(E, K)])
    steering = plan.tables[0]
    assert isinstance(steering, TokenTables)
    return plan, token_rules.fitted(steering, "here", SPEC)


def zeros() -> StatisticsTables:
    return StatisticsTables.zeros(E, groups=3, metrics=("counts", "natural_counts", "weight"))


def run(steering: TokenTables, tokens: Tensor, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(9)) * 2
    weights, ids = ops.route(logits, K, SPEC)
    counts = zeros()
    weights, ids, _ = token_rules.route_tokens(
        steering,
        logits,
        K,
        SPEC,
        tokens=tokens,
        counter=token_rules.token_counter(torch.arange(T), torch.arange(T) * 3),
        entries=entries,
        choice=ids,
        choice_weights=weights,
        statistics=counts,
    )
    return weights, ids, counts.groups


@pytest.mark.parametrize("names", list(itertools.combinations(PLANS, 2)), ids=lambda names: " and ".join(names))
def test_plans_steer_their_own_tokens_as_if_alone(names: tuple[str, str]) -> None:
    made = [compiled(name) for name in names]
    first = [1, 1 + made[0][1].rows]
    rows = first[1] + made[1][1].rows + 1
    base = SteeringTables(rows, E, **_planes([steering for _, steering in made], first, rows))
    whose = torch.arange(T) % 3  # plan 0, plan 1, none
    tables = [len(plan.sequence_tables) for plan, _ in made]
    joined = join(base, [Placed(made[0][1], first[0], 0), Placed(made[1][1], first[1], tables[0])])

    table = ops.token_table(T, steering_row=0, group=0)
    table[:, 0] = torch.tensor([first[0], first[1], -1])[whose]
    table[:, 1] = whose
    entry = torch.arange(T) % 40
    together = run(joined, table, entry[:, None].expand(T, max(sum(tables), 1)))
    for number, (plan, steering) in enumerate(made):
        own = table.clone()
        own[:, 0] = torch.where(whose == number, plan.row("prefill"), -1)
        own[:, 1] = torch.where(whose == number, whose, -1)
        alone = run(steering, own, entry[:, None].expand(T, max(tables[number], 1)))
        mine = whose == number
        assert torch.equal(together[1][mine], alone[1][mine])
        assert torch.equal(together[0][mine], alone[0][mine])
        assert not torch.equal(alone[1][mine], run(steering, _unsteered(own), entry[:, None])[1][mine])
        assert torch.equal(together[2][number], alone[2][number])


def _unsteered(table: Tensor) -> Tensor:
    return torch.cat([torch.full_like(table[:, :1], -1), table[:, 1:]], 1)


def _planes(steerings: list[TokenTables], first: list[int], rows: int) -> dict[str, Tensor]:
    """What depends on the row alone, of all plans, at their rows."""
    planes = {name: torch.full((rows, E), float(NEUTRAL[name])) for name in STEERING_PLANES}
    for steering, at in zip(steerings, first, strict=True):
        for name, plane in steering.base.tables.items():
            if name in planes:
                planes[name][at : at + steering.rows] = plane
    return planes


def test_more_slots_than_the_router_has_are_refused() -> None:
    steering = Plan.top_k(5).compile([LayerShape(E, K)]).tables[0]
    assert isinstance(steering, TokenTables)
    with pytest.raises(ValueError, match="top_k above the router's own"):
        join(SteeringTables(4, E), [Placed(steering, 0, 0)])
