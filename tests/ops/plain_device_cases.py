"""A device without kernels, through torch's real dispatcher: torch serves it, with the CPU's choices and counts."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from harness.plain_device import PLAIN, counted, put, put_module, raw
from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route import ops, reference
from moe_route.contract.experts import Dispatch
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import METRICS, StatisticsTables, SteeringTables, token_table

T, E, K, H = 9, 12, 3, 8
SPECS = {
    "softmax": RouterSpec(renormalize="sum"),
    "deepseek": RouterSpec("sigmoid", groups=4, top_groups=2, renormalize="sum", eps=1e-20, scale=2.5),
    "gpt-oss": RouterSpec(order="topk_then_score"),
    "norm": RouterSpec("sqrt_softplus", renormalize="norm", norm_p=2.0),
    "capped": RouterSpec("sigmoid", renormalize="sum", softcap=1.5),
}


def steering() -> SteeringTables:
    force = torch.zeros(2, E)
    force[0, 3], force[1, 5] = ops.Force.ON_PAPER, ops.Force.FORBID
    return SteeringTables(2, E, bias=torch.randn(2, E), force=force, temperature=torch.tensor([0.5, 2.0]))


def there(value: Any) -> Any:
    """An argument on the device."""
    if isinstance(value, torch.Tensor):
        return put(value)
    if isinstance(value, SteeringTables):
        tables, planes, row_params, remap = value.packed
        parts = [None if part is None else put(part) for part in (tables, row_params, remap)]
        return SteeringTables.from_packed(parts[0], planes, parts[1], parts[2], value.num_experts)
    return Dispatch(*map(put, value)) if isinstance(value, Dispatch) else value


def everything() -> dict[str, Any]:
    row = torch.arange(T)
    table = token_table(T, steering_row=row % 3 - 1, group=row % 2, segment=row // 4, valid=row != 5)
    return {"steering": steering(), "tokens": table, "correction_bias": torch.randn(E), "expert_scale": torch.rand(E)}


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
@pytest.mark.parametrize("steered", [False, True])
def test_route_and_observe(spec: RouterSpec, steered: bool) -> None:
    logits, given = torch.randn(T, E), everything() if steered else {}
    here, away = (StatisticsTables.zeros(E, groups=2, segments=3, metrics=METRICS, device=d) for d in ("cpu", PLAIN))
    weights, ids = reference.route(logits, K, spec, statistics=here, **given)
    with counted() as waits:
        on_device = {name: there(value) for name, value in given.items()}
        made, chosen = ops.route(put(logits), K, spec, statistics=away, **on_device)
        ops.observe(put(logits), chosen, made, spec, tokens=on_device.get("tokens"), statistics=away)
    assert not waits
    assert chosen.device == made.device == PLAIN
    reference.observe(logits, ids, weights, spec, tokens=given.get("tokens"), statistics=here)
    assert torch.equal(raw(chosen), ids)
    torch.testing.assert_close(raw(made), weights)
    for part in ("groups", "segments"):
        for name in ("counts", "natural_counts"):
            assert torch.equal(raw(away.metric(name, part)), here.metric(name, part))


def test_gradients_reach_the_logits() -> None:
    logits, upstream = torch.randn(T, E, requires_grad=True), torch.randn(T, K)
    away = put(logits).requires_grad_()
    for each, by in ((logits, upstream), (away, put(upstream))):
        weights, _ = ops.route(each, K, SPECS["deepseek"])
        (weights * by).sum().backward()
    assert logits.grad is not None
    assert away.grad is not None
    torch.testing.assert_close(raw(away.grad), logits.grad)


def test_rows_to_their_experts_and_back() -> None:
    x, ids, weights = torch.randn(T, H), torch.randint(-1, E, (T, K)), torch.rand(T, K)
    up, down = torch.randn(E, 2 * H, H), torch.randn(E, H, H)
    slots = reference.dispatch(ids, E, block=4)
    with counted() as waits:
        away = ops.dispatch(put(ids), E, block=4)
        rows = ops.permute(put(x), away)
        inner = ops.expert_activation(ops.permute(put(x), away), away)
        made = ops.expert_rows(put(x), away, put(up), put(down))
        out = ops.combine(made, put(weights), away, put(x))
    assert not waits
    for one, other in zip(away, slots, strict=True):
        assert torch.equal(raw(one), other)
    assert torch.equal(raw(rows), reference.permute(x, slots))
    torch.testing.assert_close(raw(inner), reference.expert_activation(reference.permute(x, slots), slots))
    of_experts = reference.expert_rows(x, slots, up, down)
    torch.testing.assert_close(raw(made), of_experts)
    torch.testing.assert_close(raw(out), reference.combine(of_experts, weights, slots, x))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"tokens \(on cpu\) and logits \(on plain:0\).*\.to\('plain:0'\)"):
        ops.route(put(torch.randn(T, E)), K, SPECS["softmax"], tokens=token_table(T))
    with pytest.raises(ValueError, match="k = 13"):
        ops.route(put(torch.randn(T, E)), 13, SPECS["softmax"])
    with pytest.raises(NotImplementedError, match="plain:0"):
        ops.pack_experts(put(torch.randn(E, H, H)), put(torch.randn(E, H, H)))


@pytest.mark.parametrize("experts", [None, "moe_route"])
def test_a_model_is_attached_recorded_steered_and_given_back(experts: Literal["moe_route"] | None) -> None:
    plan = mr.Plan.forbid({0: [1, 2]}) + mr.Plan.force_on({1: [3]})
    found = []
    for place in ("cpu", "plain"):
        model = tiny_model("qwen3_moe")
        model.set_attn_implementation("eager")
        model.set_experts_implementation("batched_mm")  # transformers' own default is for CPUs and CUDA
        if place == "plain":
            put_module(model)
        routed = mr.attach(model, experts_implementation=experts)
        ids = tokens() if place == "cpu" else put(tokens())
        with torch.no_grad(), routed:
            before = raw(model(ids).last_hidden_state).clone()
            with routed.record(entropy=False) as natural:
                model(ids)
            with routed.record(entropy=False) as steered, routed.steer(plan):
                after = raw(model(ids).last_hidden_state).clone()
        again = raw(model(ids).last_hidden_state)
        torch.testing.assert_close(again, before)
        found.append((before, after, natural.statistics(), steered.statistics()))
    (before, after, *counts), (there_before, there_after, *there_counts) = found
    torch.testing.assert_close(there_before, before)
    torch.testing.assert_close(there_after, after)
    for one, other in zip(there_counts, counts, strict=True):
        assert np.array_equal(one.token_sum("counts"), other.token_sum("counts"))
        assert one.metadata["backends"] == ["torch"]
