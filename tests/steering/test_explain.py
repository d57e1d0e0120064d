"""What a plan will do, against counts by hand, against running it, and against its estimate's formula."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan, PlanError

# 10 tokens of group x in one layer of 4 experts, top-2
COUNTS = np.array([[[10, 6, 4, 0]], [[2, 2, 0, 0]]])


def statistics(**more: Any) -> RoutingStatistics:
    return RoutingStatistics.from_token_sums(["x", "y"], counts=COUNTS, tokens=np.array([10, 2]), top_k=2, **more)


def effect(plan: Plan, group: str = "x") -> Any:
    (found,) = plan.explain(statistics(num_experts=4), groups=group).effects
    return found


@pytest.mark.parametrize(
    ("plan", "moved", "certainty", "saturated"),
    [
        (Plan.force_on({0: [1, 2]}), 4 + 6, "exact", ()),
        (Plan.force_on({0: [0]}), 0, "none", (0,)),
        (Plan.force_on({0: [0, 1, 2]}), 0 + 4 + 6, "at most", (0,)),
        (Plan.force_off({0: [1, 3]}), 6, "exact", (3,)),
        (Plan.force_off({0: [1, 2, 3]}), 10, "at most", (3,)),
        (Plan.forbid({0: [0]}), 10, "exact", ()),
        (Plan.forbid({0: [3]}), 0, "none", (3,)),
        (Plan.forbid({0: [0]}).only(absent=True), 0, "none", ()),
        (Plan.reserve_slot({0: [2]}), 6, "exact", ()),
        (Plan.fix_choice({0: [2, 1]}), 4 + 6, "exact", ()),
        (Plan.remap({0: {0: 2, 1: 1}}), 10, "exact", ()),
        (Plan.top_k(1), 10, "exact", ()),
        (Plan.scale_weights({0: [0]}, strength=2.0), 0, "none", ()),
        (Plan.temperature(2.0), 0, "estimate", ()),
        (Plan.bias({0: [1]}, strength=1.0), 4, "at most", ()),
        (Plan.bias({0: [1]}, strength=-1.0), 6, "at most", ()),
        (Plan.replace_scores({0: {1: 1.0}}), 20, "at most", ()),
        (Plan.force_on({0: [0]}).random_per_token(), 5, "estimate", ()),
        (Plan.gumbel(1), 20, "at most", ()),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_moves_from_sums(plan: Plan, moved: float, certainty: str, saturated: tuple[int, ...]) -> None:
    found = effect(plan)
    assert (found.moved, found.certainty, found.saturated) == (moved, certainty, saturated)
    assert found.tokens == 10


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_the_estimate_of_soft_activation_is_its_formula() -> None:
    found = effect(Plan.activate({0: [1]}, strength=0.7))
    low, high = -9.0, 9.0  # Phi^-1 by bisection
    share = 6.5 / 11
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) < share else (low, middle)
    assert found.certainty == "estimate"
    assert found.moved == pytest.approx((phi(low + 0.7) - share) * 10, abs=1e-9)
    down = effect(Plan.deactivate({0: [1]}, strength=0.7))
    assert down.moved == pytest.approx((share - phi(low - 0.7)) * 10, abs=1e-9)
    assert effect(Plan.activate({0: [0]}, strength=50.0)).moved == 0  # all tokens choose it already
    assert effect(Plan.activate({0: [3]}, strength=50.0)).moved == pytest.approx(10, abs=0.5)


def test_rules_that_do_nothing_say_why() -> None:
    plan = (
        Plan.force_on({0: [0]})
        + Plan.forbid({0: [1]}).only(groups="z")
        + Plan.scale_weights({0: [1]}, strength=0.5)
        + Plan.forbid({0: [2]}).only(phase="decode")
    )
    reasons = {
        plan.rules[rule].kind + str(plan.rules[rule].phase): why for rule, why in plan.explain(statistics()).idle
    }
    assert "weights, not the choice" in reasons["scale_weightsNone"]
    assert "no recorded token" in reasons["forbiddecode"]
    assert any("none of its groups (z)" in why for why in reasons.values())
    only_x = Plan.force_on({0: [0]}).explain(statistics(), groups=["x"])
    assert only_x.idle == ((0, "its experts are saturated already"),)
    assert "will do nothing" in repr(only_x)
    assert json.dumps(only_x.to_dict(), allow_nan=False)
    assert only_x.groups == ("x",)
    assert only_x.layers == (0,)


def trace() -> Trace:
    """4 tokens of x at positions 0-3, one of y; layers 0 and 2."""
    ids = np.array([[[0, 1], [2, 3]], [[0, 2], [3, 1]], [[1, 2], [0, 1]], [[3, 0], [1, 2]], [[0, 1], [0, 1]]], np.int8)
    return Trace(
        layers=("a", "c"),
        layer_numbers=(0, 2),
        groups=("x", "y"),
        items=("one", "two"),
        sequence=np.array([0, 0, 0, 0, 1], np.int32),
        group=np.array([0, 0, 0, 0, 1], np.int32),
        position=np.array([0, 1, 2, 3, 0], np.int32),
        token=np.arange(5, dtype=np.int32),
        phase=np.array([0, 0, 0, 1, 0], np.uint8),
        ids=ids,
        weights=np.ones(ids.shape, np.float16),
    )


@pytest.mark.parametrize(
    ("plan", "tokens", "moved", "touched"),
    [
        (Plan.force_on({0: [0, 1]}), 4, 1 + 2, 3),
        (Plan.force_on({0: [0, 1]}).only(positions=range(2)), 2, 0 + 1, 1),
        (Plan.forbid({0: [0, 1]}).only(phase="prefill"), 3, 2 + 2, 3),
        (Plan.forbid({2: [3]}), 4, 2, 2),
        (Plan.remap({2: {1: 0, 2: 2}}), 4, 3, 3),
    ],
    ids=repr,
)
def test_a_trace_counts_tokens(plan: Plan, tokens: int, moved: int, touched: int) -> None:
    (found,) = plan.explain(trace(), groups=["x"]).effects
    assert (found.tokens, found.moved, found.moved_tokens, found.certainty) == (tokens, moved, touched, "exact")


def test_positions_are_known_to_a_trace_only() -> None:
    plan = Plan.force_on({0: [1]}).only(positions=0)
    assert effect(plan).certainty == "at most"
    assert "positions" in effect(plan).note


@pytest.mark.parametrize(
    ("plan", "given", "groups", "message"),
    [
        (Plan.forbid({0: [1]}), [1, 2], None, "explain takes RoutingStatistics or a Trace, not list"),
        (Plan.forbid({0: [1]}), statistics(), "z", "no group 'z' was recorded: there are 'x', 'y'"),
        (Plan.forbid({1: [1]}), statistics(), None, "steers layer 1, the recording has 1 layers"),
        (Plan.forbid({0: [9]}), statistics(), None, "names expert 9 of layer 0, which has 4"),
        (Plan.forbid(ExpertSelection({0: [1]}, num_experts=[8])), statistics(), None, "made for another model"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(plan: Plan, given: Any, groups: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan.explain(given, groups)


def test_exact_counts_are_what_running_the_plan_does() -> None:
    """On the shipped model, in the first layer, whose input no steering changes."""
    pytest.importorskip("transformers")
    import moe_route as mr
    from moe_route.data import demo_corpus, load_demo_model

    model, tokenizer = load_demo_model()
    batch = tokenizer(list(demo_corpus().subset(["eng_Latn"], 6)["eng_Latn"]), padding=True, return_tensors="pt")

    def run(plan: Plan) -> tuple[RoutingStatistics, Trace]:
        with routed.steer(plan), routed.record(trace=True) as recorder:
            model(**batch)
        return recorder.statistics(), recorder.trace()

    with mr.attach(model) as routed:
        natural, traced = run(Plan())
        for plan in (Plan.force_on({0: [3, 5]}), Plan.forbid({0: [1, 2, 7]}), Plan.force_off({0: [4]})):
            after, _ = run(plan)
            (from_sums,) = plan.explain(natural).effects
            (from_trace,) = plan.explain(traced).effects
            experts = list(from_sums.experts)
            change = (after.token_sum("counts") - natural.token_sum("counts"))[0, 0, experts]
            assert from_sums.moved == from_trace.moved == abs(change.sum())
            has = np.isin(traced.ids[:, 0], experts).sum(1)
            touched = has < len(experts) if plan.rules[0].kind == "force_on" else has > 0
            assert from_trace.moved_tokens == touched.sum()
            again = plan.explain(after)
            assert again.effects[0].moved == from_sums.moved  # the natural choice of a steered recording
            assert "natural choice" in again.notes[0]
