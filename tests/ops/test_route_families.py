"""The routers of transformers, built tiny with random weights: from their logits the operators give back their own
choice and weights. The spec is written out here; `moe_route.patching` reads it from the module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from harness.backends import Backend
from harness.expectations import assert_ulp
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec

pytest.importorskip("transformers")


@dataclass(frozen=True)
class Family:
    """A router class, the fields its configuration needs, its spec, and a spec that it must *not* agree with."""

    name: str
    module: str
    router: str
    config: dict[str, Any]
    spec: RouterSpec
    control: RouterSpec
    k: int = 4


SUM = RouterSpec(renormalize="sum")
PLAIN = RouterSpec()
FAMILIES = [
    Family("qwen3_moe", "qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 32, "norm_topk_prob": True}, SUM, PLAIN),
    Family("olmoe", "olmoe", "OlmoeTopKRouter", {"num_experts": 32, "norm_topk_prob": False}, PLAIN, SUM),
    Family("mixtral", "mixtral", "MixtralTopKRouter", {"num_local_experts": 8}, SUM, PLAIN, 2),
    Family("qwen2_moe", "qwen2_moe", "Qwen2MoeTopKRouter", {"num_experts": 60, "norm_topk_prob": False}, PLAIN, SUM),
    Family(
        "gpt_oss", "gpt_oss", "GptOssTopKRouter", {"num_local_experts": 32}, RouterSpec(order="topk_then_score"), PLAIN
    ),
    Family(
        "phimoe",
        "phimoe",
        "PhimoeTopKRouter",
        {"num_local_experts": 16, "router_jitter_noise": 0.05, "input_jitter_noise": 0.0},
        RouterSpec("sparsemixer", jitter=0.05),
        RouterSpec("sparsemixer", jitter=0.2),
        2,
    ),
    Family(
        "deepseek_v3",
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {
            "num_local_experts": 64,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        RouterSpec("sigmoid", groups=8, top_groups=4, renormalize="sum", eps=1e-20, scale=2.5),
        RouterSpec("sigmoid", renormalize="sum", eps=1e-20, scale=2.5),
        8,
    ),
]


def build(family: Family) -> nn.Module:
    from importlib import import_module
    from types import SimpleNamespace

    module = import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    config = SimpleNamespace(hidden_size=48, num_experts_per_tok=family.k, **family.config)
    router = getattr(module, family.router)(config).eval()
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn_like(tensor) * 0.4)
    return router


def choices(family: Family, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logits, weights, ids, correction bias) of the router itself on 200 tokens."""
    router = build(family).to(dtype)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(200, 48).to(dtype))
    bias = getattr(router, "e_score_correction_bias", None)
    return logits, weights, ids, None if bias is None else bias.float()


def by_expert(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """[T, E]: some routers do not order their slots, so compare by expert."""
    return torch.zeros(len(ids), num_experts).scatter(1, ids.long(), weights.float())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_float32_router_is_reproduced(backend: Backend, family: Family) -> None:
    logits, weights, ids, bias = choices(family, torch.float32)
    own_weights, own_ids = backend.route(logits, family.k, family.spec, correction_bias=bias)
    num_experts = logits.shape[1]
    assert torch.equal(own_ids.long().sort(1).values, ids.long().sort(1).values)
    assert_ulp(by_expert(own_weights, own_ids, num_experts), by_expert(weights, ids, num_experts), 4)
    if family.name != "deepseek_v3":  # its top-k is asked for without order
        assert torch.equal(own_ids.long(), ids.long())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_another_spec_is_told_apart(backend: Backend, family: Family) -> None:
    logits, weights, ids, bias = choices(family, torch.float32)
    other_weights, other_ids = backend.route(logits, family.k, family.control, correction_bias=bias)
    num_experts = logits.shape[1]
    other = by_expert(other_weights, other_ids, num_experts)
    assert (other - by_expert(weights, ids, num_experts)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_bfloat16_router_is_reproduced(backend: Backend, family: Family) -> None:
    """Ids wherever the router's own values are not tied in bfloat16, weights to the last bit of bfloat16."""
    logits, weights, ids, bias = choices(family, torch.bfloat16)
    own_weights, own_ids = backend.route(logits, family.k, family.spec, correction_bias=bias)
    ordered = logits.float().sort(1, descending=True).values
    clear = (ordered.diff(dim=1) != 0)[:, : family.k].all(1)
    assert clear.sum() > 20
    assert torch.equal(own_ids.long().sort(1).values[clear], ids.long().sort(1).values[clear])
    num_experts = logits.shape[1]
    one = by_expert(own_weights.to(weights.dtype), own_ids, num_experts)[clear]
    other = by_expert(weights, ids, num_experts)[clear]
    torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_observe_counts_the_router_itself(backend: Backend, family: Family) -> None:
    from moe_route.contract.tables import FIXED_POINT, StatisticsTables

    logits, weights, ids, _ = choices(family, torch.float32)
    num_experts = logits.shape[1]
    table = StatisticsTables.zeros(num_experts, groups=1)
    backend.observe(logits, ids, weights, replace(family.spec), statistics=table)
    assert torch.equal(table.metric("counts")[0], torch.bincount(ids.flatten(), minlength=num_experts))
    total = by_expert(weights, ids, num_experts).double().sum(0)
    torch.testing.assert_close(table.metric("weight")[0] * FIXED_POINT, total.float(), rtol=1e-6, atol=1e-6)
