"""The routers of an SGLang model: how they are found, what they are called in transformers, and how they route."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.integrations.serving import sites
from moe_route.integrations.serving.options import EngineNotSupportedError
from moe_route.integrations.serving.sites import Site, transformers_name

_SCORES = {"sqrtsoftplus": "sqrt_softplus"}


def find_sites(model: nn.Module, model_type: str) -> list[Site]:
    """All routers of a model, in the order of its layers; those of drafts are left alone.

    Raises ``EngineNotSupportedError`` naming the layer, and the flag that mends it, where one cannot be followed.
    """
    from sglang.srt.layers.moe.topk import TopK

    made = [
        _site(model, name, module, model_type)
        for name, module in model.named_modules()
        if isinstance(module, TopK) and not module.is_draft
    ]
    if not made:
        raise EngineNotSupportedError(
            "moe_route: no MoE layer of SGLang's own was found: its routers are no TopK; use mr.attach in transformers"
        )
    return made


def _site(model: nn.Module, name: str, topk: Any, model_type: str) -> Site:
    block_name = name.rpartition(".")[0]
    block, config = model.get_submodule(block_name), topk.topk_config
    form = getattr(config.output_format, "name", "STANDARD")
    if form != "STANDARD":
        raise EngineNotSupportedError(
            f"moe_route: {name} chooses its experts inside its kernel ({form} top-k), where nothing can be counted or "
            "steered: start with --moe-runner-backend triton"
        )
    if config.custom_routing_function is not None:
        called = getattr(config.custom_routing_function, "__name__", "unnamed")
        raise EngineNotSupportedError(f"moe_route: {name} routes by a function of its own ({called}), not known here")
    gate = getattr(block, "gate", None) or getattr(block, "router", None)
    weight = getattr(gate, "weight", None)
    if weight is None:
        raise EngineNotSupportedError(f"moe_route: {block_name} has no gate with weights: this model is not known here")
    experts = getattr(block, "experts", None)
    return Site(
        name=transformers_name(block_name, model_type),
        module=topk,
        num_experts=weight.shape[0],
        top_k=config.top_k - config.num_shared_topk_slots,
        spec=spec_of(config),
        correction_bias=config.correction_bias,
        device=weight.device,
        output_scale=1.0 if config.apply_routed_scaling_factor_on_output else float(config.routed_scaling_factor or 1),
        kernel=type(getattr(experts, "quant_method", experts)).__name__,
    )


def spec_of(config: Any) -> RouterSpec:
    """How a ``TopKConfig`` routes; ``check`` compares it with what SGLang does."""
    scaled = config.apply_routed_scaling_factor_on_output
    policy: dict[str, Any] = {
        "score": _SCORES.get(config.scoring_func, config.scoring_func),
        "renormalize": "sum" if config.renormalize else "none",
        "scale": float(config.routed_scaling_factor or 1.0) if scaled else 1.0,
    }
    if config.use_grouped_topk:
        policy |= {"groups": config.num_expert_group, "top_groups": config.topk_group}
        policy["group_score"] = "max" if config.correction_bias is None else "top2_sum"
    return RouterSpec(**policy)


def check(site: Site) -> None:
    """Raise ``EngineNotSupportedError`` unless the spec gives what SGLang gives."""
    from sglang.srt.layers.moe.topk import select_experts

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.zeros(len(logits), 8, device=site.device)
        given = select_experts(hidden, logits, site.module.topk_config, layer_id=site.module.layer_id)
        return given.topk_weights, given.topk_ids

    sites.check(site, choose, "TopK")
