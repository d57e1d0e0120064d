"""Plans that touch protected experts, and random controls that leave experts out."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("transformers")

from harness.tiny_models import tiny_model

import moe_route as mr
from moe_route.steering import ExpertSelection, Plan, PlanError

SUPER = ExpertSelection({0: [1], 2: [3, 7]})


def test_touching_is_the_overlap_where_the_plan_acts() -> None:
    plan = Plan.activate({0: [0, 1], 1: [1], 2: [3]})
    assert plan.touching(SUPER) == {0: (1,), 2: (3,)}
    assert plan.only(layers=[1, 2]).touching(SUPER) == {2: (3,)}
    assert not plan.only(layers=[1]).touching(SUPER)
    assert (plan + Plan.forbid({2: [7]})).touching({0: [1], 2: [3, 7]}) == {0: (1,), 2: (3, 7)}
    assert Plan.remap({0: {5: 1}}).touching(SUPER) == {0: (1,)}
    assert not Plan.temperature(2.0).touching(SUPER)
    assert not Plan().touching(SUPER)


def test_a_random_control_leaves_experts_out() -> None:
    plan = Plan.forbid({0: [0, 1, 5]}) + Plan.activate({0: [5, 6], 2: [0]})
    drawn = set()
    for seed in range(40):
        control = plan.random(seed, num_experts=8, exclude=SUPER)
        assert not control.touching(SUPER)
        counts = [len(experts) for rule in control.rules for _, experts in rule.experts]
        assert sorted(counts) == sorted(len(experts) for rule in plan.rules for _, experts in rule.experts)
        off, on = ({e for e, _ in rule.in_layer(0)} for rule in sorted(control.rules, key=lambda r: r.kind != "forbid"))
        assert len(off & on) == 1  # one expert of both rules, as in the plan
        drawn |= off | on
    assert drawn == set(range(8)) - {1}
    assert plan.random(3, num_experts=8) == plan.random(3, num_experts=8, exclude=None)
    with pytest.raises(PlanError, match="2 experts outside exclude"):
        plan.random(0, num_experts=8, exclude={0: range(6)})


@pytest.mark.parametrize("experts", [{3: [0]}, {0: [8]}])
def test_experts_that_the_model_lacks_are_not_protected(experts: dict[int, list[int]]) -> None:
    with mr.attach(tiny_model("qwen3_moe")) as routed, pytest.raises(PlanError, match=r"layer 3|expert 8"):
        routed.protect(experts)


def test_steering_warns_of_protected_experts() -> None:
    with mr.attach(tiny_model("qwen3_moe")) as routed:
        routed.protect(SUPER)
        with pytest.warns(RuntimeWarning, match=r"layer 2: 3"), routed.steer(Plan.forbid({2: [3]})):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with routed.steer(Plan.forbid({2: [4]})):
                pass
            routed.protect(None)
            with routed.steer(Plan.forbid({2: [3]})):
                pass
