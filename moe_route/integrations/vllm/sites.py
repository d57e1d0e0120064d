"""The routers of a vLLM model: how they are found, what they are called in transformers, and how they route.

A worker holds all routers, or those of its stage of pipeline parallelism. Plans and traces name layers of the whole
model, so every stage knows the shapes of all MoE layers, and its own place.

The seam is ``BaseRouter._compute_routing``: after the scores, before vLLM's capture of routed experts, before the
expert load balancer maps logical ids to physical ones, and before the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.integrations.serving import operator, sites
from moe_route.integrations.serving.options import EngineNotSupportedError
from moe_route.integrations.serving.sites import Site, Stage, transformers_name
from moe_route.integrations.vllm.options import find
from moe_route.steering.cell import LayerShape

_SCORES = {"sqrtsoftplus": "sqrt_softplus"}
_NO_LAYERS = (
    "moe_route: no MoE layer of vLLM's own was found; a model that runs on vLLM's Transformers backend routes inside "
    "transformers: use mr.attach(model) there"
)


def find_sites(model: nn.Module, model_type: str) -> list[Site]:
    """All routers of the model's part in this worker, in the order of its layers.

    Raises ``EngineNotSupportedError`` naming the layer, and the flag that mends it, where one cannot be followed.
    """
    base = find("vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter")
    moe_runner = find("vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner")
    return [_site(m, base, model_type) for m in model.modules() if isinstance(m, moe_runner)]


def _site(runner: Any, base: type, model_type: str) -> Site:
    name: str = runner.layer_name
    router: Any = runner.router
    if runner.is_monolithic:
        kernel = _kernel(runner)
        raise EngineNotSupportedError(
            f"moe_route: {name} chooses its experts inside its kernel ({kernel}), where nothing can be counted or "
            "steered: start with --moe-backend triton"
        )
    if not issubclass(type(router), base):
        raise EngineNotSupportedError(
            f"moe_route: {name} has a router of its own ({type(router).__name__}): use mr.attach in transformers"
        )
    config = runner.moe_config
    if getattr(getattr(config, "moe_parallel_config", None), "is_sequence_parallel", False):
        raise EngineNotSupportedError(
            f"moe_route: {name} splits the tokens of a step over the ranks of tensor parallelism, as vLLM does where "
            "tensor, data and expert parallelism meet: leave out --enable-expert-parallel, --data-parallel-size or "
            "--tensor-parallel-size"
        )
    if getattr(runner, "do_naive_dispatch_combine", False):
        kernel = _kernel(runner)
        raise EngineNotSupportedError(
            f"moe_route: {name} routes the tokens of all data parallel ranks on each of them, because its kernel "
            f"({kernel}) is not modular: start one engine per replica, without --data-parallel-size, and add up their "
            "files"
        )
    spec, bias = spec_of(router, name)
    redundant = config.num_experts - getattr(config, "num_logical_experts", config.num_experts)
    return Site(
        name=transformers_name(name.removesuffix(".experts"), model_type),
        module=runner,
        num_experts=config.num_experts - redundant,
        top_k=router.top_k,
        spec=spec,
        correction_bias=bias,
        device=next(runner.parameters()).device,
        output_scale=float(getattr(runner, "routed_scaling_factor", 1.0) or 1.0),
        kernel=_kernel(runner),
    )


def _kernel(runner: Any) -> str:
    """The class of vLLM that runs the experts."""
    return type(getattr(getattr(runner, "routed_experts", None), "quant_method", runner)).__name__


def spec_of(router: Any, name: str) -> tuple[RouterSpec, Tensor | None]:
    """How a router of vLLM routes, read from its attributes; ``check`` compares it with what the router does."""
    kind = type(router).__name__
    function = getattr(router, "custom_routing_function", None)
    if function is not None:
        called = getattr(function, "__name__", type(function).__name__)
        if called == "phimoe_routing_function":
            return RouterSpec(score="sparsemixer", jitter=0.01), None
        raise EngineNotSupportedError(f"moe_route: {name} routes by a function of its own ({called}), not known here")
    if any(getattr(router, table, None) is not None for table in ("hash_indices_table", "_hash_indices_table")):
        raise EngineNotSupportedError(f"moe_route: {name} looks its experts up by token id: there is nothing to steer")
    bias = getattr(router, "e_score_correction_bias", None)
    score = _SCORES.get(getattr(router, "scoring_func", "softmax"), getattr(router, "scoring_func", "softmax"))
    scale = float(getattr(router, "routed_scaling_factor", 1.0) or 1.0)
    policy: dict[str, Any] = {"score": score, "renormalize": "sum" if router.renormalize else "none", "scale": scale}
    if getattr(router, "use_grouped_topk", kind == "GroupedTopKRouter"):
        policy |= {"groups": router.num_expert_group, "top_groups": router.topk_group}
        policy["group_score"] = "max" if bias is None else "top2_sum"
        return RouterSpec(**policy), bias
    if kind not in ("FusedTopKRouter", "FusedTopKBiasRouter", "CPURouter"):
        raise EngineNotSupportedError(f"moe_route: {name} has a router of class {kind}, not known here")
    if bias is None and score == "softmax":
        policy["scale"] = 1.0  # these routers do not scale plain softmax weights
    return RouterSpec(**policy), bias


def check(site: Site) -> None:
    """Raise ``EngineNotSupportedError`` unless the spec gives what the router gives."""
    runner = site.module
    hidden = torch.zeros(64, runner.moe_config.hidden_dim, device=site.device, dtype=torch.bfloat16)
    sites.check(site, lambda logits: runner.router._compute_routing(hidden, logits, None), type(runner.router).__name__)


def hook(site: Site, index: int, *, eager: bool) -> None:
    """Put the operator behind the router's own choice. torch.compile traces it; ``vllm::moe_forward`` runs it.

    ``eager``: nothing is compiled, so that its function is called without a dispatcher.
    """
    router = site.module.router
    natural = router._compute_routing
    reroute = operator.reroute if eager else torch.ops.moe_route_serving.reroute

    def compute_routing(
        hidden_states: Tensor, router_logits: Tensor, indices_type: Any = None, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = natural(hidden_states, router_logits, indices_type, input_ids=input_ids)
        if not eager:
            weights, ids = weights.contiguous(), ids.contiguous()
        reroute(router_logits, weights, ids, index)
        return weights, ids

    router._compute_routing = compute_routing
    if getattr(router, "capture_fn", None) is None:  # a decode path that skips the router asks whether there is one
        router.set_capture_fn(_seen)


def _seen(ids: Tensor) -> None:
    """The choice was counted before."""


def find_stage(read: Callable[[], list[Site]], stages: int) -> tuple[list[Site], Stage]:
    """The sites that ``read`` finds in this worker, and their place; all stages call this while they load the model.

    An error of one stage is raised in all of them, so that none waits for another.

    Raises ``EngineNotSupportedError`` that ``read`` raised, here or in another stage, and where no stage has a layer.
    """
    sites: list[Site] = []
    mine: tuple[LayerShape, ...] | str
    try:
        sites = read()
        mine = tuple(LayerShape(site.num_experts, site.top_k) for site in sites)
    except EngineNotSupportedError as error:
        mine = str(error)
    index, of_all = (0, [mine]) if stages == 1 else _exchanged(mine)
    wrong = next((one for one in of_all if isinstance(one, str)), None)
    if wrong is not None:
        raise EngineNotSupportedError(wrong)
    stage = Stage.among([one for one in of_all if not isinstance(one, str)], index)
    if not stage.layers:
        raise EngineNotSupportedError(_NO_LAYERS)
    return sites, stage


def _exchanged(mine: Any) -> tuple[int, list[Any]]:
    """The index of this stage, and what all stages said; they are the ranks of vLLM's pipeline group."""
    group = find("vllm.distributed.parallel_state:get_pp_group")()
    answers: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(answers, mine, group=group.cpu_group)
    return group.rank_in_group, answers
