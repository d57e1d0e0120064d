"""Every row of the table: weights and ids recomputed from the router's logits are the router's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from harness.tiny_models import EVERY, tiny_model, tokens

from moe_route import ops
from moe_route.nn import TopKRouter
from moe_route.ops import RouterSpec
from moe_route.routers import FAMILIES, ModelNotSupportedError, RouterInfo, family_of, find_routers
from moe_route.routers.check import check_router

DTYPES = (torch.float32, torch.bfloat16)


def every_row() -> set[str]:
    return {name for family in FAMILIES for name in family.routers}


def routers_of(name: str, dtype: torch.dtype) -> list[RouterInfo]:
    return find_routers(tiny_model(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_recomputed_decision_is_the_routers_own(name: str, dtype: torch.dtype) -> None:
    for router in routers_of(name, dtype):
        assert any(parameter.std() > 0.1 for parameter in router.module.parameters())  # no router full of ties
        assert check_router(router) == ""


def test_every_row_of_the_table_is_covered() -> None:
    seen = {type(router.module).__name__ for name in EVERY for router in routers_of(name, torch.float32)}
    assert every_row() - seen == {"TopKRouter", "AdapterRouter"}  # this library's own have tests of their own


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_specification_is_refused(name: str) -> None:
    """Negative controls: each field that matters, changed, is noticed."""
    router = routers_of(name, torch.float32)[-1]
    spec = router.spec
    wrong = [replace(spec, scale=spec.scale * 1.001)]
    wrong.append(replace(spec, score="sigmoid" if spec.score in ("softmax", "sparsemixer") else "softmax"))
    if spec.order != "topk_then_score" or spec.score != "softmax":  # a softmax over the chosen sums to one already
        wrong.append(replace(spec, renormalize="none" if spec.renormalize != "none" else "sum", eps=0.0))
    if spec.groups > 1:
        wrong.append(replace(spec, groups=1, top_groups=1))
    for changed in wrong:
        router.spec = changed
        with pytest.raises(ModelNotSupportedError, match="as its specification says"):
            check_router(router)
    router.spec = spec
    if router.family.correction_bias is not None and not router.family.correction_bias.startswith("argument:"):
        router.family = replace(router.family, correction_bias=None)
        with pytest.raises(ModelNotSupportedError, match="does not choose"):
            check_router(router)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3", "minimax_m2", "gemma4_text"])
def test_decision_on_the_models_own_hidden_states(name: str) -> None:
    """Not probes but what reaches the routers in a forward, captured by hooks of this test."""
    model = tiny_model(name)
    seen = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda _, args, output, router=router: seen.append((router, args, output)))
    with torch.no_grad():
        model(input_ids=tokens(3, 11))
    assert len(seen) == len(find_routers(model))
    for router, args, output in seen:
        weights, ids = ops.route(
            router.adapter.read(args, output).logits,
            router.top_k,
            router.spec,
            correction_bias=router.family.bias_of(router.module, args),
            expert_scale=router.family.scale_of(router.module),
        )
        order, own = ids.long().sort(1), output[2].sort(1)
        torch.testing.assert_close(order.values, own.values)
        torch.testing.assert_close(weights.gather(1, order.indices), output[1].gather(1, own.indices))


def test_own_router() -> None:
    spec = RouterSpec(score="sigmoid", renormalize="sum", scale=2.5)
    model = nn.Sequential(TopKRouter(hidden_size=16, num_experts=8, top_k=3, spec=spec, correction_bias=True))
    (router,) = find_routers(model)
    assert (router.num_experts, router.top_k, router.spec) == (8, 3, spec)
    assert check_router(router) == ""


def test_classes_of_other_homes_are_not_matched() -> None:
    """A class of remote code with a known name may return its decision in another form."""

    class Qwen3MoeTopKRouter(nn.Linear):
        pass

    assert family_of(Qwen3MoeTopKRouter(4, 4)) is None


def test_subclasses_are_matched() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    class Mine(Qwen3MoeTopKRouter):
        pass

    mine = Mine.__new__(Mine)
    assert family_of(mine) is next(f for f in FAMILIES if "Qwen3MoeTopKRouter" in f.routers)


def test_check_disturbs_nothing() -> None:
    model = tiny_model("phimoe").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    for router in find_routers(model):
        check_router(router)
        assert router.module.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
