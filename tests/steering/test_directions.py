"""Directions added to outputs of experts: as inside the expert, the paper's formula, and who keeps every bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness.tiny_models import EVERY, inputs, tiny_model, tokens
from torch import Tensor, nn

import moe_route as mr
from moe_route.experts.outputs import NoExpertOutputsError, expert_outputs, experts_of
from moe_route.routers import RouterInfo
from moe_route.steering import Plan, PlanError

H = 64
FIRST, SECOND = (torch.randn(H, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))


def seen_outputs(module: nn.Module, found: list[Tensor]) -> Any:
    def keep(_: nn.Module, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    return module.register_forward_hook(keep)


def can_be_added_to(router: RouterInfo) -> bool:
    """Whether its experts are one module whose single outputs can be seen."""
    try:
        return not isinstance(experts_of(router), (nn.ModuleList, nn.ModuleDict))
    except NoExpertOutputsError:
        return False


@contextmanager
def inside(router: RouterInfo, directions: dict[int, Tensor]) -> Iterator[None]:
    """Every chosen expert computes f_e(x) + v_e, one slot at a time."""
    experts, names = experts_of(router), ("hidden_states", "top_k_index", "top_k_weights")

    def again(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        hidden, ids, weights = (*args, *kwargs.values())[: len(names)]
        outputs = expert_outputs(module, hidden.reshape(-1, hidden.shape[-1]), ids)
        for expert, vector in directions.items():
            outputs = outputs + (ids == expert)[..., None] * vector.to(outputs.dtype)
        return (outputs * weights[..., None]).sum(1).reshape(output.shape)

    hook = experts.register_forward_hook(again, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize("name", EVERY)
def test_the_models_weight_is_as_adding_inside_the_expert(name: str) -> None:
    """On every architecture: equal to rounding where it can be, and refused by the name of the experts elsewhere."""
    model = tiny_model(name)
    given = inputs(name, model)
    with mr.attach(model) as routed, torch.no_grad():
        router = next((r for r in routed.routers if r.role not in ("attention", "vision")), None)
        if router is None:
            return
        width = 32 if name.endswith("with_latent") else H  # these experts run in a smaller space
        first, second = FIRST[:width], SECOND[:width]
        plan = Plan.add_output({router.layer: {1: first, 3: second}}, strength=2.0)
        plain = model(**given)[0]
        if not can_be_added_to(router):
            with pytest.raises(NoExpertOutputsError, match=re.escape(router.name)):
                routed.steer(plan).__enter__()
            return
        with routed.steer(plan):
            steered = model(**given)[0]
        with inside(router, {1: 2 * first, 3: 2 * second}):
            expected = model(**given)[0]
    assert not torch.allclose(expected, plain, rtol=1e-4)
    torch.testing.assert_close(steered, expected, rtol=1e-3, atol=1e-4)


def test_it_equals_a_bias_of_the_expert() -> None:
    """gpt-oss has a bias in its experts' last product: adding to it is what the rule claims to do."""
    model, ids = tiny_model("gpt_oss"), tokens(2, 6)
    with mr.attach(model) as routed, torch.no_grad(), routed.steer(Plan.add_output({1: {2: FIRST}}, strength=-0.5)):
        steered = model(ids)[0]
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj_bias[2] -= 0.5 * FIRST
        torch.testing.assert_close(steered, model(ids)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_the_full_softmax_is_the_papers_formula(name: str, engine: str) -> None:
    """y + c * p_e * v at every token of the block, with the scaling factor where the model has one."""
    model, ids, found = tiny_model(name), tokens(2, 6), []
    with mr.attach(model, engine=engine) as routed, torch.no_grad():
        router = routed.routers[0]
        hook = seen_outputs(router.block, found)
        with routed.router_logits() as logits:
            model(ids)
            with routed.steer(Plan.add_output({0: {1: FIRST, 6: SECOND}}, weight="full") * 3):
                model(ids)
        hook.remove()
        p = torch.softmax(logits[0], -1) * router.spec.scale
        expected = found[0] + 3 * (p[..., 1:2] * FIRST + p[..., 6:7] * SECOND)
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_did_not_choose_the_expert_keep_every_bit(dtype: torch.dtype) -> None:
    model, ids, found = tiny_model("deepseek_v3", dtype), tokens(2, 6), []
    with mr.attach(model) as routed, torch.no_grad():
        hook = seen_outputs(routed.routers[0].block, found)
        plan = Plan.add_output({0: {1: FIRST}}).only(groups="x")
        with routed.record(trace=[0]) as recorder, recorder.labels(["x", "y"]):
            model(ids)
        with routed.steer(plan), routed.labels(["x", "y"]):
            model(ids)
        hook.remove()
        trace = recorder.trace()
    chose = torch.from_numpy((trace.ids[:, 0] == 1).any(1) & (trace.sequence == 0)).view(2, 6)
    plain, steered = found
    assert steered.dtype == dtype
    assert 0 < chose.sum() < 12
    assert torch.equal(plain[~chose], steered[~chose])
    assert (plain[chose] != steered[chose]).any(1).all()


def test_it_follows_a_steered_choice_and_comes_and_goes() -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens(2, 6)
    with mr.attach(model) as routed, torch.no_grad():
        plain = model(ids).logits
        forced, added = Plan.force_on({0: [5]}), Plan.add_output({0: {5: FIRST}}, strength=2.0)
        with routed.steer(forced):
            alone = model(ids).logits
            with routed.steer(added):
                both = model(ids).logits
            assert torch.equal(model(ids).logits, alone)
        assert not torch.equal(both, alone)
        with routed.steer(added - added):
            assert torch.equal(model(ids).logits, plain)
        with routed.steer(Plan.add_output({0: {5: FIRST}})), routed.record() as recorder:
            model(ids)
        assert recorder.statistics().tokens().tolist() == [[12] * 3]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules() if m is not model)
        with routed.steer(added):
            assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) > hooks
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, plain)


def test_a_loss_sees_it_and_a_checkpointed_layer_too() -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens(2, 6)
    plan = Plan.add_output({0: {1: FIRST, 2: SECOND}})
    slopes = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        model.zero_grad()
        with mr.attach(model) as routed, routed.steer(plan):
            model(ids, labels=ids).loss.backward()
        slopes.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    assert bool(slopes[0].any())
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)


def test_torch_compile_holds_it() -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens(2, 6)
    with mr.attach(model) as routed, torch.no_grad(), routed.steer(Plan.add_output({0: {1: FIRST}}, strength=3.0)):
        expected = model(ids).logits
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Plan.add_output({0: {1: [1.0, 2.0], 2: [1.0]}}), r"\[1\], \[2\]"),
        (lambda: Plan.add_output({0: {1: [float("nan")]}}), "finite"),
        (lambda: Plan.add_output({}), "none"),
        (lambda: Plan.add_output({0: [1, 2]}), "dict"),  # type: ignore[dict-item]
        (lambda: Plan.add_output({0: {1: FIRST}}, weight="softmax"), "softmax"),  # type: ignore[arg-type]
        (lambda: Plan.add_output({0: {1: FIRST}}).in_layers([1]), "add_output"),
    ],
)
def test_what_a_plan_refuses(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        make()


def test_what_a_model_refuses() -> None:
    with mr.attach(tiny_model("qwen3_moe")) as routed:
        with pytest.raises(PlanError, match="expert 8 of layer 0"):
            routed.steer(Plan.add_output({0: {8: FIRST}})).__enter__()
        with pytest.raises(PlanError, match="layer 7"):
            routed.steer(Plan.add_output({7: {1: FIRST}})).__enter__()
        with routed.steer(Plan.add_output({0: {1: FIRST[:32]}})), pytest.raises(ValueError, match="32 numbers"):
            routed.model(tokens(2, 6))


def test_a_process_with_a_part_of_the_experts_refuses() -> None:
    model = tiny_model("qwen3_moe")
    model.layers[0].mlp.experts._is_expert_parallel = True  # as transformers marks them
    with mr.attach(model) as routed, pytest.raises(NoExpertOutputsError, match="expert parallelism"):
        routed.steer(Plan.add_output({0: {1: FIRST}})).__enter__()


def test_random_controls_move_the_direction_to_other_experts() -> None:
    plan = Plan.add_output({0: {1: FIRST, 2: SECOND}, 1: {3: FIRST}})
    drawn = plan.random(3, num_experts=8)
    (rule,), (other,) = plan.rules, drawn.rules
    assert rule.table is not None
    assert other.table is not None
    assert sorted(layer for layer, _ in other.table.experts) == [0, 0, 1]
    assert other != rule
    assert {tuple(v) for v in other.table.values.tolist()} == {tuple(v) for v in rule.table.values.tolist()}
