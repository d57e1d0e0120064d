"""The routers of a vLLM model: how they are found, what they are called in transformers, and how they route.

A worker holds all routers, or those of its stage of pipeline parallelism. Plans and traces name layers of the whole
model, so every stage knows the shapes of all MoE layers, and its own place.

The seam is ``BaseRouter._compute_routing``: after the scores, before vLLM's capture of routed experts, before the
expert load balancer maps logical ids to physical ones, and before the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.contract.token_tables import TokenTables
from moe_route.integrations.vllm.options import EngineNotSupportedError, find
from moe_route.ops.token_rules import route_tokens
from moe_route.steering.cell import LayerShape

_BLOCKS = {".block_sparse_moe.experts": ".mlp.experts"}
_GATES = {"gpt_oss": "router", "phimoe": "router"}
"""By ``model_type``: name of the router in transformers 5, where it is not ``gate``."""
_SCORES = {"sqrtsoftplus": "sqrt_softplus"}
_CHECKED_ROWS = 64
_WEIGHT_TOLERANCE = 1e-4
_NO_LAYERS = (
    "moe_route: no MoE layer of vLLM's own was found; a model that runs on vLLM's Transformers backend routes inside "
    "transformers: use mr.attach(model) there"
)


@dataclass(eq=False)
class TokenNumbers:
    """What rules that look at single tokens need of the tokens of a step.

    Attributes:
        counter: int64 [T], made of a token's position and id; None if no plan draws.
        entries: int64 [T, M], its row in each of M tables of values per token, -1 for none; None if no plan has one.
        present: whether such rules may reach some token of the step.
    """

    counter: Tensor | None = None
    entries: Tensor | None = None
    present: bool = False

    def at(self, places: Tensor) -> TokenNumbers:
        """Those of the tokens at these places of the step, int64 [N]."""
        counter, entries = (None if one is None else one[places] for one in (self.counter, self.entries))
        return TokenNumbers(counter, entries, self.present)


@dataclass(eq=False)
class Site:
    """One router of the model that this worker runs."""

    name: str  # of the router in transformers
    runner: Any  # vLLM's
    num_experts: int
    top_k: int
    spec: RouterSpec
    correction_bias: Tensor | None
    device: torch.device
    output_scale: float = 1.0  # vLLM applies it to the output, transformers to the weights
    role: str = "text"
    reached: int = 0  # calls of the operator; a replayed graph adds none
    steering: SteeringTables | None = None
    statistics: StatisticsTables | None = None
    traced: tuple[Tensor, Tensor] | None = None  # ids and weights of the latest step, [T, k], if they are traced
    steers: bool = False  # whether a plan that runs has a rule for this layer
    by_token: TokenTables | None = None  # all plans that run, if some rule here looks at single tokens
    numbers: TokenNumbers = field(default_factory=TokenNumbers)  # what such rules need of the step that runs
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.int32))
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.int32))  # those of a step, of `tokens`

    @property
    def kernel(self) -> str:
        """The class of vLLM that runs its experts."""
        return type(getattr(getattr(self.runner, "routed_experts", None), "quant_method", self.runner)).__name__

    def route(
        self,
        logits: Tensor,
        ids: Tensor,
        weights: Tensor,
        tokens: Tensor,
        numbers: TokenNumbers,
    ) -> tuple[Tensor, Tensor]:
        """Steer and count the router's own choice, ids int32 and weights float32 [T, k]; returns weights and ids.

        ``tokens``: int32 [T, 4], the token table of this layer. ``numbers``: of these tokens.
        """
        given: dict[str, Any] = {
            "correction_bias": self.correction_bias,
            "tokens": tokens,
            "choice": ids,
            "choice_weights": weights,
            "statistics": self.statistics,
        }
        if self.by_token is None or not numbers.present:
            return ops.route(logits, self.top_k, self.spec, steering=self.steering, **given)
        new_weights, new_ids, _ = route_tokens(
            self.by_token,
            logits,
            self.top_k,
            self.spec,
            counter=numbers.counter,
            entries=numbers.entries,
            **given,
        )
        return new_weights, new_ids


def traced_buffers(site: Site, most_tokens: int) -> tuple[Tensor, Tensor]:
    """Room for the ids and weights of the largest step."""
    return (
        torch.full((most_tokens, site.top_k), -1, dtype=torch.int16, device=site.device),
        torch.zeros(most_tokens, site.top_k, device=site.device),
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
        kernel = type(getattr(runner.routed_experts, "quant_method", runner)).__name__
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
        kernel = type(getattr(runner.routed_experts, "quant_method", runner)).__name__
        raise EngineNotSupportedError(
            f"moe_route: {name} routes the tokens of all data parallel ranks on each of them, because its kernel "
            f"({kernel}) is not modular: start one engine per replica, without --data-parallel-size, and add up their "
            "files"
        )
    spec, bias = spec_of(router, name)
    redundant = config.num_experts - getattr(config, "num_logical_experts", config.num_experts)
    return Site(
        name=transformers_name(name, model_type),
        runner=runner,
        num_experts=config.num_experts - redundant,
        top_k=router.top_k,
        spec=spec,
        correction_bias=bias,
        device=next(runner.parameters()).device,
        output_scale=float(getattr(runner, "routed_scaling_factor", 1.0) or 1.0),
    )


def transformers_name(name: str, model_type: str) -> str:
    """Name of a router in transformers 5, from vLLM's name of its experts: statistics of both then merge."""
    for ending, there in _BLOCKS.items():
        name = name.removesuffix(ending) + there if name.endswith(ending) else name
    gate = _GATES.get(model_type, "gate")
    return f"{name.removesuffix('.experts')}.{gate}" if name.endswith(".experts") else name


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


@torch.inference_mode()
def check(site: Site) -> None:
    """Raise ``EngineNotSupportedError`` unless the spec gives what the router gives, on 64 random rows."""
    router = site.runner.router
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(_CHECKED_ROWS, site.num_experts, generator=generator) * 2).to(site.device)
    hidden = torch.zeros(_CHECKED_ROWS, site.runner.moe_config.hidden_dim, device=site.device, dtype=torch.bfloat16)
    weights, ids = router._compute_routing(hidden, logits, None)
    weights, ids = weights[:, : site.top_k].float(), ids[:, : site.top_k].long()
    mine, chosen = ops.route(logits, site.top_k, site.spec, correction_bias=site.correction_bias)
    order, other = ids.argsort(-1), chosen.long().argsort(-1)
    same = bool((ids.gather(-1, order) == chosen.long().gather(-1, other)).all())
    gap = float((weights.gather(-1, order) - mine.gather(-1, other)).abs().max())
    if not same or not gap <= _WEIGHT_TOLERANCE:
        what = f"weights differ by {gap:.2g}" if same else "it chooses other experts"
        raise EngineNotSupportedError(
            f"moe_route: {site.name}: {type(router).__name__} does not route as {site.spec} says ({what}): this model "
            "is not known here; use mr.attach in transformers"
        )


def hook(site: Site, index: int) -> None:
    """Put the operator behind the router's own choice. torch.compile traces it; ``vllm::moe_forward`` runs it."""
    router = site.runner.router
    natural = router._compute_routing

    def compute_routing(
        hidden_states: Tensor, router_logits: Tensor, indices_type: Any = None, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = natural(hidden_states, router_logits, indices_type, input_ids=input_ids)
        weights, ids = weights.contiguous(), ids.contiguous()
        torch.ops.moe_route_vllm.reroute(router_logits, weights, ids, index)
        return weights, ids

    router._compute_routing = compute_routing
    if getattr(router, "capture_fn", None) is None:  # a decode path that skips the router asks whether there is one
        router.set_capture_fn(_seen)


def _seen(ids: Tensor) -> None:
    """The choice was counted before."""


# ---- which of the model's layers a worker holds


@dataclass(frozen=True)
class Stage:
    """The place of a worker's MoE layers among those of the model.

    Attributes:
        layers: experts and top-k of all MoE layers of the model.
        first: index of this worker's first one.
        count: number of its own; 0 in a stage that has dense layers only.
    """

    layers: tuple[LayerShape, ...]
    first: int
    count: int

    @classmethod
    def among(cls, stages: Sequence[Sequence[LayerShape]], index: int) -> Stage:
        """The stage of this index, from the shapes of the layers of each."""
        first = sum(len(stage) for stage in stages[:index])
        return cls(tuple(layer for stage in stages for layer in stage), first, len(stages[index]))

    @property
    def own(self) -> slice:
        """This worker's layers among all."""
        return slice(self.first, self.first + self.count)

    def within(self, layers: Sequence[int]) -> list[int]:
        """Those of these layers of the model that this worker holds, as indices among its own.

        Raises ``EngineNotSupportedError`` for a layer that the model does not have.
        """
        outside = [layer for layer in layers if not 0 <= layer < len(self.layers)]
        if outside:
            raise EngineNotSupportedError(
                f"moe_route: there is no layer {outside[0]} to trace: the model has MoE layers 0 to "
                f"{len(self.layers) - 1}"
            )
        return [layer - self.first for layer in layers if self.first <= layer < self.first + self.count]


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
