"""Learned routing: gradients against finite differences, a known optimum, a frozen model, plans that do the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from harness.model_decisions import look_last
from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route.steering import Plan, PlanError
from moe_route.steering.learned import RoutingParameters

FAMILIES = ["qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"]


def cross_entropy(routed: mr.RoutedModel, ids: Tensor) -> Tensor:
    logits = routed.model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss: Tensor = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return loss


def trainable(routed: mr.RoutedModel) -> list[int]:
    return [router.layer for router in routed.routers if router.steerable]


@pytest.mark.parametrize(
    ("name", "what"), [*((name, "bias") for name in FAMILIES), ("qwen3_moe", "scale"), ("olmoe", "temperature")]
)
def test_gradients_are_finite_differences(name: str, what: Any) -> None:
    """In a float64 model, where both sides choose the same experts."""
    ids = tokens(2, 7)
    model = tiny_model(name, head=True).double()
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    with mr.attach(model, verify=False) as routed:  # gpt-oss rounds its weights to float32
        parameters = RoutingParameters(routed.routers, None, None, what)

        def value() -> tuple[Tensor, Any]:
            routed._set({}, _active(parameters))
            with routed.record(trace=True) as recorder:
                loss = cross_entropy(routed, ids)
            return loss, np.sort(recorder.trace().ids, axis=2).tolist()

        found, chosen = value()
        found.backward()
        checked = 0
        step = 2.0**-6  # exact in the tables, which are float32
        numbers = parameters.values[parameters.layers[-1]]
        gradient = numbers.grad
        assert gradient is not None
        for place in list(np.ndindex(*numbers.shape))[:5]:
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    numbers[place] = sign * step
                    sides.append(value())
                    numbers[place] = 0
            if all(side[1] == chosen for side in sides):
                difference = float(sides[0][0] - sides[1][0]) / (2 * step)
                assert float(gradient[place]) == pytest.approx(difference, rel=5e-3, abs=2e-5)
                checked += abs(difference) > 1e-4
        assert checked >= 1
        routed._apply({})


def _active(parameters: RoutingParameters) -> Any:
    from moe_route.routed import _ActivePlan

    return _ActivePlan(parameters.compiled())


def test_a_known_optimum_is_found() -> None:
    """Every expert is chosen, so the weights are softmax(z + delta), and the delta of the target is the best one."""
    model = tiny_model("qwen3_moe", head=True, num_experts_per_tok=8, num_hidden_layers=1)
    ids = tokens(2, 9)
    best = torch.tensor([0.5, -0.25, 0.0, 1.0, -0.75, 0.25, 0.0, -0.75])
    with mr.attach(model) as routed:
        seen: list[Tensor] = []

        def weights() -> Tensor:
            """[T, E], by expert, of the first layer."""
            seen.clear()
            model(input_ids=ids)
            by_slot, chosen = seen[0], seen[1]
            return torch.zeros_like(by_slot).scatter(1, chosen.long(), by_slot)

        handle = look_last(routed.routers[0].module, lambda module, args, output: seen.extend([output[1], output[2]]))
        with routed.steer(Plan.bias({0: dict(enumerate(best.tolist()))})), torch.no_grad():
            target = weights()
        learned = routed.learn(
            lambda: -(target * weights().clamp(min=1e-9).log()).sum(1).mean(), layers=0, steps=150, lr=0.1
        )
        handle.remove()
    found = torch.from_numpy(learned.values[0][0])
    assert torch.allclose(found - found.mean(), best - best.mean(), atol=0.01)
    assert learned.losses[-1] < learned.losses[0]


@pytest.mark.parametrize(
    ("name", "engine"), [*((name, "hook") for name in (*FAMILIES, "phimoe")), ("qwen3_moe", "fused")]
)
def test_only_the_tables_train_and_the_plan_does_what_they_did(name: str, engine: Any) -> None:
    model = tiny_model(name, head=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one, *rest = model.parameters()
    one.requires_grad_(False)
    ids = tokens(3, 8)
    with mr.attach(model, engine=engine) as routed:
        with torch.no_grad():
            natural = model(input_ids=ids).logits
        three = routed.learn(lambda: cross_entropy(routed, ids), steps=3, lr=0.05)
        four = routed.learn(lambda: cross_entropy(routed, ids), steps=4, lr=0.05)
        assert four.losses[:3] == three.losses
        with routed.steer(three.plan), torch.no_grad():
            assert float(cross_entropy(routed, ids)) == pytest.approx(four.losses[3], rel=1e-6)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, natural)
        assert routed.plan is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [one.requires_grad, *{parameter.requires_grad for parameter in rest}] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert min(three.losses[1:]) < three.losses[0]


@pytest.mark.parametrize("what", ["bias", "scale", "temperature"])
def test_groups_learn_apart(what: Any) -> None:
    ids = {"x": tokens(2, 8, 1), "y": tokens(2, 8, 2)}
    with mr.attach(tiny_model("qwen3_moe", head=True)) as routed:
        model = routed.model

        def loss() -> Tensor:
            total = torch.zeros(())
            for group in ("x", "y"):
                with routed.labels(groups=group):
                    total = total + cross_entropy(routed, ids[group])
            return total

        learned = routed.learn(loss, layers=[0, 2], groups=["y", "x"], what=what, steps=2, lr=0.1)
        assert learned.groups == ("x", "y")
        assert all(not np.array_equal(values[0], values[1]) for values in learned.values.values())
        alone = {}
        for group in ("x", "y"):

            def one(group: str = group) -> Tensor:
                with routed.labels(groups=group):
                    return cross_entropy(routed, ids[group])

            alone[group] = routed.learn(one, layers=[0, 2], groups=group, what=what, steps=2, lr=0.1)
        for layer in (0, 2):
            for row, group in enumerate(("x", "y")):
                np.testing.assert_allclose(learned.values[layer][row], alone[group].values[layer][0], rtol=1e-5)
        with torch.no_grad():
            natural = model(input_ids=ids["x"]).logits
            with routed.steer(learned.plan), routed.labels(groups="z"):
                assert torch.equal(model(input_ids=ids["x"]).logits, natural)
            with routed.steer(learned.plan), routed.labels(groups="x"):
                assert not torch.equal(model(input_ids=ids["x"]).logits, natural)
        assert {rule.groups for rule in learned.plan.rules} == {("x",), ("y",)}


def test_what_was_learned_is_shown_and_saved(tmp_path: Any) -> None:
    ids = tokens(2, 8)
    with mr.attach(tiny_model("qwen3_moe", head=True)) as routed:
        learned = routed.learn(lambda: cross_entropy(routed, ids), layers=1, steps=2)
        assert repr(learned).startswith("Learned bias in layers 1: loss")
        assert json.dumps(learned.to_dict())
        assert list(learned.to_pandas()["loss"]) == list(learned.losses)
        for suffix in ("json", "safetensors"):
            learned.plan.save(tmp_path / f"learned.{suffix}")
            assert Plan.load(tmp_path / f"learned.{suffix}") == learned.plan
        assert learned.plan.model.num_experts == (8, 8, 8)


def test_what_cannot_be_learned_is_refused() -> None:
    ids = tokens(2, 8)
    with mr.attach(tiny_model("qwen3_moe", head=True)) as routed:

        def loss() -> Tensor:
            return cross_entropy(routed, ids)

        for given, message in (
            ({"layers": 3}, "no layer 3 to learn: the model has 3"),
            ({"layers": []}, "name at least one"),
            ({"what": "weights"}, "one of 'bias', 'scale', 'temperature'"),
            ({"groups": []}, "at least one"),
            ({"steps": 0}, "at least one step"),
            ({"lr": 0.0}, "learning rate above 0"),
        ):
            with pytest.raises(PlanError, match=message):
                routed.learn(loss, **given)
        with torch.no_grad(), pytest.raises(PlanError, match="depend on the routing"):
            routed.learn(lambda: torch.zeros((), requires_grad=True))

        def without_gradient() -> Tensor:
            with torch.no_grad():
                return loss()

        for wrong, message in (
            (without_gradient, "has no gradient"),
            (lambda: 3.0, "tensor with one number, not float"),
            (lambda: torch.zeros(2), "one number"),
            (lambda: loss() * torch.nan, "the loss is nan at step 0"),
        ):
            with pytest.raises(PlanError, match=message):
                routed.learn(wrong)  # type: ignore[arg-type]
        assert all(parameter.requires_grad for parameter in routed.model.parameters())
        assert routed.plan is None
        with routed.steer(Plan.temperature(2.0)), pytest.raises(RuntimeError, match="inside steer"):
            routed.learn(loss)
        with routed.record(), pytest.raises(RuntimeError, match="inside steer"):
            routed.learn(loss)
    with pytest.raises(RuntimeError, match="detached"):
        routed.learn(loss)
